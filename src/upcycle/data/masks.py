"""Where the answers of a chat stand in its one rendering.

A row whose rendering equals the skeleton of its shape with the row's texts in it has its answers where the skeleton has
them.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from upcycle.data.formats import Message, Row
from upcycle.data.renderings import Span, marks_generations, render, render_marked, template_of, try_render
from upcycle.data.skeletons import (
    Division,
    Skeleton,
    behind_thoughts,
    divide,
    divide_answer,
    free_texts,
    ignored_of,
    reasoning_field,
    shape_of,
    shared_head,
    skeleton_of,
    turns_of,
)
from upcycle.errors import UpcycleError
from upcycle.types import Tokenizer

MAX_SKELETONS = 1024


@dataclass(frozen=True)
class Chat:
    """A rendered row, and where its assistant turns stand."""

    text: str
    spans: dict[int, list[Span]]
    """By message. A turn is in several pieces only where the template itself marks several."""
    dropped: int
    ignored: tuple[str, ...] = ()
    """What the template leaves out besides: roles of messages, or tools."""
    head: int | None = None
    """Where the prompt for the last turn ends, if not where the turn begins."""

    @property
    def prompt_end(self) -> int:
        return self.spans[max(self.spans)][0][0] if self.head is None else self.head


@lru_cache(maxsize=8)
def skeletons_of(template: str, special_tokens: str) -> dict[Any, Skeleton | None]:
    """Those known of a template by shape, None for a shape that has none. A stale one does no harm: it does not fit."""
    return {}


def read_chat(row: Row, tokenizer: Tokenizer, skeletons: dict[Any, Skeleton | None], text: str | None) -> Chat:
    """
    Args:
        text: its rendering, if it is known.

    Raises:
        UpcycleError: it has no answer, the template cannot render it, or an answer cannot be found in the rendering.
    """
    if not any(message["role"] == "assistant" for message in row.messages):
        raise UpcycleError(f"{row.where}: no assistant turn, so there is nothing to learn")
    if marks_generations(template_of(row, tokenizer)):
        return _marked_chat(row, tokenizer)
    text = render(tokenizer, row, row.messages) if text is None else text
    divisions = [divide(message) for message in row.messages]
    shape = shape_of(row, divisions)
    if shape not in skeletons:
        if len(skeletons) == MAX_SKELETONS:
            skeletons.clear()
        skeletons[shape] = skeleton_of(tokenizer, row, divisions)
    skeleton = skeletons[shape]
    spans = skeleton and skeleton.fit(free_texts(divisions), text)
    if skeleton and spans and len(spans) == len(turns_of(row)):
        chat = Chat(text, spans, skeleton.dropped, skeleton.ignored)
        return _ended(chat, skeleton, tokenizer)
    return _searched_chat(row, tokenizer, text)


def _ended(chat: Chat, skeleton: Skeleton, tokenizer: Tokenizer) -> Chat:
    """With the end-of-text token behind the last answer, if the template writes nothing there (GLM)."""
    if not skeleton.is_open or not tokenizer.eos_token:
        return chat
    text, turn = chat.text.rstrip() + tokenizer.eos_token, max(chat.spans)
    *others, (begin, _) = chat.spans[turn]
    return replace(chat, text=text, spans={**chat.spans, turn: [*others, (begin, len(text))]})


def _searched_chat(row: Row, tokenizer: Tokenizer, text: str) -> Chat:
    """A chat whose template looks at the texts: only answers are replaced by markers, or nothing at all."""
    lost = turns_of(row)[0]
    answers, nothing = [divide_answer(message) for message in row.messages], [Division() for _ in row.messages]
    for divisions, free_head in ((answers, False), (answers, True), (nothing, False)):
        skeleton = skeleton_of(tokenizer, row, divisions)
        spans = (skeleton and skeleton.fit(free_texts(divisions), text, free_head)) or {}
        hidden = _first_hidden(row, text, spans)
        if hidden is None:
            chat = Chat(text, spans, _count_dropped(row, text, spans), skeleton.ignored if skeleton else ())
            return _ended(chat, skeleton, tokenizer) if skeleton else chat
        lost = hidden if spans else lost
    raise _rewritten(row, lost)


def _rewritten(row: Row, turn: int) -> UpcycleError:
    return UpcycleError(
        f"{row.where}: the chat template rewrites message {turn}, so the answer's tokens cannot be told apart; "
        "give a plainer data.chat_template, or single-turn rows"
    )


# --- what the template shows of an answer


def _covered(text: str, spans: list[Span]) -> str:
    return "".join(text[begin:end] for begin, end in spans)


def _visible(message: Message, covered: str) -> str | None:
    """What the template shows of a content: all of it, or what is behind the thoughts; None if neither is there."""
    content = message.get("content")
    if not isinstance(content, str):
        return covered.strip()
    texts = (content.strip(), behind_thoughts(content))
    return next((text for text in texts if text in covered or _squeezed(text) in _squeezed(covered)), None)


def _squeezed(text: str) -> str:
    """Without white space, which templates change at the borders of texts and thoughts."""
    return "".join(text.split())


def _first_hidden(row: Row, text: str, spans: dict[int, list[Span]]) -> int | None:
    """The first assistant turn that has no span, or whose visible text is not in it."""
    for turn in turns_of(row):
        if turn not in spans or _visible(row.messages[turn], _covered(text, spans[turn])) is None:
            return turn
    return None


def _count_dropped(row: Row, text: str, spans: dict[int, list[Span]]) -> int:
    """Number of turns with text that is not between the turn before and their own end.

    A generation prompt may hold the first of it, such as the tag that opens thoughts.
    """
    count, begin = 0, 0
    for turn in sorted(spans):
        message = row.messages[turn]
        end = max((end for _, end in spans[turn]), default=begin)
        texts = [message.get("content"), message.get(reasoning_field(message) or "")]
        shown = _squeezed(text[begin:end])
        count += any(_squeezed(part) not in shown for part in texts if isinstance(part, str))
        begin = end
    return count


# --- templates that mark the answers themselves


def _marked_chat(row: Row, tokenizer: Tokenizer) -> Chat:
    """A chat whose template has `{% generation %}` blocks."""
    text, marks = render_marked(tokenizer, row, row.messages)
    turns = turns_of(row)
    counts = [1] * len(turns)
    if len(marks) != len(turns):
        totals = [len(render_marked(tokenizer, row, row.messages[: turn + 1])[1]) for turn in turns]
        counts = [total - before for total, before in zip(totals, [0, *totals], strict=False)]
    ends = list(accumulate(counts))
    blocks = {turn: marks[end - count : end] for turn, count, end in zip(turns, counts, ends, strict=True)}
    spans = {turn: block for turn, block in blocks.items() if block}
    hidden = _first_hidden(row, text, spans)
    if hidden is not None or ends[-1] != len(marks):
        raise _rewritten(row, turns[-1] if hidden is None else hidden)
    head = _prompt_end(tokenizer, row, text, max(spans), spans[max(spans)][0])
    return Chat(text, spans, _count_dropped(row, text, spans), ignored_of(tokenizer, row), head)


def _prompt_end(tokenizer: Tokenizer, row: Row, text: str, turn: int, block: Span) -> int:
    """Behind the generation prompt, which a marked block may hold (SmolLM3)."""
    prompt = try_render(tokenizer, row, row.messages[:turn], add_generation_prompt=True) or ""
    begin, end = block
    head = len(shared_head(text, prompt, tokenizer))
    return head if begin < head < end else begin
