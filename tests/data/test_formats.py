"""Rows in every format come out as the plain ones do."""

import bz2
import csv
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset, DatasetDict, logging

from upcycle.data.formats import called, to_row
from upcycle.data.sources import hash_sources
from upcycle.errors import UpcycleError
from upcycle.settings import DataSettings, Source
from worlds import rows_of

CHATS = [
    {"system": None, "pairs": [("What is 2+2?", "4")], "domain": "math"},
    {"system": "Be brief.", "pairs": [("Say hi", "hi"), ("Again", "hi, 007")], "domain": "talk"},
    {"system": None, "pairs": [('Zeile\nzwei, "quoted"', "äöü; 12")], "domain": "math"},
]


def chat(spec: dict[str, Any]) -> list[dict[str, str]]:
    start = [{"role": "system", "content": spec["system"]}] if spec["system"] else []
    return start + [
        {"role": role, "content": text}
        for pair in spec["pairs"]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def plain(spec: dict[str, Any]) -> dict[str, Any]:
    return {"messages": chat(spec), "domain": spec["domain"]}


def in_parts(spec: dict[str, Any]) -> dict[str, Any]:
    messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat(spec)]
    return {"messages": messages, "domain": spec["domain"]}


def sharegpt(spec: dict[str, Any]) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in chat(spec)]
    return {"conversations": turns, "domain": spec["domain"]}


def sharegpt_with_system(spec: dict[str, Any]) -> dict[str, Any]:
    turns = [t for t in sharegpt(spec)["conversations"] if t["from"] != "system"]
    return {"conversations": turns, "system": spec["system"], "domain": spec["domain"]}


def alpaca(spec: dict[str, Any]) -> dict[str, Any]:
    *history, (instruction, output) = spec["pairs"]
    first, _, rest = instruction.partition("\n")
    return {
        "instruction": first,
        "input": rest,
        "output": output,
        "history": [list(pair) for pair in history],
        "system": spec["system"],
        "domain": spec["domain"],
    }


def prompt_completion(spec: dict[str, Any]) -> dict[str, Any]:
    *prompt, answer = chat(spec)
    return {"prompt": prompt, "completion": [answer], "domain": spec["domain"]}


SPELLINGS = [plain, in_parts, sharegpt, sharegpt_with_system, alpaca, prompt_completion]


def expected() -> list[tuple[Any, str]]:
    return [(tuple(chat(spec)), spec["domain"]) for spec in CHATS]


def found(path: str | Path, **settings: Any) -> list[tuple[Any, str]]:
    return [(row.messages, row.domain) for row in rows_of(path, **settings)]


