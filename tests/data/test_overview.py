"""What is said of data before anything is trained, and questions that are held out elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from upcycle.cli import app
from upcycle.data.overlap import Alike, questions_of
from upcycle.data.splits import load_splits
from upcycle.errors import UpcycleError
from upcycle.recipe import parse_recipe
from upcycle.weights.base import load_tokenizer


def test_the_verb_says_what_data_hold(base: Path, rows: Path, tmp_path: Path) -> None:
    page = tmp_path / "data.html"
    words = ["data", str(rows), "--base", str(base), "--html", str(page), "data.max_length=64"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    flat = " ".join(said.output.split())
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert f"{len(lines)} rows (messages format)" in flat
    assert all(f" {row['domain']} " in flat for row in lines)
    assert "tokens an epoch, of which" in flat
    answers = [row["messages"][-1]["content"] for row in lines]
    assert sum(f"»{answer}<|im_end|>«" in said.output for answer in set(answers)) >= 1
    assert "learned between » and «" in flat
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_a_place_is_said_as_it_is() -> None:
    """`:train:` is no name of a picture."""
    said = CliRunner().invoke(app, ["data", "builtin:train", "--base", "builtin:tiny"])
    assert "builtin:train:" in said.output


def test_the_verb_names_what_is_wrong(base: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    said = CliRunner().invoke(app, ["data", str(tmp_path / "rows.jsonl"), "--base", str(base)])
    assert isinstance(said.exception, UpcycleError)
    assert "rows.jsonl:1: holds 'text'" in str(said.exception)


LONG = "Tell me, if you can, which of the many rivers of the old world is the longest one?"


@pytest.mark.parametrize(
    ("question", "alike"),
    [
        (LONG, True),
        (f"Please! {LONG.upper()} Thanks.", True),
        (LONG.replace("many", "few"), False),  # no thirteen words in a row are left
        ("What is 2+2?", True),
        ("what is 2 2", True),
        ("What is 2+3?", False),
        ("Well, what is 2+2? And " + "why? " * 20, False),  # too short to be looked for
        ("Tell me quickly, in a word: what is the capital of France? " + "Thanks. " * 9, True),
        ("What is the capital of French Guiana? " + "Thanks. " * 9, False),
        ("你好。请用一句话解释什么是机器学习。谢谢", True),
        ("你好。请用一句话解释什么是机器。谢谢", False),
        ("请根据以下内容回答下列问题。狗是什么", False),  # a preamble that many share
    ],
)
def test_questions_are_alike_by_thirteen_words_or_all_of_fewer(question: str, alike: bool) -> None:
    held_out = [LONG, "What is 2+2?", "What is the capital of France?"]
    held_out += ["请用一句话解释什么是机器学习", "请根据以下内容回答下列问题。天空为什么是蓝的", "请你写一首诗"]
    assert (question in Alike(held_out)) is alike


def test_benchmarks_questions_are_left_out_of_training(
    tiny_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in Path(tiny_recipe["data"]["train"]).read_text().splitlines()]
    asked = [row["messages"][0]["content"] for row in lines]
    held_out = [{"question": asked[0]}, {"prompt": f"  {asked[1].upper()}!"}, {"messages": lines[2]["messages"]}]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    assert questions_of([str(tmp_path / "bench.jsonl")])[0] == asked[0]

    def seen(how: str) -> set[str]:
        data = {**tiny_recipe["data"], "decontaminate": how, "decontaminate_with": [str(tmp_path / "bench.jsonl")]}
        recipe = parse_recipe({**tiny_recipe, "data": data, "route": {"min_samples_per_expert": 1}}, "test")
        splits = load_splits(recipe, load_tokenizer(Path(tiny_recipe["base"]), None), 128)
        return {sample.question for part in (splits.train, splits.seed.fit, splits.seed.test) for sample in part}

    exact, near = seen("exact"), seen("ngram")
    assert not exact & {asked[0], asked[2]}
    assert not near & set(asked[:3])
    assert near <= exact
    assert "left out 1 training row whose question is in" in capsys.readouterr().out
    (tmp_path / "bench.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(UpcycleError, match=r"bench\.jsonl:1: .*of a benchmark, one of question, prompt"):
        seen("exact")


def test_a_file_may_be_called_data(base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no setting `data.jsonl`."""
    (tmp_path / "data.jsonl").write_text(rows.read_text())
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["data", "data.jsonl", "--base", str(base)])
    assert "data.jsonl: " in said.output
    assert said.exit_code == 0
    said = CliRunner().invoke(app, ["data", "data.jsonl", "--base", str(base), "data.train=gone.jsonl"])
    assert "data.train= is given by the sources" in str(said.exception)


def test_rows_without_a_domain_are_not_called_all(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q {i}", "completion": "a", "domain": "x" if i % 3 else None} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = CliRunner().invoke(app, ["data", str(tmp_path / "rows.jsonl"), "--base", str(base)]).output
    assert [line.split()[0] for line in said.splitlines() if line.startswith((" all", " x", " (no"))] == [
        "(no",
        "x",
        "all",
    ]


def test_held_out_questions_of_an_empty_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(UpcycleError, match=r"data\.decontaminate_with: .*none\.jsonl has no rows"):
        questions_of([str(tmp_path / "none.jsonl")])
