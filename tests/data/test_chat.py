"""Tokenising chats: which tokens carry a label."""

import json
from pathlib import Path

import pytest

from conftest import make_tokenizer
from upcycle.data.chat import encode
from upcycle.data.formats import Row, to_row
from upcycle.errors import UpcycleError
from upcycle.routing.batch import IGNORED
from upcycle.weights.base import load_tokenizer, template_text
from worlds import rows_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return load_tokenizer(folder, None)


def chat(*turns: tuple[str, str]) -> Row:
    return to_row({"messages": [{"role": r, "content": c} for r, c in turns]}, "here:1")


def labelled(tokenizer, sample) -> str:
    return tokenizer.decode([t for t in sample.labels if t != IGNORED])


def test_only_the_assistants_tokens_and_their_end_carry_labels(tokenizer) -> None:
    sample = encode(chat(("system", "be brief"), ("user", "2+2?"), ("assistant", "4")), tokenizer)
    assert labelled(tokenizer, sample) == "4<|im_end|>"
    assert sample.question == "2+2?"
    assert tokenizer.decode(sample.input_ids[: sample.answer_start]).endswith("<|im_start|>assistant\n")
    assert all(label in (IGNORED, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))


def test_every_assistant_turn_is_learned_and_the_last_one_generated(tokenizer) -> None:
    row = chat(("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd"))
    sample = encode(row, tokenizer)
    assert labelled(tokenizer, sample) == "bb<|im_end|>dd<|im_end|>"
    assert sample.answer == "dd"
    assert "bb" in tokenizer.decode(sample.input_ids[: sample.answer_start])


def test_an_answer_that_a_template_rewrites_must_be_found_or_is_refused(tokenizer, monkeypatch) -> None:
    counted = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", counted)
    assert labelled(tokenizer, encode(chat(("user", "a"), ("assistant", "b")), tokenizer)) == "b<|im_end|>"
    monkeypatch.setattr(tokenizer, "chat_template", counted.replace("m['content']", "m['content'] | length"))
    with pytest.raises(UpcycleError, match="here:1: the chat template rewrites message 1"):
        encode(chat(("user", "a"), ("assistant", "b")), tokenizer)


def test_a_tokenizer_without_template_is_refused_unless_one_is_given(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UpcycleError, match=r"no chat template; give data\.chat_template"):
        load_tokenizer(tmp_path, None)
    sample = encode(chat(("user", "a"), ("assistant", "b")), load_tokenizer(tmp_path, template_text("chatml")))
    assert sample.answer == "b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"rows\.jsonl:2: not JSON"),
        ('{"a": "a"}', r"rows\.jsonl:2: expected an object with a non-empty 'messages' list, found fields"),
        ('{"messages": [{"role": "user"}]}', r"rows\.jsonl:2: messages\[0\] is .*expected a 'role'"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', r"rows\.jsonl:2: messages\[0\]"),
        ("[1]", r"rows\.jsonl:2: expected an object"),
    ],
)
def test_a_malformed_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UpcycleError, match=message):
        rows_of(tmp_path / "rows.jsonl")


def test_a_missing_file_and_an_empty_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"gone\.jsonl does not exist"):
        rows_of(tmp_path / "gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UpcycleError, match="no rows"):
        rows_of(tmp_path / "empty.jsonl")


def test_gzip_is_read_like_plain(tmp_path: Path, rows: Path) -> None:
    import gzip

    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    plain, packed = rows_of(rows), rows_of(tmp_path / "rows.jsonl.gz")
    assert [r.messages for r in plain] == [r.messages for r in packed]
