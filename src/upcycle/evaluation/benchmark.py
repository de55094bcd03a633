"""Benchmarks through lm-evaluation-harness, for any model: a folder, or an expert of a MoE alone.

The only place that imports lm_eval. A score is kept by the hash of the model and of the task, so that nothing is scored
twice and an interrupted benchmark goes on where it stopped.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from upcycle.artifacts import digest, hash_model, library_versions, read_manifest, write_json
from upcycle.console import console, say, table, warn
from upcycle.errors import UpcycleError
from upcycle.evaluation.score import routed_share
from upcycle.models.folders import compute_dtype, load_model, num_experts, pick_device
from upcycle.models.routers import ForcedRouter, RowExperts, swapped_routers

MAIN = ("acc_norm,none", "acc,none", "exact_match,answer", "exact_match,none", "pass_at_1,none")
"""The figure of a task that a table shows: the first of these that it has."""
FOLDER, SCORES, OF = "benchmark", "benchmark.json", "of.json"
"""Where the scores of a single run lie, and which model they are of."""
SHARE = "expert_share"
"""Of a MoE: share of a task's tokens per layer and expert."""
BATCH_TOKENS = 4096
CACHE_FORMAT = 2
MEAN_WIDTH, CELL_WIDTH = 8, 18
"""Characters on the terminal."""
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


def benchmark(
    contenders: Sequence[Contender],
    tasks: Mapping[str, dict[str, Any] | str],
    out_dir: Path,
    limit: int | None = None,
    chat_template: bool = True,
    batch_size: int = 16,
) -> dict[str, dict[str, Any]]:
    """Score every model on every task; write `benchmark.json` and print a table with standard errors.

    Args:
        tasks: name to a configuration of ours, or to a name that lm-eval knows.
        limit: only so many rows of each task.
        chat_template: ask as a chat; without, as plain text.

    Returns:
        Model name to task name to {metric: value, metric's standard error, rows, and of a MoE `expert_share`: share of
        the questions' tokens per layer and expert}.

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
    hashes = {folder: hash_model(folder) for folder in {contender.folder for contender in contenders}}
    found: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        scores = found[contender.name] = {}
        model = digest([hashes[contender.folder], contender.expert])
        missing = {}
        for name, content in contents.items():
            place = out_dir / "cache" / f"{digest([model, name, content, how])}.json"
            if place.exists():
                scores[name] = json.loads(place.read_text())
            else:
                missing[name] = place
        if missing:
            with _loaded(contender) as (network, tokenizer):
                _check_template(contender, tokenizer, chat_template)
                routed = contender.expert is None and num_experts(network) > 1
                for name, place in missing.items():
                    say(f"benchmark: {contender.name} on {name} ...")
                    scores[name] = _score(network, tokenizer, tasks[name], limit, chat_template, batch_size, routed)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    write_json(place, scores[name])
    ordered = {model: {name: scores[name] for name in tasks} for model, scores in found.items()}
    write_json(out_dir / SCORES, ordered)
    show(ordered)
    return ordered


@contextmanager
def _loaded(contender: Contender) -> Iterator[tuple[Any, Any]]:
    """The model, forced to an expert if asked, and its tokenizer."""
    from transformers import AutoTokenizer

    device = pick_device()
    model = load_model(contender.folder, compute_dtype(device), device, contender.base)
    own = any(contender.folder.glob("tokenizer*")) or contender.base is None  # a user's checkpoint may have none
    tokenizer = AutoTokenizer.from_pretrained(contender.folder if own else contender.base)
    if contender.expert is None:
        yield model, tokenizer
        return
    rows = RowExperts()
    rows.experts = torch.tensor([contender.expert], device=device)
    with swapped_routers(model, lambda _: ForcedRouter(rows, num_experts(model))):
        yield model, tokenizer


def _score(
    network: Any, tokenizer: Any, task: Any, limit: int | None, chat: bool, batch_size: int, routed: bool
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    length = network.config.max_position_embeddings
    lm = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=batch_size, max_length=length)
    own = isinstance(task, dict)
    if own and task["output_type"] == "generate_until":
        asked = task["generation_kwargs"]
        task = {**task, "generation_kwargs": {**asked, "max_gen_toks": min(asked["max_gen_toks"], length // 2)}}
    try:
        result: Any = simple_evaluate(
            model=lm,
            tasks=[task],
            task_manager=TaskManager(include_defaults=not own),
            limit=limit,
            bootstrap_iters=STDERR_RESAMPLES,
            apply_chat_template=chat,
        )
    except Exception as error:
        if own:
            raise
        raise UpcycleError(_why_not(task, error)) from error  # lm-eval and what it loads raise any kind
    (name, scores), *_ = result["results"].items()
    figures: dict[str, Any] = {
        key: value for key, value in scores.items() if isinstance(value, (int, float)) and "," in key
    }
    figures["rows"] = result["n-samples"][name]["effective"]
    if routed:
        questions = [lm.tok_encode(sample["arguments"][0][0])[-length:] for sample in result["samples"][name]]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        figures[SHARE] = routed_share(network, questions, BATCH_TOKENS, pad).tolist()
    return figures


def check_names(names: Sequence[str]) -> None:
    """Names of lm-eval's own tasks, before any model is loaded.

    Raises:
        UpcycleError: lm-eval has no such task, or it is a group of tasks.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name in manager.all_subtasks:
            continue
        if name in manager.all_tasks:
            raise UpcycleError(f"{name} is a group of lm-eval's tasks; name the tasks of it that you want")
        near = ", ".join(get_close_matches(name, manager.all_subtasks)) or "see `lm-eval ls tasks`"
        raise UpcycleError(f"lm-eval has no task {name}; near to it: {near}; for files of your own give --task-folder")


