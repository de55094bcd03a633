"""Encoded once: the same in one process and in several, whole or not at all, and read as views."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from upcycle.data import encoding
from upcycle.data.cache import cache_folder, cached
from upcycle.data.chat import encode
from upcycle.data.encoding import cut, encoded
from upcycle.data.rows import Rows, open_rows
from upcycle.data.samples import Encoded, Samples, by_domain, dataset, domains, lengths, num_answer_tokens
from upcycle.data.splits import load_splits
from upcycle.errors import UpcycleError
from upcycle.recipe import parse_recipe
from upcycle.settings import Source
from upcycle.types import Tokenizer
from upcycle.weights.base import load_tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UPCYCLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def tokenizer(base: Path) -> Any:
    return load_tokenizer(base, None)


def chats(path: Path, count: int) -> Rows:
    """Of various lengths, some without an answer."""
    with path.open("w") as file:
        for n in range(count):
            messages = [{"role": "user", "content": f"q{n} " + "x" * (n % 37)}]
            if n % 10:
                messages.append({"role": "assistant", "content": f"a{n}"})
            file.write(json.dumps({"messages": messages, "domain": "ab"[n % 2]}) + "\n")
    return open_rows([Source(path=str(path))])


def samples_of(rows: Rows, paths: list[Path]) -> list[Any]:
    table = Encoded(rows, tuple(paths))
    return [table.sample(place) for place in range(table.table.num_rows)]


def test_several_processes_encode_what_one_does(
    cache: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chats(tmp_path / "rows.jsonl", 200)
    alone = samples_of(rows, encoded(rows, None, tokenizer, "all", None))
    expected = [encode(row, tokenizer) for row in rows.take(range(200)) if row.has_answer]
    assert alone == expected
    monkeypatch.setattr(encoding, "ALONE", 50)
    monkeypatch.setattr(encoding, "_cores", lambda: 3)
    monkeypatch.setattr(encoding, "FORMAT", -1)  # another key
    paths = encoded(rows, None, tokenizer, "all", None)
    assert [path.name for path in paths] == [f"tokens-{part:03}.arrow" for part in range(3)]
    assert samples_of(rows, paths) == expected


def test_what_is_encoded_is_not_encoded_again(
    cache: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chats(tmp_path / "rows.jsonl", 20)
    calls = []
    write = encoding._write
    monkeypatch.setattr(encoding, "_write", lambda *words: calls.append(1) or write(*words))
    first = encoded(rows, None, tokenizer, "all", None)
    assert encoded(rows, None, tokenizer, "all", None) == first
    assert len(calls) == 1
    for other in (([1, 2], "all", None), (None, "last", None), (None, "all", 9)):
        encoded(rows, other[0], tokenizer, other[1], other[2])  # type: ignore[arg-type]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    encoded(rows, None, tokenizer, "all", None)
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("a1", "b1"))
    encoded(open_rows([Source(path=str(tmp_path / "rows.jsonl"))]), None, tokenizer, "all", None)
    assert len(calls) == 6


def test_an_error_of_a_process_is_said_and_nothing_is_kept(
    cache: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = chats(tmp_path / "rows.jsonl", 60)
    monkeypatch.setattr(encoding, "ALONE", 10)
    monkeypatch.setattr(encoding, "_cores", lambda: 2)
    tokenizer.chat_template = "{{ raise_exception('no chats today') }}"
    before = set(cache.iterdir())
    with pytest.raises(UpcycleError, match="no chats today"):
        encoded(rows, None, tokenizer, "all", None)
    assert set(cache.iterdir()) == before


def test_rows_that_the_template_refuses_are_counted_as_those_that_cannot_be_read(
    cache: Path, tiny_recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = Path(tiny_recipe["data"]["train"]).read_text().splitlines()
    first = json.loads(lines[7])
    lines[7] = json.dumps({"messages": [{"role": "system", "content": "Be brief."}, *first["messages"]]})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = str(load_tokenizer(Path(tiny_recipe["base"]), None).chat_template)
    tiny_recipe["data"] |= {"train": str(tmp_path / "rows.jsonl")}

    def kept(max_bad: float) -> int:
        values = {**tiny_recipe, "data": {**tiny_recipe["data"], "max_bad": max_bad}}
        tokenizer = load_tokenizer(Path(tiny_recipe["base"]), refusing + template)
        splits = load_splits(parse_recipe(values, "test"), tokenizer, 128)
        return sum(map(len, (splits.train, splits.seed.fit, splits.seed.test, splits.validation)))

    said = r"rows\.jsonl:8: the chat template cannot render this chat: no system; 1 of \d+ \w+ rows \(\S+%\) cannot"
    with pytest.raises(UpcycleError, match=said):
        kept(0)
    assert kept(0.5) == len(lines) - 1
    assert "that cannot be encoded (first: " in capsys.readouterr().out


def test_a_killed_encoding_leaves_nothing_that_is_used(cache: Path, tmp_path: Path) -> None:
    code = (
        "import time; from upcycle.data.cache import cached\n"
        "def make(out):\n    (out / 'half').write_text('x'); print('begun', flush=True); time.sleep(60)\n"
        "cached('key', make)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
    assert not (cache / "key").exists()
    folder = cached("key", lambda out: (out / "whole").write_text("y") and None)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    assert [path.name for path in cache.iterdir()] == ["key"]  # what the killed one left is gone


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UPCYCLE_CACHE", str(tmp_path / "file"))
    assert cache_folder() == tmp_path / "file"
    folder = cached("key", lambda out: (out / "made").write_text("y") and None)
    assert (folder / "made").is_file()
    assert "$UPCYCLE_CACHE names another folder" in " ".join(capsys.readouterr().out.split())


def test_samples_on_disk_are_those_in_memory(cache: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = chats(tmp_path / "rows.jsonl", 40)
    table = Encoded(rows, tuple(encoded(rows, None, tokenizer, "all", None)))
    import numpy as np

    disk = Samples(table, np.array([5, 3, 3, 30]))
    memory = list(disk)
    assert disk[1] == memory[1] == disk[2]
    assert list(disk[1:3]) == memory[1:3]
    assert lengths(disk) == lengths(memory)
    assert num_answer_tokens(disk) == num_answer_tokens(memory)
    assert domains(disk) == domains(memory)
    assert {d: list(part) for d, part in by_domain(disk).items()} == by_domain(memory)
    names = ["input_ids", "labels"]
    assert dataset(disk, names).to_list() == dataset(memory, names).to_list()


@pytest.mark.parametrize("too_long", ["leave_out", "truncate", "refuse"])
def test_long_rows(too_long: str, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(Path(tiny_recipe["data"]["train"]).read_text() + json.dumps(row) + "\n")
    data = {**tiny_recipe["data"], "train": str(path), "too_long": too_long, "validation_fraction": 0.001}
    recipe = parse_recipe({**tiny_recipe, "data": data}, "test")
    tokenizer = load_tokenizer(Path(tiny_recipe["base"]), None)
    if too_long == "refuse":
        with pytest.raises(
            UpcycleError, match=r"1 training row is longer than 64 tokens \(the longest: .*rows.jsonl:97"
        ):
            load_splits(recipe, tokenizer, 128)
        return
    splits = load_splits(recipe, tokenizer, 128)
    found = [s for part in (splits.train, splits.seed.fit, splits.seed.test) for s in part if "xxx" in s.question]
    assert len(found) == (too_long == "truncate")
    for sample in found:
        assert len(sample.input_ids) == 64
        assert tokenizer.decode(sample.input_ids[sample.answer_start :]).startswith("y<|im_end|>")
        assert sample == cut(encode(next(r for r in open_rows([Source(path=str(path))]).take([96])), tokenizer), 64)
