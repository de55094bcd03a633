"""Who sees which sample."""

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from upcycle.data.overlap import as_seen
from upcycle.data.splits import Splits, load_splits
from upcycle.errors import UpcycleError
from upcycle.recipe import parse_recipe
from upcycle.weights.base import load_tokenizer


def split(values: dict[str, Any], **changes: Any) -> Splits:
    for key, value in changes.items():
        section, _, field = key.partition("__")
        values = {**values, section: {**values[section], field: value}}
    recipe = parse_recipe(values, "test")
    return load_splits(recipe, load_tokenizer(Path(values["base"]), None), 128)


def questions(samples: list) -> set[str]:
    return {s.question for s in samples}


def test_held_out_parts_share_no_question(tiny_recipe: dict[str, Any]) -> None:
    splits = split(tiny_recipe)
    parts = [questions(p) for p in (splits.train, splits.seed.fit, splits.seed.test, splits.validation)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 96
    assert len(splits.seed.fit) == 12  # 3 per expert is more than 1%
    assert len(splits.seed.test) == 5  # 30% of the seed data


def test_seed_data_may_stay_in_the_training_set(tiny_recipe: dict[str, Any]) -> None:
    splits = split(tiny_recipe, route__seed_from="train")
    assert questions(splits.seed.fit) < questions(splits.train)


def test_repeated_questions_stay_on_one_side(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    lines = Path(tiny_recipe["data"]["train"]).read_text().splitlines()
    path = tmp_path / "twice.jsonl"
    path.write_text("\n".join(lines + lines) + "\n")
    splits = split(tiny_recipe, data__train=str(path))
    parts = [questions(p) for p in (splits.train, splits.seed.fit, splits.seed.test, splits.validation)]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_questions_that_look_equal_stay_on_one_side(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """With other white space at the ends of lines, other line ends, or accents in two characters."""
    variants = [str, "{} ".format, "\n{}".format, lambda text: text.replace("\n", " \r\n"), partial(normalize, "NFD")]

    def written(name: str, some: Sequence[Callable[[str], str]]) -> str:
        asked = [variant(f"is it é {i}\nor not") for i in range(60) for variant in some]
        random.Random(0).shuffle(asked)
        rows = (json.dumps({"prompt": text, "completion": "no"}) for text in asked)
        (tmp_path / name).write_text("\n".join(rows))
        return str(tmp_path / name)

    splits = split(tiny_recipe, data__train=written("all.jsonl", variants))
    parts = (splits.train, splits.seed.fit, splits.seed.test, splits.validation)
    seen = [{as_seen(sample.question) for sample in part} for part in parts]
    assert sum(map(len, parts)) == 300
    assert sum(map(len, seen)) == len(set.union(*seen)) == 60
    with pytest.raises(UpcycleError, match="no training row is left"):
        split(
            tiny_recipe,
            data__train=written("train.jsonl", variants[1:]),
            data__validation=written("held_out.jsonl", variants[:1]),
        )


def test_training_rows_asked_in_the_validation_file_are_left_out(
    tiny_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny_recipe["data"]["train"]
    with pytest.raises(UpcycleError, match="no training row is left"):
        split(tiny_recipe, data__validation=file)
    assert "left out 96 training rows whose question is in the validation data" in capsys.readouterr().out


def test_smaller_fractions_are_nested(tiny_recipe: dict[str, Any]) -> None:
    changes = {"route__min_samples_per_expert": 1, "route__test_fraction": 0.0, "route__seed_from": "train"}
    small, large = (questions(split(tiny_recipe, data__fraction=f, **changes).train) for f in (0.3, 0.6))
    assert small < large


def test_rows_left_out_are_counted(
    tiny_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "more.jsonl"
    silent = {"messages": [{"role": "user", "content": "anyone?"}]}
    long = {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]}
    original = Path(tiny_recipe["data"]["train"]).read_text()
    path.write_text(original + "".join(json.dumps(row) + "\n" for row in (silent, long)))
    split(tiny_recipe, data__train=str(path), data__validation_fraction=0.001)
    printed = capsys.readouterr().out
    assert "left out 1 training row with no assistant turn" in printed
    assert "left out 1 training row longer than 64 tokens" in printed


def test_more_seed_data_than_half_the_rows_is_refused(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(UpcycleError, match=r"asks for 80 \+ 34 seed rows .*, more than half .*") as refused:
        split(tiny_recipe, route__min_samples_per_expert=20)
    found = re.search(r"set route\.min_samples_per_expert=(\d+) \(now 20\)", str(refused.value))
    assert found
    split(tiny_recipe, route__min_samples_per_expert=int(found[1]))
    with pytest.raises(UpcycleError, match="more than half"):
        split(tiny_recipe, route__min_samples_per_expert=int(found[1]) + 1)


def test_rows_with_one_question_are_refused_as_what_they_are(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    values = [{"instruction": f"b {i}", "output": "c", "history": [["a", "hi"]]} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, values)))
    said = "9 rows with 1 question (everything before the first answer, such as 'a'): held out for the evaluation"
    with pytest.raises(UpcycleError, match=re.escape(said)):
        split(tiny_recipe, data__train=str(tmp_path / "rows.jsonl"), data__validation=None)
    values = [{"instruction": "write a number", "output": str(i)} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, values)))
    said = r"80 rows with 1 question \(.*'write a number'\): held out to start the router, nothing is left to train on"
    (tmp_path / "other.jsonl").write_text(json.dumps({"instruction": "write a word", "output": "a"}))
    given = {"data__train": str(tmp_path / "rows.jsonl"), "data__validation": str(tmp_path / "other.jsonl")}
    with pytest.raises(UpcycleError, match=said):
        split(tiny_recipe, **given)
    kept = split(tiny_recipe, **given, route__seed_from="train")
    assert len(kept.train) == 80


def test_a_token_that_the_model_has_no_embedding_for_is_named(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Special tokens added, and the embeddings not resized; a token that no row has does not matter."""
    tokenizer = load_tokenizer(Path(tiny_recipe["base"]), None)
    known = len(tokenizer)
    tokenizer.add_tokens(["<never>", "<turn>"])
    recipe = parse_recipe(tiny_recipe, "test")
    load_splits(recipe, tokenizer, 128, known)
    tokenizer.chat_template = str(tokenizer.chat_template) + "<turn>"
    with pytest.raises(
        UpcycleError, match=rf"jsonl:\d+: its token '<turn>' has the id {known + 1}, but the model knows"
    ):
        load_splits(recipe, tokenizer, 128, known)
    load_splits(recipe, tokenizer, 128, known + 2)


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    kept = {key: value for key, value in settings.items() if key not in ("pad_token", "eos_token")}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(kept))
    with pytest.raises(UpcycleError, match="base has neither a padding nor an end token"):
        load_tokenizer(tmp_path / "base", None)