def jsonl(values: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.mark.parametrize("spell", SPELLINGS)
def test_every_format_is_the_same_chat(spell: Callable[[Any], dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl([spell(spec) for spec in CHATS]))
    assert found(path) == expected()


@pytest.mark.parametrize("spell", SPELLINGS)
@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_every_format_in_a_table(spell: Callable[[Any], dict[str, Any]], kind: str, tmp_path: Path) -> None:
    """Whose columns fill in nulls."""
    rows = Dataset.from_list([spell(spec) for spec in CHATS])
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        rows.to_parquet(path)
    elif kind == "saved":
        rows.save_to_disk(path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.data.table.schema) as writer:
            writer.write_table(rows.data.table)
    before = logging.get_verbosity()
    assert found(path) == expected()
    assert logging.get_verbosity() == before


@pytest.mark.parametrize("spell", [plain, sharegpt, alpaca, prompt_completion])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_csv_cells_are_text_and_lists_json(
    spell: Callable[[Any], dict[str, Any]], delimiter: str, tmp_path: Path
) -> None:
    values = [spell(spec) for spec in CHATS]
    path = tmp_path / ("rows.csv" if delimiter == "," else "rows.tsv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(values[0]), delimiter=delimiter)
        writer.writeheader()
        cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in value.items()} for value in values]
        writer.writerows(cells)
    assert found(path) == expected()


def test_a_number_in_a_csv_cell_stays_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("instruction,output\nagent?,007\nyear?,1.50\n")
    assert [row.messages[1]["content"] for row in rows_of(tmp_path / "rows.csv")] == ["007", "1.50"]


@pytest.mark.parametrize(
    ("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress), ("", bytes)]
)
def test_packed_files_are_read_like_plain_ones(suffix: str, pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(jsonl([plain(spec) for spec in CHATS]).encode()))
    assert found(path) == expected()


def test_zst_is_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(jsonl([plain(spec) for spec in CHATS]).encode()))
    assert found(tmp_path / "rows.jsonl.zst") == expected()


def test_json_may_be_a_list_or_lines(tmp_path: Path) -> None:
    values = [plain(spec) for spec in CHATS]
    (tmp_path / "list.json").write_text("\n " + json.dumps(values, indent=1))
    (tmp_path / "lines.json").write_text(jsonl(values))
    assert found(tmp_path / "list.json") == found(tmp_path / "lines.json") == expected()


def test_folders_patterns_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, spec in enumerate(CHATS):
        (tmp_path / f"part-{number}.jsonl").write_text(jsonl([plain(spec)]))
    (tmp_path / "README.md").write_text("no rows")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = [str(tmp_path), f"{tmp_path}/*.jsonl", "~/part-*.jsonl", "part-[0-9].jsonl"]
    assert all(found(name) == expected() for name in names)
    assert len({hash_sources([Source(path=name)]) for name in names}) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(UpcycleError, match=r"no readable file in the folder .*; expected \.jsonl"):
        found(tmp_path / "empty")
    with pytest.raises(UpcycleError, match=r"no readable file for the pattern gone-\*\.jsonl"):
        found("gone-*.jsonl")


def test_a_split_of_a_saved_dataset_is_named(tmp_path: Path) -> None:
    rows = Dataset.from_list([plain(spec) for spec in CHATS])
    DatasetDict({"train": rows, "rest": rows.select([0])}).save_to_disk(tmp_path / "both")
    assert found(tmp_path / "both") == expected()
    assert found(f"{tmp_path / 'both'}[rest]") == expected()[:1]
    with pytest.raises(UpcycleError, match="has no split tset; it has rest, train"):
        found(f"{tmp_path / 'both'}[tset]")
    DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "odd")
    with pytest.raises(UpcycleError, match=r"has the splits a, b; name one: .*odd\[a\]"):
        found(tmp_path / "odd")


def test_columns_domain_and_weight_of_a_source(tmp_path: Path) -> None:
    values = [{"q": f"question {i}", "a": "yes", "topic": i % 2} for i in range(200)]
    path = tmp_path / "qa.jsonl"
    path.write_text(jsonl(values))
    columns = {"instruction": "q", "output": "a", "domain": "topic"}
    assert [row.domain for row in rows_of(path, columns=columns)][:3] == ["0", "1", "0"]
    assert {row.domain for row in rows_of(path, columns=columns, domain="{file}")} == {"qa"}
    assert len(rows_of(path, columns=columns, weight=2)) == 400
    half, more = ({row.where for row in rows_of(path, columns=columns, weight=w)} for w in (0.5, 0.7))
    assert half < more
    assert 70 < len(half) < 130
    with pytest.raises(UpcycleError, match=r"found fields \['a', 'q', 'topic'\]"):
        rows_of(path)


def test_how_a_source_is_read_is_part_of_its_hash(tmp_path: Path) -> None:
    """What is made of other rows is made again."""
    (tmp_path / "d").mkdir()
    for name in ("math", "text"):
        (tmp_path / "d" / f"{name}.jsonl").write_text(jsonl([{"instruction": name, "output": "a", "topic": "x"}]))

    def hashed(**settings: Any) -> str:
        return hash_sources([Source(path=str(tmp_path / "d"), **settings)])

    different = [{}, {"weight": 3}, {"domain": "a"}, {"domain": "{file}"}, {"columns": {"domain": "topic"}}]
    assert len({hashed(**settings) for settings in [*different, {"format": "alpaca"}]}) == 6
    plain, by_name = hashed(), hashed(domain="{file}")
    assert [row.domain for row in rows_of(tmp_path / "d", domain="{file}")] == ["math", "text"]
    (tmp_path / "d" / "math.jsonl").rename(tmp_path / "d" / "arithmetic.jsonl")
    assert hashed() == plain  # the same wherever the files lie
    assert hashed(domain="{file}") != by_name
    assert [row.domain for row in rows_of(tmp_path / "d", domain="{file}")] == ["arithmetic", "text"]


