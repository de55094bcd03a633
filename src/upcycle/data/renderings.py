"""Chats as a tokenizer's template renders them."""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypeVar

from upcycle.data.formats import SPELL, Message, Row, called, with_arguments
from upcycle.errors import UpcycleError
from upcycle.types import Tokenizer

T = TypeVar("T")
Span = tuple[int, int]
"""First character and the one behind the last."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def rendered(rows: Sequence[Row], tokenizer: Tokenizer) -> list[str | None]:
    """The chats as the template renders them, at once; None for those that are to be rendered each for itself.

    Those are all if the template marks answers or cannot render one of them; else those with tools.
    """
    if isinstance(tokenizer.chat_template, str) and marks_generations(tokenizer.chat_template):
        return [None] * len(rows)
    alone = [bool(row.tools) or any("tool_calls" in message for message in row.messages) for row in rows]
    plain = [list(row.messages) for row, apart in zip(rows, alone, strict=True) if not apart]
    try:
        texts = iter(tokenizer.apply_chat_template(plain, tokenize=False) if plain else [])
    except Exception:  # each is tried again, and named
        return [None] * len(rows)
    return [None if apart else str(next(texts)) for apart in alone]


@lru_cache(maxsize=16)
def marks_generations(template: str) -> bool:
    return GENERATION.search(template) is not None


def template_of(row: Row, tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    try:
        return str(tokenizer.get_chat_template(None, list(row.tools) or None))
    except ValueError as error:
        raise UpcycleError(f"{row.where}: {error}") from None


def render(tokenizer: Tokenizer, row: Row, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    tools = list(row.tools) or None

    def attempt(given: Sequence[Message]) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(given), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    return _spelt_as_wanted(row, messages, attempt, str)


def _spelt_as_wanted(
    row: Row, messages: Sequence[Message], attempt: Callable[[Sequence[Message]], T], text_of: Callable[[T], str]
) -> T:
    """A rendering with the arguments of calls as objects; as JSON, where the template cannot spell objects.

    Such a template joins them to texts and fails (DeepSeek), or prints them as Python does.
    """
    given = [function.get("arguments") for message in messages for function in called(message)]
    objects = [arguments for arguments in given if isinstance(arguments, dict)]
    try:
        found = attempt(messages)
        if not any(arguments and str(arguments) in text_of(found) for arguments in objects):
            return found
    except Exception as error:  # jinja2 raises its own and the template's exceptions
        if not objects:
            raise _cannot(row, error) from None
    try:
        return attempt(_with_spelt_calls(messages))
    except Exception as error:
        raise _cannot(row, error) from None


def _cannot(row: Row, error: Exception) -> UpcycleError:
    return UpcycleError(f"{row.where}: the chat template cannot render this chat: {error}")


def _with_spelt_calls(messages: Sequence[Message]) -> list[Message]:
    """With the arguments of calls as JSON, and a text beside them."""
    return [
        {
            **message,
            "content": message["content"] or "",
            "tool_calls": [with_arguments(call, _as_text) for call in calls],
        }
        if isinstance(calls := message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _as_text(arguments: Any) -> Any:
    return SPELL(arguments) if isinstance(arguments, dict) else arguments


def try_render(
    tokenizer: Tokenizer, row: Row, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str | None:
    """A part of a chat, or one with markers, which a template may refuse although it renders the row."""
    try:
        return render(tokenizer, row, messages, add_generation_prompt)
    except UpcycleError:
        return None


def render_marked(tokenizer: Tokenizer, row: Row, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """As `apply_chat_template` renders, with the character ranges that its mask of assistant's tokens is made from."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def attempt(given: Sequence[Message]) -> tuple[str, list[Span]]:
        texts, marks = render_jinja_template(
            [[{key: value for key, value in message.items() if value is not None} for message in given]],
            tools=list(row.tools) or None,
            chat_template=template_of(row, tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        return str(texts[0]), [(int(begin), int(end)) for begin, end in marks[0]]

    return _spelt_as_wanted(row, messages, attempt, itemgetter(0))
