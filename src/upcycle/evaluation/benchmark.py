"""Benchmarks through lm-evaluation-harness, for any model: a folder, or an expert of a MoE alone.

The only place that imports lm_eval. A score is kept by the hash of the model and of the task, so that nothing is scored
twice and an interrupted benchmark goes on where it stopped.
"""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from upcycle.console import console, is_progress_shown, say, table, warn
from upcycle.data.chat import end_of_turn
from upcycle.data.skeletons import THOUGHTS_END
from upcycle.disk import digest
from upcycle.distributed.world import is_main, share, wait
from upcycle.errors import UpcycleError, counted
from upcycle.evaluation.score import routed_share
from upcycle.experts.kinds import base_in, load_for_scoring, must_spread
from upcycle.reading import brief
from upcycle.records.benchmark import BenchmarkScores, TaskScores, score_table
from upcycle.records.files import BENCHMARK_SCORES, cached_score
from upcycle.records.manifest import library_versions
from upcycle.records.record import read_record, write_record
from upcycle.routing.routers import ForcedRouter, RowExperts, granularity, num_experts, swapped_routers
from upcycle.types import Model, Tokenizer
from upcycle.weights.folders import TEMPLATE, with_end
from upcycle.weights.hashing import hash_model
from upcycle.weights.tokenizers import has_tokenizer, read_tokenizer

Task = dict[str, Any] | str
"""A configuration of ours for lm-eval, or the name of a task that it knows."""
BATCH_SIZE = 16
"""Rows."""
BATCH_TOKENS = 4096
CACHE_FORMAT = 4
MEAN_WIDTH, CELL_WIDTH = 8, 18
"""Characters on the terminal."""
SEED = 1234
"""lm-eval's own."""
STDERR_RESAMPLES = 100
"""Not 0, with which lm-eval leaves out the standard error of a mean too."""


@dataclass(frozen=True)
class Contender:
    """A model to be scored."""

    name: str
    folder: Path
    expert: int | None = None
    """This expert of a MoE alone: every token is routed to it."""
    base: Path | None = None
    """The dense model that it came from: weights that adapters share, a tokenizer where it has none."""
    chat_template: str | None = None
    """The Jinja text that it is asked with if its tokenizer has none."""


def benchmark(
    contenders: Sequence[Contender],
    tasks: Mapping[str, Task],
    out_dir: Path,
    limit: int | None = None,
    chat_template: bool = True,
) -> BenchmarkScores:
    """Score every model on every task; write `benchmark.json` and print a table with standard errors.

    Several processes share the models.

    Args:
        tasks: name to a configuration of ours, or to a name that lm-eval knows.
        limit: use only the first rows of each task.
        chat_template: ask as a chat; without, as plain text.

    Raises:
        UpcycleError: a model without a chat template that is to be asked as a chat, or a task of lm-eval's that would
            run code that the model wrote.
    """
    how = {
        "limit": limit,
        "chat_template": chat_template,
        "versions": {**library_versions(), "lm_eval": version("lm_eval")},
        "format": CACHE_FORMAT,
    }
    contents = {name: _content(task) for name, task in tasks.items()}
    bases = {contender.name: base_in(contender.folder, contender.base) for contender in contenders}
    folders = {folder for contender in contenders for folder in (contender.folder, *bases[contender.name])}
    hashes = {folder: hash_model(folder) for folder in folders}
    places: dict[str, dict[str, Path]] = {}
    for contender in contenders:
        own, shared = hashes[contender.folder], [hashes[folder] for folder in bases[contender.name]]
        asked = [contender.chat_template] if contender.chat_template else []
        model = digest([own, contender.expert, *shared, *asked])
        places[contender.name] = {
            name: cached_score(out_dir, digest([model, name, content, how])) for name, content in contents.items()
        }
    together = any(must_spread([c.folder], c.base or c.folder) for c in contenders)
    for contender in share(contenders, together):
        missing = {name: place for name, place in places[contender.name].items() if not place.exists()}
        if missing:
            with _loaded(contender) as (network, tokenizer):
                _check_template(contender, tokenizer, chat_template)
                routed = contender.expert is None and num_experts(network) > 1
                for name, place in missing.items():
                    say(f"benchmark: {contender.name} on {name} ...")
                    scores = _score(network, tokenizer, tasks[name], limit, chat_template, routed)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    write_record(place, scores)
    wait()
    found = {
        model: {name: read_record(place, TaskScores) for name, place in asked.items()}
        for model, asked in places.items()
    }
    if is_main():
        BENCHMARK_SCORES.write(out_dir, found)
    show(found)
    return found


