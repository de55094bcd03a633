"""Tokenizers are compared by what they do: files may differ, ids may not."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from upcycle.errors import UpcycleError
from upcycle.weights.folders import BUILTIN_BASE, find_model
from upcycle.weights.tokenizers import WORDS, other_ids, other_words, read_tokenizer


def byte_level(**changes: Any) -> PreTrainedTokenizerFast:
    """Bytes and two merges, as the tokenizers of GPT-2 and its heirs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = changes.get("merges", [("t", "h"), ("th", "e")])
    vocabulary = {token: i for i, token in enumerate([*letters, "th", "the", "he"])}
    raw = Tokenizer(BPE(vocabulary, merges))
    raw.pre_tokenizer = changes.get("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    raw.decoder = decoders.ByteLevel()
    if "normalizer" in changes:
        raw.normalizer = changes["normalizer"]
    raw.add_special_tokens([AddedToken("<end>", **changes.get("token", {}))])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def word_level(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """A token for each character that it knows."""
    raw = Tokenizer(WordLevel({**vocabulary, "?": len(vocabulary)}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize(
    "changes",
    [
        {"merges": [("h", "e")]},
        {"normalizer": normalizers.NFC()},
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.Strip()},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"token": {"lstrip": True}},
        {"token": {"single_word": True}},
    ],
    ids=str,
)
def test_whatever_changes_an_id_is_found(changes: dict[str, Any]) -> None:
    assert other_ids(byte_level(), byte_level()) is None
    found = other_ids(byte_level(), byte_level(**changes))
    assert found is not None
    assert re.fullmatch(r"token \d+ of ['\"].+ is (\d+|none), not (\d+|none)", found)


def test_one_entry_of_a_large_vocabulary_is_found(tmp_path: Path) -> None:
    """Whose characters no probe has: the vocabulary is a probe too."""
    one, other = ({chr(0x4E00 + i): i for i in range(3000)} for _ in range(2))
    step = 3000 // WORDS
    first, second = chr(0x4E00 + 20 * step), chr(0x4E00 + 21 * step)
    other[first], other[second] = other[second], other[first]
    found = other_ids(*(word_level(vocabulary) for vocabulary in (one, other)))
    assert found is not None
    assert f"is {21 * step}, not {20 * step}" in found


def test_files_that_say_the_same_otherwise_are_the_same(tmp_path: Path) -> None:
    base = find_model(BUILTIN_BASE)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    (other / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items()))))
    assert other_ids(read_tokenizer(base), read_tokenizer(other)) is None
    assert list(other_words(read_tokenizer(base), read_tokenizer(other))) == []


def test_special_tokens_and_templates_are_named() -> None:
    one, other = byte_level(), byte_level()
    one.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    other.chat_template = "{% for m in messages -%} {{ m['content'] }} {%- endfor %}"
    assert list(other_words(one, other)) == []  # it writes the same
    other.chat_template = "{{ raise_exception('no system turn') }}"
    other.eos_token = "the"
    other.add_tokens(["<mine>"])
    eos, added, template = other_words(one, other)
    assert eos == "eos_token 'the' ('<end>' in the base)"
    assert added == "the added tokens '<mine>'"
    assert template == "the chat template"


def test_what_stands_around_a_text_is_named() -> None:
    other = byte_level()
    other.backend_tokenizer.post_processor = processors.TemplateProcessing("<end> $A", special_tokens=[("<end>", 259)])
    assert other_ids(byte_level(), other) is None
    assert list(other_words(byte_level(), other)) == ["the tokens around a text"]


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UpcycleError, match=f"the tokenizer of {tmp_path} cannot be loaded"):
        read_tokenizer(tmp_path)
