"""What rows say besides their messages is honoured, or named."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import make_tokenizer
from upcycle.data.chat import encode
from upcycle.data.formats import to_row
from upcycle.errors import UpcycleError
from upcycle.routing.batch import IGNORED
from upcycle.types import Tokenizer
from upcycle.weights.base import load_tokenizer
from worlds import rows_of

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
# thoughts in the last turn only, as Qwen3 renders them
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}(hm)\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}<|im_start|>{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    make_tokenizer(tmp_path)
    return load_tokenizer(tmp_path, None)


def turns(*texts: str, **last: Any) -> list[dict[str, Any]]:
    """User and assistant in turn."""
    messages: list[dict[str, Any]] = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    messages[-1] |= last
    return messages


def learned(tokenizer: Tokenizer, value: dict[str, Any]) -> str:
    return str(tokenizer.decode([t for t in encode(to_row(value, "here:1"), tokenizer).labels if t != IGNORED]))


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_an_answer_that_is_not_to_be_learned_is_not(mark: dict[str, Any], tokenizer: Tokenizer) -> None:
    messages = turns("a", "bad", "c", "good")
    messages[1] |= mark
    assert learned(tokenizer, {"messages": messages}) == "good<|im_end|>"
    messages[1] = {"role": "assistant", "content": "fine", "weight": 1}
    assert learned(tokenizer, {"messages": messages}) == "fine<|im_end|>good<|im_end|>"


def test_the_template_sees_the_tools(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = WITH_TOOLS
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    sample = encode(to_row({"messages": CHAT, "tools": tools}, "here:1"), tokenizer)
    assert "get_weather" in tokenizer.decode(sample.input_ids)
    assert learned(tokenizer, {"messages": CHAT, "tools": tools}) == "b<|im_end|>"
    with pytest.raises(UpcycleError, match="here:1: 'tools' is 3, expected a list"):
        to_row({"messages": CHAT, "tools": 3}, "here:1")


@pytest.mark.parametrize(("label", "domain"), [(3, "3"), ("math", "math"), (None, "all"), (0, "0")])
def test_a_label_may_be_a_number(label: Any, domain: str) -> None:
    assert to_row({"messages": CHAT, "domain": label}, "here:1").domain == domain


def test_a_label_that_is_neither_is_refused() -> None:
    with pytest.raises(UpcycleError, match=r"here:1: 'domain' is \['a'\], expected a text or a number"):
        to_row({"messages": CHAT, "domain": ["a"]}, "here:1")


def test_half_a_character_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": turns("a\ud83d", "b")}) + "\n")
    with pytest.raises(UpcycleError, match=r"rows\.jsonl:2: holds \\ud83d, half of a surrogate pair"):
        rows_of(path)


def test_fields_that_mean_nothing_here_are_named_once(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT, "id": i, "source": "x"}) + "\n" for i in range(3)))
    assert len(rows_of(path)) == 3
    assert capsys.readouterr().out.count("data: fields that Upcycle does not use: id, source") == 1


def test_a_greeting_is_no_answer_to_a_question() -> None:
    greeting = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "hello"}]
    questions = {to_row({"messages": greeting + turns(str(i), "b")}, "here:1").question for i in range(5)}
    assert len(questions) == 5
    assert to_row({"messages": turns("a", "b", "c", "d")}, "here:1").question == "a"


def test_turns_that_a_template_rewrites_are_found_by_their_content(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = THINKING
    assert learned(tokenizer, {"messages": turns("a", "bb", "c", "dd")}) == "bb<|im_end|>(hm)\ndd<|im_end|>"
    # an answer that the question spells too is not found in the question
    assert learned(tokenizer, {"messages": turns("say x", "x", "x?", "x")}) == "x<|im_end|>(hm)\nx<|im_end|>"
    sample = encode(to_row({"messages": turns("a", "bb", "c", "dd")}, "here:1"), tokenizer)
    assert tokenizer.decode(sample.input_ids[: sample.answer_start]).endswith("c<|im_end|>\n<|im_start|>assistant\n")
