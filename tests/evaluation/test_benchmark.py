"""Benchmarks: rows that are refused, scores against their definition, experts alone, the cache."""

import gzip
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle.errors import UpcycleError
from upcycle.evaluation.benchmark import Contender, _check_share, asked_model, benchmark, check_names
from upcycle.evaluation.tasks import DOCUMENTS, check_row, read_rows, read_tasks, task_of
from upcycle.experts.kinds import load_model
from upcycle.pipeline.benchmarks import own_folder
from upcycle.records.benchmark import TaskScores, score_table
from upcycle.records.files import BENCHMARK_SCORES
from upcycle.reporting.figures import draw_benchmarks
from upcycle.routing.routers import RouterRecorder
from upcycle.studies.benchmark import choose_tasks, contenders, run_benchmark
from upcycle.weights.base import load_tokenizer
from upcycle.weights.folders import find_model
from worlds import assembled

CHOICES = [
    {"question": f"spell {w}", "choices": ["abc", "fedcba", "x"], "answer": i % 3} for i, w in enumerate("abcdef")
]
ANSWERS = [{"prompt": f"copy {w}", "answer": [w, w * 2]} for w in "abcd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tasks")
    with gzip.open(out / "choose.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, CHOICES)))
    (out / "say.jsonl").write_text("\n".join(map(json.dumps, ANSWERS)))
    return out


def loglikelihoods(model: Any, tokenizer: Any, row: dict[str, Any]) -> list[float]:
    chat = [{"role": "user", "content": f"Question: {row['question']}\nAnswer:"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    found = []
    for choice in row["choices"]:
        context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{prompt}{choice}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        found.append(sum(logits[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
    return found


def test_accuracy_is_that_of_the_likeliest_choice(base: Path, folder: Path, tmp_path: Path) -> None:
    found = benchmark([Contender("base", base)], read_tasks(folder, ["choose"]), tmp_path)["base"]["choose"]
    model, tokenizer = load_model(base, torch.float32), load_tokenizer(base, None)
    hits = [max(range(3), key=loglikelihoods(model, tokenizer, row).__getitem__) == row["answer"] for row in CHOICES]
    assert found.figures["acc,none"] == pytest.approx(sum(hits) / len(hits))
    assert found.rows == 6
    p = found.figures["acc,none"]
    assert found.figures["acc_stderr,none"] == pytest.approx((p * (1 - p) / 5) ** 0.5)


def test_an_expert_alone_scores_like_its_checkpoint(
    base: Path, checkpoints: list[Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe = assembled(base, checkpoints, tmp_path / "moe")
    for checkpoint in checkpoints:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (checkpoint / name).write_bytes((base / name).read_bytes())
    models = [Contender(f"c{i}", c) for i, c in enumerate(checkpoints)]
    models += [Contender(f"E{i}", moe, expert=i) for i in range(3)]
    tasks = read_tasks(folder)
    found = benchmark(models, tasks, tmp_path / "out")
    assert all(found[f"c{i}"] == found[f"E{i}"] for i in range(3))
    monkeypatch.setattr("upcycle.evaluation.benchmark.load_for_scoring", None)  # would fail if called: all is kept
    assert benchmark(models, tasks, tmp_path / "out") == found
    assert BENCHMARK_SCORES.read(tmp_path / "out") == found


def test_any_of_several_answers_counts(base: Path, folder: Path, tmp_path: Path) -> None:
    scores = benchmark([Contender("base", base)], read_tasks(folder, ["say"]), tmp_path, limit=2)["base"]["say"]
    assert scores.rows == 2
    assert scores.main[0] == scores.figures["exact_match,answer"]


def test_a_folder_of_a_model_is_scored_and_drawn(base: Path, folder: Path, tmp_path: Path) -> None:
    tasks = choose_tasks(["choose"], folder, False)
    draw_benchmarks(run_benchmark([str(base)], tasks, False, tmp_path, 2, chat_template=False), tmp_path)
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UpcycleError, match="has no task chose; it has choose, say"):
        choose_tasks(["chose"], folder, False)
    with pytest.raises(UpcycleError, match="no task: give --tasks"):
        choose_tasks([], None, False)
    with pytest.raises(UpcycleError, match="two models are called"):
        contenders([str(base), str(base)], experts=False)


def test_a_model_without_a_template_is_named(checkpoints: list[Path], folder: Path, tmp_path: Path, base: Path) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UpcycleError, match="bare has no chat template; use --no-chat-template"):
        benchmark([Contender("bare", bare)], read_tasks(folder, ["choose"]), tmp_path / "out")


def test_a_token_that_reaches_over_the_cut_belongs_to_the_question(tmp_path: Path) -> None:
    """In the embedded tokenizer `assistant\\n`, the end of a question, is one token, and `assistant` nine."""
    words = ["Rome", "Oslo is it", "a"]
    rows = [{"question": f"say {w}", "choices": words, "answer": i} for i, w in enumerate(words)]
    (tmp_path / "choose.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny = find_model("builtin:tiny")
    found = benchmark([Contender("tiny", tiny)], read_tasks(tmp_path), tmp_path / "out")["tiny"]["choose"]
    model, tokenizer = load_model(tiny, torch.float32), load_tokenizer(tiny, None)
    hits = [max(range(3), key=loglikelihoods(model, tokenizer, row).__getitem__) == row["answer"] for row in rows]
    assert found.figures["acc,none"] == pytest.approx(sum(hits) / 3)


def test_questions_and_choices_are_cut_as_lm_eval_does_where_no_token_reaches_over(base: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    for folder, same in ((base, True), (find_model("builtin:tiny"), False)):
        ours = asked_model(load_model(folder, torch.float32), load_tokenizer(folder, None), 64)
        for question in ("say it ", "<|im_start|>assistant\n", "x"):
            for choice in ("a b", " c\n"):
                pair, theirs = ours._encode_pair(question, choice), HFLM._encode_pair(ours, question, choice)
                assert (pair == theirs) is (same or "assistant" not in question)
                assert pair[1] != []
        assert ours._encode_pair("assistant", "\n")[1] != []  # one token, and not the question's
        with pytest.raises(UpcycleError, match="the choice '' of the question 'x' has 0 tokens"):
            ours._encode_pair("x", "")
        with pytest.raises(UpcycleError, match="has 100 tokens; the model can score 1 to 64"):
            ours._encode_pair("x", "!" * 100)


def test_a_template_that_renders_no_question_is_named(base: Path, folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(UpcycleError, match=r"chat template of .*broken cannot render a question: no; correct it"):
        benchmark([Contender("broken", broken)], read_tasks(folder, ["choose"]), tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "q", "choices": ["a", "b"], "answer": 2},
            "`answer` is 2, expected the index of one of 2 `choices`",
        ),
        ({"choices": ["a", "b"], "answer": 0}, "`question` is None, expected a string"),
        (
            {"question": "q", "choices": ["a", 2], "answer": 0},
            r"`choices` is \['a', 2\], expected a list of two strings",
        ),
        ({"question": "q", "choices": ["a", " "], "answer": 0}, "`choices` is .*, none of them empty"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "`answer` is True, expected an integer"),
        ({"question": "q", "choices": ["a", "b"], "answer": 10**400}, r"`answer` is 1.{60,100}, expected the index"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0, "context": []}, r"`context` is \[\], expected a string"),
        ({"question": "q\ud800", "choices": ["a", "b"], "answer": 0}, "half of a surrogate pair"),
        ({"prompt": "p", "answer": 3}, "`answer` is 3, expected a string or a list of strings"),
        ({"prompt": "p"}, "`answer` is None, expected a string"),
        ({"text": "p"}, "`prompt` is None, expected a string"),
        ({"prompt": "p", "test_list": "assert f()"}, r"`test_list` is 'assert f\(\)', expected a list"),
        ({"prompt": "p", "test_list": ["a"], "test_setup_code": []}, r"`test_setup_code` is \[\], expected a string"),
        ({"prompt": "p", "test_list": [1]}, r"`test_list` is \[1\], expected a list of strings"),
        ([1], "holds list, expected an object"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(row: Any, message: str) -> None:
    with pytest.raises(UpcycleError, match=f"file, line 7.*{message}"):
        check_row(row, "file, line 7")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for text, message in (("", "is empty"), ("{", "x.jsonl:1: not JSON")):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(UpcycleError, match=message):
            read_rows(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(CHOICES[0])}\n{json.dumps(ANSWERS[0])}")
    with pytest.raises(UpcycleError, match="mixes answer and choice rows; use one file for each kind"):
        read_rows(tmp_path / "x.jsonl")


def test_programs_are_run_only_if_that_is_allowed(
    base: Path, folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcycle.evaluation.tasks.passes", lambda answer, *_: "+ b" in answer)  # itself: test_code.py
    tasks = Path(shutil.copytree(folder, tmp_path / "tasks"))
    row = {"prompt": "add two numbers", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": "", "answer": "-"}
    (tasks / "program.jsonl").write_text(json.dumps(row))
    with pytest.raises(UpcycleError, match=r"program.jsonl runs programs that the model writes; use --allow-code"):
        read_tasks(tasks, ["program"])
    assert list(read_tasks(tasks)) == ["choose", "say"]
    assert "program left out" in " ".join(capsys.readouterr().out.split())
    task = read_tasks(tasks, ["program"], allow_code=True)["program"]
    assert "write nothing, and reach no network" in " ".join(capsys.readouterr().out.split())
    (document,) = task["custom_dataset"]()["test"]
    assert document["text"].endswith("passes these tests:\nassert add(1, 2) == 3\n")
    assert task["process_results"](document, ["def add(a, b): return a + b"]) == {"pass_at_1": 1.0}
    assert task["process_results"](document, ["def add(a, b): return a"]) == {"pass_at_1": 0.0}
    scores = benchmark([Contender("base", base)], {"program": task}, tmp_path / "out")["base"]["program"]
    assert scores.main[0] == scores.figures["pass_at_1,none"] == 0.0


def test_a_task_of_lm_eval_that_runs_code_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("Attempted to run task: humaneval which is marked as unsafe. Set confirm_run_unsafe_code=True")

    monkeypatch.setattr("lm_eval.simple_evaluate", refuse)
    with pytest.raises(UpcycleError, match=r"task humaneval would run code that the model writes.*--allow-code"):
        benchmark([Contender("base", base)], {"humaneval": "humaneval"}, tmp_path)


def test_names_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    check_names(["arc_easy"])
    for name, message in (("arc_esy", "no task arc_esy; similar names: .*arc_easy"), ("mmlu", "mmlu is a group")):
        with pytest.raises(UpcycleError, match=message):
            choose_tasks([name], None, False)
    row = {"prompt": "p", "test_list": ["assert f()"]}
    (tmp_path / "program.jsonl").write_text(json.dumps(row))
    with pytest.raises(UpcycleError, match=r"no task is left of .*; --allow-code permits that"):
        choose_tasks([], tmp_path, False)
    with pytest.raises(UpcycleError, match=r"--task-folder .*gone is no folder; expected one with"):
        choose_tasks([], tmp_path / "gone", False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UpcycleError, match=r"--task-folder .*empty has no \*\.jsonl files"):
        choose_tasks([], tmp_path / "empty", False)
    shutil.copy(tmp_path / "program.jsonl", tmp_path / "program.jsonl.gz")
    with pytest.raises(UpcycleError, match="every task needs its own name"):
        read_tasks(tmp_path)


@pytest.mark.parametrize(
    ("answers", "said", "target", "right"),
    [
        (["x+1", "yes"], "x-1", "x+1", 0),
        (["-5 m", "yes"], "5 m", "-5 m", 0),
        (["3.5 km", "yes"], "35 km", "3.5 km", 0),
        (["1/2", "3/4"], "12", "1/2", 0),
        (["42", "7 "], "The answer is 42", "42", 1),
        (["Rome", "well-known"], "rome.", "Rome", 1),
    ],
)
def test_punctuation_counts_where_it_makes_another_answer(
    answers: list[str], said: str, target: str, right: int
) -> None:
    from lm_eval.api.metrics import exact_match_hf_evaluate

    task = task_of("x", [{"prompt": "p", "answer": answer} for answer in answers])
    how = {k: v for k, v in task["metric_list"][0].items() if k not in ("metric", "aggregation", "higher_is_better")}
    picked = task["filter_list"][0]["filter"][0]
    found = re.findall(picked["regex_pattern"], said)[picked.get("group_select", 0)]
    assert exact_match_hf_evaluate([found], [target], **how)["exact_match"] == right


def test_a_run_s_template_is_that_of_a_base_without_one(
    base: Path, checkpoints: list[Path], folder: Path, tmp_path: Path
) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    tasks, template = read_tasks(folder, ["choose"]), (base / "chat_template.jinja").read_text()
    asked = benchmark([Contender("x", bare, chat_template=template)], tasks, tmp_path / "out")
    assert asked == benchmark([Contender("x", base)], tasks, tmp_path / "other")


def test_a_task_of_which_less_is_better_is_refused() -> None:
    _check_share("arc", {"acc": True, "acc_norm": True})
    _check_share("mixed", {"acc": True, "perplexity": False})
    with pytest.raises(UpcycleError, match="wikitext is scored by word_perplexity, of which less is better"):
        _check_share("wikitext", {"word_perplexity": False})


def test_questions_that_are_cut_are_counted(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "x" * length, "answer": "a"} for length in (5, 500, 600)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    benchmark([Contender("base", base)], read_tasks(tmp_path), tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"2 of 3 questions have more than \d+ tokens, which is what the context leaves for them", said)


def test_a_moe_has_its_routing_on_each_benchmark(
    base: Path, checkpoints: list[Path], folder: Path, tmp_path: Path
) -> None:
    moe = assembled(base, checkpoints, tmp_path / "moe")
    scores = benchmark([Contender("moe", moe), Contender("base", base)], read_tasks(folder), tmp_path / "out")
    assert all(found.expert_share is None for found in scores["base"].values())
    for task, ask in (("choose", "Question: spell {}\nAnswer:"), ("say", "copy {}")):
        found = torch.tensor(scores["moe"][task].expert_share)
        assert found.shape == (2, 3)
        tokenizer, model, counts = load_tokenizer(base, None), load_model(moe, torch.float32), torch.zeros(2, 3)
        for word in "abcdef" if task == "choose" else "abcd":
            chat = [{"role": "user", "content": ask.format(word)}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            with RouterRecorder(model) as recorder, torch.no_grad():
                model(torch.tensor([ids]))
            for layer, indices in enumerate(recorder.indices):
                counts[layer] += torch.bincount(indices.flatten(), minlength=3)
        assert torch.allclose(found, counts / counts.sum(dim=1, keepdim=True), atol=1e-6)


def test_a_single_run_has_a_place_for_its_scores(base: Path) -> None:
    with pytest.raises(UpcycleError, match="--out is needed"):
        own_folder([str(base)])


def test_a_gap_in_the_question_stands_for_the_choice(tmp_path: Path) -> None:
    row = {"question": "I took the _ because it rained.", "choices": ["umbrella", "sun"], "answer": 0}
    (tmp_path / "gap.jsonl").write_text(json.dumps(row))
    (document,) = read_tasks(tmp_path)["gap"]["custom_dataset"]()["test"]
    assert document["text"] == "I took the"
    assert document["choices"] == ["umbrella because it rained.", "sun because it rained."]


def test_one_row_has_no_standard_error() -> None:
    def scores(error: float) -> TaskScores:
        return TaskScores.model_validate({"rows": 1, "acc,none": 0.5, "acc_stderr,none": error})

    assert score_table({"base": {"t": scores(math.nan)}})[1] == [["base", "50.0%", "50.0%*"]]
    assert score_table({"base": {"t": scores(0.1)}})[1] == [["base", "50.0%", "50.0% +- 10.0%*"]]


@pytest.mark.parametrize("quiet", [True, False])
def test_bars_of_lm_eval_are_silent_if_asked(
    quiet: bool, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.api.instance import Instance

    monkeypatch.setattr("upcycle.console._progress_shown", not quiet)
    asked = asked_model(load_model(base, torch.float32), load_tokenizer(base, None), 64)
    capfd.readouterr()
    asked.loglikelihood([Instance("loglikelihood", {}, ("say it", " a"), 0)])
    asked.generate_until([Instance("generate_until", {}, ("say it", {"until": ["a"], "max_gen_toks": 2}), 0)])
    said = capfd.readouterr().err
    assert ("Running generate_until" in said) is ("Running loglikelihood" in said) is not quiet


@pytest.mark.parametrize(
    ("question", "text", "first"),
    [
        ("He took the _ home.", "He took the", "cat home."),
        ("The _'s owner", "The", "cat's owner"),
        ("What is os.path_exists?", "Question: What is os.path_exists?\nAnswer:", "cat"),
        ("Find c in Z_3", "Question: Find c in Z_3\nAnswer:", "cat"),
        ("It is ___.", "Question: It is ___.\nAnswer:", "cat"),
        ("The _ and the _", "Question: The _ and the _\nAnswer:", "cat"),
        ("The _ of x_1", "The", "cat of x_1"),
    ],
)
def test_a_gap_is_one_underscore_that_stands_alone(question: str, text: str, first: str) -> None:
    made = DOCUMENTS["choice"]({"question": question, "choices": ["cat", "dog"], "answer": 0})
    assert (made["text"], made["choices"][0]) == (text, first)


@pytest.mark.parametrize(
    ("targets", "ignored"),
    [
        (["Paris", "Rome."], True),
        (["+", "-"], False),
        (["C++", "C#"], False),
        (["yes", "no"], True),
        (["1/2", "12"], False),
    ],
)
def test_punctuation_counts_where_answers_are_alike_without_it(targets: list[str], ignored: bool) -> None:
    task = task_of("t", [{"prompt": f"q{i}", "answer": target} for i, target in enumerate(targets)])
    assert task["metric_list"][0]["ignore_punctuation"] is ignored


def test_answers_of_several_lines_are_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": "a", "answer": "b\nc"}, {"prompt": "a", "answer": ["b\nc", "d\n"]}]
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_rows(path) == lines[1:]
    assert "the `answer` of 1 row has several lines" in " ".join(capsys.readouterr().out.split())
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(
        UpcycleError, match=r"task\.jsonl: the `answer` of 1 row has several lines, .*give short answers"
    ):
        read_rows(path)
