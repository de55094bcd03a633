"""Chats as a tokenizer's template renders them."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from upcycle.data.formats import SPELL, Message, Row
from upcycle.errors import UpcycleError
from upcycle.types import Tokenizer

Span = tuple[int, int]
"""First character and the one behind the last."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def rendered(rows: Sequence[Row], tokenizer: Tokenizer) -> list[str | None]:
    """The chats as the template renders them, at once; None for those that are to be rendered each for itself.

    Those are all if the template marks answers or cannot render one of them; else those with tools.
    """
    if isinstance(tokenizer.chat_template, str) and marks_generations(tokenizer.chat_template):
        return [None] * len(rows)
    plain = [list(row.messages) for row in rows if not row.tools]
    try:
        texts = iter(tokenizer.apply_chat_template(plain, tokenize=False) if plain else [])
    except Exception:  # each is tried again, and named
        return [None] * len(rows)
    return [None if row.tools else str(next(texts)) for row in rows]


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
    error, spellings = None, [messages]
    if any("tool_calls" in message for message in messages):  # DeepSeek's templates join arguments to texts
        spellings.append(_with_spelt_calls(messages))
    for given in spellings:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(given), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        except Exception as raised:  # jinja2 raises its own and the template's exceptions
            error = error or raised
    raise UpcycleError(f"{row.where}: the chat template cannot render this chat: {error}") from None


def _with_spelt_calls(messages: Sequence[Message]) -> list[Message]:
    """With the arguments of calls as JSON, and a text beside them."""
    return [
        {**message, "content": message["content"] or "", "tool_calls": [_spelt(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _spelt(call: Any) -> Any:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        return {**call, "function": _spelt(call["function"])}
    if isinstance(call, dict) and isinstance(call.get("arguments"), dict):
        return {**call, "arguments": SPELL(call["arguments"])}
    return call


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

    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        texts, marks = render_jinja_template(
            [given],
            tools=list(row.tools) or None,
            chat_template=template_of(row, tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # as above
        raise UpcycleError(f"{row.where}: the chat template cannot render this chat: {error}") from None
    return str(texts[0]), [(int(begin), int(end)) for begin, end in marks[0]]