def test_columns_of_all_sources_are_for_those_that_have_none_of_their_own() -> None:
    data = DataSettings(train=["a.jsonl", Source(path="b", columns={"domain": "topic"})], columns={"instruction": "q"})
    assert [source.columns for source in data.sources(data.train)] == [{"instruction": "q"}, {"domain": "topic"}]


def test_what_was_found_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl([sharegpt(spec) for spec in CHATS]))
    rows_of(path)
    assert f"data: {path}: 3 rows (ShareGPT format), 2 domains" in " ".join(capsys.readouterr().out.split())


def test_developer_tools_and_calls(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "done", "name": None},
    ]
    schema = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "int", "enum": None}}}}
    row = to_row({"messages": messages, "tools": json.dumps([schema])}, "here:1")
    assert row.messages[2] == messages[2]
    assert "name" not in row.messages[4]
    assert row.tools[0]["function"]["parameters"] == {"x": {"type": "int"}}
    assert row.question == "u"


BAD = {
    '{"text": "a"}': "holds 'text', which does not say what is an answer",
    '{"mesages": []}': "did you mean 'messages'",
    '{"messages": []}': "found \\[\\]",
    '{"conversations": [{"from": "alien", "value": "x"}]}': "messages\\[0\\] is .*alien.*expected a 'role'",
    '{"instruction": "x", "output": 3}': "messages\\[1\\] is .*expected a 'role'",
    '{"prompt": "x", "completion": null}': "found fields \\['prompt'\\]",
    '{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}': "holds a part of type image",
    '{"messages": "none"}': "is not JSON|not JSON",
    '{"instruction": "x", "output": "y", "history": [["a"]]}': "expected pairs",
}


@pytest.mark.parametrize("line", BAD)
def test_an_unusable_row_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UpcycleError, match=rf"rows\.jsonl:1: .*({BAD[line]}).*1 of 1 row \(100.0%\) cannot be used"):
        rows_of(path)


def test_unusable_rows_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    bad = [{"text": "x"}, {"messages": [{"role": "bot", "content": "x"}]}, {"text": "y"}]
    path.write_text(jsonl([plain(CHATS[0])] * 7 + bad))
    with pytest.raises(UpcycleError) as caught:
        rows_of(path, max_bad=0.2)
    what_to_do = "but data.max_bad=0.2 allows 20.0%; mend them, or set data.max_bad=0.3 to leave them out"
    assert str(caught.value).endswith(f"; 3 of 10 rows (30.0%) cannot be used, {what_to_do}")
    assert f"2 holds 'text', which does not say what is an answer (first: {path}:8: " in str(caught.value)
    assert len(rows_of(path, max_bad=0.3)) == 7
    said = " ".join(capsys.readouterr().out.split())
    assert "left out 3 of 10 rows that cannot be used: 2 holds 'text'" in said
    assert "1 a message has no known role" in said


def test_lines_that_are_no_rows_are_counted_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl([plain(CHATS[0])] * 9) + "{broken\n")
    assert len(rows_of(path, max_bad=0.1)) == 9
    assert f"1 is not JSON (first: {path}:10: " in " ".join(capsys.readouterr().out.split())
    (tmp_path / "rows.csv").write_text("instruction,output\na,b\nc,d,e\n")
    assert len(rows_of(tmp_path / "rows.csv", max_bad=0.5)) == 1
    with pytest.raises(UpcycleError, match=r"rows\.csv:2: has more cells than .* columns; 1 of 2 rows \(50.0%\) "):
        rows_of(tmp_path / "rows.csv")