def _why_not(task: str, error: Exception) -> str:
    if "marked as unsafe" in str(error) or "code_eval" in str(error):
        return (
            f"lm-eval's task {task} would run code that the model writes, with nothing to hold it: give its rows as a "
            "file with `test_list` in --task-folder, and --allow-code"
        )
    return f"lm-eval could not ask {task}: {type(error).__name__}: {error}"


def _check_template(contender: Contender, tokenizer: Any, chat: bool) -> None:
    if chat and not tokenizer.chat_template:
        raise UpcycleError(
            f"{contender.folder} has no chat template; ask it as plain text with --no-chat-template, or give the model "
            "folder a chat_template.jinja"
        )


def _content(task: dict[str, Any] | str) -> Any:
    if isinstance(task, str):
        return task
    plain = {key: value for key, value in task.items() if not callable(value)}
    return {**plain, "rows": task["custom_dataset"]()["test"].to_list()}


def main_figure(scores: Mapping[str, Any]) -> tuple[float, float]:
    """The figure that a table shows, and its standard error."""
    key = next((key for key in MAIN if key in scores), None)
    if key is None:
        key = next(key for key in scores if "stderr" not in key and "," in key)
    metric, _, kind = key.partition(",")
    return scores[key], scores.get(f"{metric}_stderr,{kind}", float("nan"))


def mark(run: Path) -> None:
    """Note which model of a run its scores are of."""
    write_json(run / FOLDER / OF, {"posttrain": _posttrained(run)})


def read_scores(run: Path) -> dict[str, dict[str, Any]]:
    """What `upcycle benchmark RUN` found last of a run: model to task to figures; nothing if it has not been asked.

    Scores of a model that was trained anew since are named, and not used.
    """
    path, of = run / FOLDER / SCORES, run / FOLDER / OF
    if not (path.is_file() and of.is_file()):
        return {}
    if json.loads(of.read_text()) != {"posttrain": _posttrained(run)}:
        warn(f"{path} is of another model than the run has now and is left out; `upcycle benchmark {run}` scores it")
        return {}
    scores: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return scores


def _posttrained(run: Path) -> str:
    manifest = read_manifest(run / "posttrain")
    return manifest.content if manifest else ""


def show(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Model by task, with standard errors; the best of each task is marked."""
    heads, rows = score_table(found)
    at_once = max(1, (console.width - max(len(row[0]) for row in rows) - MEAN_WIDTH) // CELL_WIDTH)
    for first in range(2, len(heads), at_once):
        chosen = [0, 1, *range(first, min(first + at_once, len(heads)))]
        title = "benchmarks (mean of all; accuracy, exact match or pass@1 +- standard error, * best)"
        table(title if first == 2 else "", [heads[i] for i in chosen], [[row[i] for i in chosen] for row in rows])


def score_table(found: Mapping[str, Mapping[str, Any]], sign: str = "+-") -> tuple[list[str], list[list[str]]]:
    """Heads (with rows of each task) and rows: model, mean, figures with standard error; `*` marks a task's best."""
    tasks = list(next(iter(found.values())))
    best = {task: max(main_figure(scores[task])[0] for scores in found.values()) for task in tasks}
    rows = []
    for model, scores in found.items():
        figures = [main_figure(scores[task]) for task in tasks]
        cells = [
            f"{value:.1%} {sign} {error:.1%}" + "*" * (value == best[task])
            for task, (value, error) in zip(tasks, figures, strict=True)
        ]
        rows.append([model, f"{fmean(value for value, _ in figures):.1%}", *cells])
    asked = next(iter(found.values()))
    return ["model", "mean", *(f"{task} ({asked[task]['rows']})" for task in tasks)], rows