@contextmanager
def _loaded(contender: Contender) -> Iterator[tuple[Model, Tokenizer]]:
    """The model, forced to an expert if asked, and its tokenizer."""
    model = load_for_scoring(contender.folder, contender.base)
    own = has_tokenizer(contender.folder)  # a user's checkpoint may have none
    tokenizer = read_tokenizer(contender.folder if own else contender.base or contender.folder)
    if contender.chat_template and not tokenizer.chat_template:
        tokenizer.chat_template = contender.chat_template
    if contender.expert is None:
        yield model, tokenizer
        return
    rows = RowExperts(granularity(model))
    rows.experts = torch.tensor([contender.expert], device=model.device)
    with swapped_routers(model, lambda _: ForcedRouter(rows, num_experts(model))):
        yield model, tokenizer


def _score(network: Model, tokenizer: Tokenizer, task: Task, limit: int | None, chat: bool, routed: bool) -> TaskScores:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    length = network.config.max_position_embeddings
    thinks = chat and THOUGHTS_END in str(tokenizer.chat_template)
    lm = asked_model(network, tokenizer, length, thinks)
    ends = network.generation_config.eos_token_id
    network.generation_config.eos_token_id = with_end(ends, end_of_turn(tokenizer) if chat else None)
    own = isinstance(task, dict)
    if isinstance(task, dict) and task["output_type"] == "generate_until":
        asked = dict(task["generation_kwargs"])
        if thinks:  # an empty line stands within thoughts
            asked["until"] = [text for text in asked["until"] if text.strip()]
        task = {**task, "generation_kwargs": {**asked, "max_gen_toks": min(asked["max_gen_toks"], length // 2)}}
    try:
        result: Any = _evaluate(lm, task, limit, chat)
    except Exception as error:
        if own or isinstance(error, UpcycleError):
            raise
        raise UpcycleError(_why_not(str(task), error)) from error  # lm-eval and what it loads raise any kind
    (name, scores), *_ = result["results"].items()
    if not own:
        _check_share(name, result["higher_is_better"].get(name, {}))
    figures = {key: float(value) for key, value in scores.items() if isinstance(value, (int, float)) and "," in key}
    share = None
    if routed:
        questions = [lm.tok_encode(sample["arguments"][0][0])[-length:] for sample in result["samples"][name]]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        share = routed_share(network, questions, BATCH_TOKENS, pad).tolist()
    return TaskScores(rows=result["n-samples"][name]["effective"], expert_share=share, **figures)


def _check_share(name: str, higher_is_better: Mapping[str, bool | None]) -> None:
    """Raises UpcycleError for a task of lm-eval's whose figures are no shares of right answers, as tables have."""
    lower = [metric for metric, higher in higher_is_better.items() if higher is False]
    if lower and len(lower) == len(higher_is_better):
        raise UpcycleError(
            f"{name} is scored by {', '.join(lower)}, of which less is better; name tasks with right answers"
        )


def _evaluate(lm: Any, task: Task, limit: int | None, chat: bool) -> Any:
    """As lm-eval's `simple_evaluate`, which besides lists every installed package, each time."""
    import numpy as np
    from lm_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    loaded = _task_manager(include_defaults=isinstance(task, str)).load([task])
    for asked in loaded["tasks"].values():
        if asked.get_config("num_fewshot") is None:
            asked.set_config(key="num_fewshot", value=0)
        asked.set_fewshot_seed(seed=SEED)
    return evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=STDERR_RESAMPLES, apply_chat_template=chat)


def asked_model(network: Model, tokenizer: Tokenizer, length: int, thinks: bool = False) -> Any:
    """The model as lm-eval asks it, with choices told from their question also where tokens are longer than either.

    lm-eval cuts at the number of the question's tokens, its white space at the end given to the choice. That is right
    if no token reaches over the cut: `assistant\\n` may be one token, and `assistant` nine.

    Args:
        thinks: whether answers are what stands behind thoughts.
    """
    from lm_eval.models.huggingface import HFLM

    class AskedHFLM(HFLM):  # type: ignore[misc]
        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            bare = context.rstrip()
            head = self.tok_encode(bare) if bare else []
            if head and self.tok_encode(context)[: len(head)] == head:
                context, continuation = bare, context[len(bare) :] + continuation
            question, whole = self.tok_encode(context), self.tok_encode(context + continuation)
            joined = whole[: len(question)] == question
            choice = whole[len(question) :] if joined else self.tok_encode(continuation, add_special_tokens=False)
            if not 0 < len(choice) <= self.max_length:
                raise UpcycleError(
                    f"the choice {brief(continuation)} of the question {brief(context)} has {len(choice)} tokens; the "
                    f"model can score 1 to {self.max_length}"
                )
            return question, choice

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            _say_cut([len(self.tok_encode("".join(request.args))) for request in requests], self.max_length)
            return super().loglikelihood(requests, disable_tqdm or not is_progress_shown())

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            room = max((int(request.args[1].get("max_gen_toks", self.max_gen_toks)) for request in requests), default=0)
            _say_cut([len(self.tok_encode(request.args[0])) for request in requests], self.max_length - room)
            return super().generate_until(requests, disable_tqdm or not is_progress_shown())

    return AskedHFLM(
        pretrained=network,
        tokenizer=tokenizer,
        batch_size=BATCH_SIZE,
        max_length=length,
        trust_remote_code=False,
        think_end_token=THOUGHTS_END if thinks else None,
    )


def _say_cut(lengths: Sequence[int], limit: int) -> None:
    """Of questions, in tokens, which lm-eval cuts without a word."""
    if longer := sum(length > limit for length in lengths):
        warn(
            f"{longer} of {counted(len(lengths), 'question')} have more than {limit} tokens, which is what the context "
            "leaves for them: their beginning is cut off"
        )


@cache
def _task_manager(include_defaults: bool) -> Any:
    """lm-eval's list of tasks, which takes it seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def check_names(names: Sequence[str]) -> None:
    """Names of lm-eval's own tasks, before any model is loaded.

    Raises:
        UpcycleError: lm-eval has no such task, or it is a group of tasks.
    """
    manager = _task_manager(include_defaults=True)
    for name in names:
        if name in manager.all_subtasks:
            continue
        if name in manager.all_tasks:
            raise UpcycleError(f"{name} is a group of lm-eval tasks; name the tasks in it that you want")
        near = ", ".join(get_close_matches(name, manager.all_subtasks)) or "see `lm-eval ls tasks`"
        raise UpcycleError(f"lm-eval has no task {name}; similar names: {near}; for your own files use --task-folder")


def _why_not(task: str, error: Exception) -> str:
    if "marked as unsafe" in str(error) or "code_eval" in str(error):
        return (
            f"lm-eval's task {task} would run code that the model writes, with nothing to hold it: give its rows as a "
            "file with `test_list` in --task-folder, and --allow-code"
        )
    return f"lm-eval could not ask {task}: {type(error).__name__}: {error}"


def _check_template(contender: Contender, tokenizer: Tokenizer, chat: bool) -> None:
    """Raises UpcycleError if a model that is to be asked as a chat has no template, or one that renders no question."""
    if not chat:
        return
    if not tokenizer.chat_template:
        raise UpcycleError(
            f"{contender.folder} has no chat template; use --no-chat-template to ask in plain text, or give the "
            f"model folder a {TEMPLATE}"
        )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja2 raises its own and the template's exceptions
        raise UpcycleError(
            f"the chat template of {contender.folder} cannot render a question: {error}; correct it, or use "
            "--no-chat-template to ask in plain text"
        ) from None


def _content(task: Task) -> Task:
    if isinstance(task, str):
        return task
    plain = {key: value for key, value in task.items() if not callable(value)}
    return {**plain, "rows": task["custom_dataset"]()["test"].to_list()}


def show(found: BenchmarkScores) -> None:
    """Model by task, with standard errors; the best of each task is marked."""
    heads, rows = score_table(found)
    at_once = max(1, (console.width - max(len(row[0]) for row in rows) - MEAN_WIDTH) // CELL_WIDTH)
    for first in range(2, len(heads), at_once):
        chosen = [0, 1, *range(first, min(first + at_once, len(heads)))]
        title = "benchmarks (mean of all; accuracy, exact match or pass@1 +- standard error, * best)"
        table(title if first == 2 else "", [heads[i] for i in chosen], [[row[i] for i in chosen] for row in rows])