def test_mixed_formats_in_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl([plain(CHATS[0]), alpaca(CHATS[0])]))
    with pytest.raises(UpcycleError, match=r"rows\.jsonl:2: expected .*'messages' list, found fields"):
        rows_of(path)


PACK = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": zstandard.compress}


@pytest.mark.parametrize(
    "kind", [".parquet", ".arrow", *(f".{form}.{name}" for name in PACK for form in ("jsonl", "csv"))]
)
def test_a_truncated_file_is_named(kind: str, tmp_path: Path) -> None:
    rows, path = Dataset.from_list([plain(spec) for spec in CHATS * 50]), tmp_path / f"rows{kind}"
    if kind == ".parquet":
        pq.write_table(rows.data.table, path)
    elif kind == ".arrow":
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.data.table.schema) as writer:
            writer.write_table(rows.data.table)
    else:
        said = (
            jsonl(list(rows))
            if "jsonl" in kind
            else "prompt,completion\n" + "".join(f"{i},{i * i}\n" for i in range(3_000))
        )
        path.write_bytes(PACK[kind.rpartition(".")[2]](said.encode()))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UpcycleError, match=r"rows[.a-z0-9]* cannot be read as"):
        rows_of(path)


def test_zstd_with_a_wide_window_is_read(tmp_path: Path) -> None:
    """As `zstd --long` writes large files."""
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    (tmp_path / "rows.jsonl.zst").write_bytes(packed.compress(jsonl([plain(CHATS[0])]).encode()) + packed.flush())
    assert len(rows_of(tmp_path / "rows.jsonl.zst")) == 1


def test_zstd_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    said = random.Random(0).randbytes(400_000).hex()  # does not shrink: several blocks
    parts = [jsonl([{"prompt": str(i), "completion": said[4000 * i : 4000 * (i + 1)]}]) for i in range(200)]
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(
        b"".join(zstandard.compress(half.encode()) for half in ("".join(parts[:150]), "".join(parts[150:])))
    )
    assert [row.messages[1]["content"] for row in rows_of(path)] == [
        said[4000 * i : 4000 * (i + 1)] for i in range(200)
    ]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UpcycleError, match="the file ends before its zstd frame does"):
        rows_of(path)


def test_a_hub_dataset_has_a_configuration_and_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*words: Any, **named: Any) -> Dataset:
        asked.append((*words, named))
        return Dataset.from_list([plain(spec) for spec in CHATS])

    monkeypatch.setattr("datasets.load_dataset", load)
    assert found("owner/name") == expected()
    assert found("owner/some.name:main[test]") == expected()
    assert {words[:2] for words in asked} == {("owner/name", None), ("owner/some.name", "main")}
    assert {words[2]["split"] for words in asked} == {"train", "test"}


def test_a_row_of_ten_megabytes_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is left out as too long, like others."""
    path = tmp_path / "rows.jsonl"
    long = {**CHATS[0], "pairs": [("x " * 5_000_000, "y")]}
    path.write_text(jsonl([plain(CHATS[0]), plain(long)]))
    assert len(found(path)) == 2


def test_a_list_is_read_whatever_the_suffix_and_however_it_is_laid_out(tmp_path: Path) -> None:
    values = [plain(spec) for spec in CHATS]
    layouts = {
        "one.jsonl": json.dumps(values),
        "pretty.jsonl": json.dumps(values, indent=1),
        "late.json": " " * 100 + "\n" * 40 + json.dumps(values),
        "rows.txt": "[" + ",\n".join(map(json.dumps, values)) + "]",
    }
    for name, text in layouts.items():
        (tmp_path / name).write_text(text)
        assert found(tmp_path / name) == expected()
    (tmp_path / "row.json").write_text(json.dumps(values[0], indent=2))
    assert found(tmp_path / "row.json") == expected()[:1]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_says_in_its_first_line_what_separates_its_cells(delimiter: str, tmp_path: Path) -> None:
    lines = [("instruction", "output"), ("a, b?", "yes, c"), ("d?", "no")]
    (tmp_path / "rows.csv").write_text("\n".join(map(delimiter.join, lines)))
    assert [row.messages[1]["content"] for row in rows_of(tmp_path / "rows.csv")] == ["yes, c", "no"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            'instruction,output\na,b\nc,"d\ne,f\n',
            r"unexpected end of data, in the record that begins in line 3; is a quote",
        ),
        ("instruction,output,output\na,b,c\n", "has two columns 'output'; rename or remove one"),
    ],
)
def test_a_csv_that_would_lose_text_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UpcycleError, match=said):
        rows_of(tmp_path / "rows.csv")


def test_hidden_files_of_a_folder_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(jsonl([plain(spec) for spec in CHATS]))
    for name in ("._rows.jsonl", ".old.jsonl", "dataset_infos.json"):
        (tmp_path / name).write_text("{}")
    assert found(tmp_path) == found(f"{tmp_path}/*.jsonl") == expected()
    (tmp_path / "above" / "inner").mkdir(parents=True)
    with pytest.raises(
        UpcycleError, match=r"no readable file in the folder .*above \(found inner/\); .*\*\*/\*\.jsonl"
    ):
        found(tmp_path / "above")


def test_speakers_of_sharegpt_in_any_spelling(tmp_path: Path) -> None:
    turns = [
        [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}],
        [{"role": "human", "value": "a"}, {"role": "gpt", "value": "b"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    ]
    (tmp_path / "rows.jsonl").write_text(jsonl([{"conversations": some} for some in turns]))
    chats = {json.dumps(messages) for messages, _ in found(tmp_path / "rows.jsonl")}
    assert chats == {json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])}


def test_a_row_without_a_label_has_the_domain_all() -> None:
    for label in (None, "", float("nan")):
        assert to_row({"prompt": "a", "completion": "b", "domain": label}, "x").domain == "all"
    # not that of all rows together
    assert to_row({"prompt": "a", "completion": "b", "domain": "all"}, "x").domain == "all (domain)"


def test_a_column_that_no_row_has_is_said_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text(jsonl([{"question": "a", "answer": "b", "topic": "c"}]))
    with pytest.raises(
        UpcycleError, match=r"found fields \['answer', 'question', 'topic'\] \(data.columns calls 'comp"
    ):
        rows_of(path, columns={"prompt": "question", "completion": "anwser"})
    rows_of(path, columns={"prompt": "question", "completion": "answer", "domain": "topci", "input": "topic"})
    said = capsys.readouterr()
    assert "no row has the column 'topci', which data.columns takes for 'domain'; did you mean 'topic'?" in (
        said.out + said.err
    )
    assert "takes 'topic' for 'input', which the prompt and completion format has not" in said.out + said.err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "input": 3, "output": "b"}, "x: 'input' is 3, expected a text"),
        ({"instruction": 0, "output": "b"}, "x: 'instruction' is 0, expected a text"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"x: 'history' holds \['c'\], expected pairs"),
    ],
)
def test_alpaca_says_which_column_is_wrong(row: dict[str, Any], said: str) -> None:
    with pytest.raises(UpcycleError, match=said):
        to_row(row, "x")


@pytest.mark.parametrize(
    ("field", "value", "expects"),
    [("weight", 0.5, "0 or 1"), ("weight", "0", "0 or 1"), ("train", "false", "true or false"), ("train", 0, "true")],
)
def test_a_message_that_is_learned_in_part_is_refused(field: str, value: object, expects: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", field: value}]
    with pytest.raises(UpcycleError, match=rf"messages\[1\]\.{field} is .*, expected {expects}"):
        to_row({"messages": messages}, "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("äö".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (gzip.compress(b"{}", mtime=0), r"it is gzip; let its name end in \.gz"),
        ("é".encode("latin-1"), "save it as UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_named_with_what_to_do(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UpcycleError, match=rf"rows\.jsonl cannot be read as UTF-8 .*; {said}"):
        rows_of(tmp_path / "rows.jsonl")


def test_a_saved_dataset_without_its_tables_is_refused(tmp_path: Path) -> None:
    Dataset.from_list([plain(spec) for spec in CHATS]).save_to_disk(tmp_path / "saved")
    with pytest.raises(UpcycleError, match=r"has no split train; it is one table; leave the brackets out"):
        found(f"{tmp_path / 'saved'}[train]")
    for table in (tmp_path / "saved").glob("*.arrow"):
        table.unlink()
    with pytest.raises(UpcycleError, match=r"saved is a saved dataset without its \*\.arrow files"):
        hash_sources([Source(path=str(tmp_path / "saved"))])


def test_a_table_without_rows_says_so_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UpcycleError, match=r"none\.parquet: no rows"):
        rows_of(tmp_path / "none.parquet")
    (tmp_path / "no.parquet").write_text("text")
    with pytest.raises(UpcycleError, match=r"no\.parquet cannot be read as parquet"):
        rows_of(tmp_path / "no.parquet")
    assert "Failed" not in "".join(capfd.readouterr())


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]},
        ]
    }


F = {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    "turn",
    [
        {"content": None, "tool_calls": json.dumps([F])},
        {"content": None, "tool_calls": F},
        {"content": None, "tool_calls": [json.dumps(F)]},
        {"content": "", "function_call": F},
        {"content": None, "function_call": F | {"arguments": json.dumps(F["arguments"])}},
        {"content": None, "tool_calls": [], "function_call": json.dumps(F)},
    ],
)
def test_calls_are_read_however_they_are_spelt(turn: dict[str, Any]) -> None:
    row = to_row({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **turn}]}, "here:1")
    assert called(row.messages[1]) == [F]
    assert "function_call" not in row.messages[1]


def test_sharegpts_call_is_a_call_and_not_a_text() -> None:
    turns = [("human", "?"), ("function_call", json.dumps(F)), ("observation", "1"), ("gpt", "one")]
    row = to_row({"conversations": [{"from": by, "value": said} for by, said in turns]}, "here:1")
    assert [called(message) for message in row.messages] == [[], [F], [], []]
    assert row.messages[1]["content"] is None
    plain = to_row(
        {"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": "f(1)"}]}, "x"
    )
    assert plain.messages[1] == {"role": "assistant", "content": "f(1)"}


@pytest.mark.parametrize(
    "nothing",
    [
        {"tool_calls": "[]"},
        {"tool_calls": "null"},
        {"tool_calls": "{}"},
        {"tool_calls": ""},
        {"tool_calls": [{}]},
        {"tool_calls": [{"function": {"name": None, "arguments": None}}]},
        {"function_call": {"name": None, "arguments": None}},
    ],
)
def test_a_message_that_calls_nothing_is_read(nothing: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", **nothing}]
    assert to_row({"messages": turns}, "here:1").messages[1] == {"role": "assistant", "content": "!"}


def test_openais_former_fields_make_a_whole_chat() -> None:
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "parameters": {"x": 1}}},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "one", "tool_calls": [{"type": "function", "function": {"name": "g"}}]},
    ]
    row = to_row({"messages": turns}, "here:1")
    assert [called(message) for message in row.messages] == [[], [F], [], [{"name": "g", "arguments": {}}]]
    assert row.messages[2]["role"] == "tool"


@pytest.mark.parametrize(
    "chat",
    [
        {"messages": [{"role": "system", "content": "A"}, {"role": "user", "content": "?"}]},
        {"conversations": [{"from": "system", "value": "A"}, {"from": "human", "value": "?"}]},
        {"prompt": [{"role": "system", "content": "A"}, {"role": "user", "content": "?"}], "completion": "!"},
    ],
)
def test_a_system_message_that_is_there_twice_counts_once(chat: dict[str, Any]) -> None:
    said = [(m["role"], m["content"]) for m in to_row({**chat, "system": "A"}, "here:1").messages]
    assert said[:2] == [("system", "A"), ("user", "?")]
    with pytest.raises(UpcycleError, match="here:1: the chat has a system message, and the column 'system' another"):
        to_row({**chat, "system": "B"}, "here:1")


@pytest.mark.parametrize("given", ["f", {"arguments": {}}, [{"name": "", "arguments": {"x": 1}}], [1]])
def test_a_call_without_a_name_is_refused(given: Any) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": given}]
    with pytest.raises(UpcycleError, match=r"here:1: messages\[1\] calls .*, expected an object with a 'name'"):
        to_row({"messages": turns}, "here:1")


def test_a_system_column_stands_ahead_of_messages() -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    system = {"role": "system", "content": "Be brief."}
    for row in ({"messages": turns, "system": "Be brief."}, {"messages": [system, *turns], "system": "Be brief."}):
        assert to_row(row, "x").messages == (system, *turns)
    with pytest.raises(
        UpcycleError, match="here:1: the chat has a system message, and the column 'system' another; keep one"
    ):
        to_row({"messages": [system, *turns], "system": "Be long."}, "here:1")


def test_a_message_in_place_of_a_row_says_so() -> None:
    with pytest.raises(UpcycleError, match="here:1: is a message and not a row; a row has all messages of a chat"):
        to_row({"role": "user", "content": "?"}, "here:1")


def test_values_over_several_lines_are_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(plain(spec), indent=1) for spec in CHATS))
    with pytest.raises(UpcycleError, match=r"not JSON \(Extra data, .*; write one row a line, as `jq -c` does"):
        rows_of(tmp_path / "rows.jsonl")


def test_arguments_of_calls_are_objects_and_hold_what_was_written(tmp_path: Path) -> None:
    """A table fills objects up with the keys of others; OpenAI's format has JSON in a text."""

    def arguments(path: Path) -> list[Any]:
        return [row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in rows_of(path)]

    given = [{"city": "Rome"}, {"x": 1}]
    Dataset.from_list([call(one) for one in given]).to_parquet(tmp_path / "calls.parquet")
    assert arguments(tmp_path / "calls.parquet") == given
    (tmp_path / "calls.jsonl").write_text("\n".join(json.dumps(call(json.dumps(one))) for one in given))
    assert arguments(tmp_path / "calls.jsonl") == given
    (tmp_path / "none.jsonl").write_text(json.dumps(call({"limit": None})) + "\n" + json.dumps(call("no JSON")))
    assert arguments(tmp_path / "none.jsonl") == [{"limit": None}, "no JSON"]


@pytest.mark.parametrize("text", ['[{"role": "user", "content": "a"', '[{"from": "human", "value": "a"}]'])
def test_messages_in_a_cell_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(UpcycleError, match="here:1: "):
        to_row({"prompt": text, "completion": "b"}, "here:1")


@pytest.mark.parametrize("text", ['[{"name": "f", "arguments": {}}]', '[{"a": 1}]\nSummarise this', '[{"rol'])
def test_a_text_that_begins_like_messages_is_a_text(text: str) -> None:
    row = to_row({"prompt": text, "completion": text}, "here:1")
    assert [message["content"] for message in row.messages] == [text, text]


def test_a_question_is_what_users_ask() -> None:
    """Others ask the same thing with another system message, or with none."""
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    system, developer = ({"role": role, "content": "Be brief."} for role in ("system", "developer"))
    rows = [to_row({"messages": [*first, *messages]}, "here:1") for first in ([], [system], [system, developer])]
    assert [row.question for row in rows] == ["2+2?"] * 3
    assert to_row({"messages": [system, messages[1]]}, "here:1").question == "Be brief.\n4"


def test_files_are_domains_by_their_whole_names(tmp_path: Path) -> None:
    for name in ("chat.v1.jsonl", "chat.v2.jsonl.gz", "talk.jsonl"):
        line = json.dumps({"prompt": "a", "completion": "b"}).encode()
        (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    found = rows_of(tmp_path, domain="{file}")
    assert [row.domain for row in found] == ["chat.v1", "chat.v2", "talk"]
