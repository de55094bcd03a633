"""Where the answers of a chat stand in its one rendering.

A chat of the same shape whose texts are markers that occur nowhere else tells: what the template writes between them is
the shape's skeleton. A row whose rendering equals the skeleton with the row's texts in it has its answers where the
skeleton has them.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

from upcycle.data.formats import Message, Row
from upcycle.errors import UpcycleError
from upcycle.types import Tokenizer

Span = tuple[int, int]
"""First character and the one behind the last."""
Division = dict[str, tuple[str, ...]]
"""The texts of a message by field, each in pieces that are fixed and free in turn; markers replace the free ones."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold thoughts; transformers takes them for one."""
NO_TEXT = {"role", "weight", "train"}
"""Fields that no template prints with a message's text."""
THOUGHTS_END = "</think>"
THOUGHTS_BEGIN = re.compile(r"\s*(?:<think>)?")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MAX_SKELETONS = 1024


@dataclass(frozen=True)
class Chat:
    """A rendered row, and where its assistant turns stand."""

    text: str
    spans: dict[int, list[Span]]
    """By message. A turn is in several pieces only where the template itself marks several."""
    answer: str
    dropped: int


@dataclass(frozen=True)
class Skeleton:
    """A rendered chat without its free texts."""

    pieces: list[str]
    """What the template writes, with an empty piece for every free text: piece `2 * i + 1` is the text `slots[i]`."""
    slots: list[int]
    spans: dict[int, tuple[Span, Span]]
    """Begin and end of the assistant turns that could be told, each as a piece and a distance from where it begins."""
    dropped: int

    def fit(self, texts: Sequence[str], rendered: str, free_head: bool = False) -> dict[int, list[Span]] | None:
        """The turns' spans in a rendering, or None if it is not this skeleton around `texts`.

        Args:
            free_head: what stands before the first answer may differ (a template that prints the time).
        """
        pieces = self.pieces.copy()
        pieces[1::2] = [texts[slot] for slot in self.slots]
        rebuilt = "".join(pieces)
        starts = [0, *accumulate(map(len, pieces))]
        shift = len(rendered) - len(rebuilt)
        spans = {
            turn: (starts[first] + ahead + shift, starts[last] + behind + shift)
            for turn, ((first, ahead), (last, behind)) in self.spans.items()
        }
        if rebuilt != rendered:
            head = min((begin for begin, _ in spans.values()), default=0)
            if not free_head or head < 0 or rendered[head:] != rebuilt[head - shift :]:
                return None
        return {turn: [(begin, begin + len(rendered[begin:end].rstrip()))] for turn, (begin, end) in spans.items()}


@dataclass(frozen=True)
class _Sketch:
    """A row rendered with markers for its free texts."""

    tokenizer: Tokenizer
    row: Row
    divisions: Sequence[Division]
    messages: list[Message]
    marker: str
    """How every marker begins."""
    text: str
    owners: list[int]
    """The message of each marker."""
    places: list[tuple[int, Span]]
    """Markers by number, and where they stand in the text."""

    def own(self, turn: int) -> list[Span]:
        return [place for slot, place in self.places if self.owners[slot] == turn]

    def render(self, count: int, add_generation_prompt: bool = False) -> str | None:
        """The first messages."""
        if count == len(self.messages) and not add_generation_prompt:
            return self.text
        return _try_render(self.tokenizer, self.row, self.messages[:count], add_generation_prompt)

    def holds_its_own(self, turn: int, span: Span) -> bool:
        """Whether the markers in a turn's span are the turn's own and all of them, its answer among them."""
        inside = {slot for slot, (begin, end) in self.places if span[0] < end and begin < span[1]}
        own = {slot for slot, _ in self.places if self.owners[slot] == turn}
        num_free = len(self.divisions[turn].get("content", ())) // 2  # the last of them is the answer
        return inside == own and (not num_free or self.owners.index(turn) + num_free - 1 in own)

    def as_places(self, span: Span) -> tuple[Span, Span]:
        """A span's begin and end, each as a piece and a distance: a begin ahead of markers, an end behind them."""
        begins = [0, *(end for _, (_, end) in self.places)]
        ends = [*(begin for _, (begin, _) in self.places), len(self.text)]
        first = bisect_left(ends, span[0])
        last = bisect_right(begins, span[1]) - 1
        return (2 * first, span[0] - begins[first]), (2 * last, span[1] - begins[last])


def rendered(rows: Sequence[Row], tokenizer: Tokenizer) -> list[str | None]:
    """The chats as the template renders them, at once; None for those that are to be rendered each for itself.

    Those are all if the template marks answers or cannot render one of them; else those with tools.
    """
    if isinstance(tokenizer.chat_template, str) and _marks_generations(tokenizer.chat_template):
        return [None] * len(rows)
    plain = [list(row.messages) for row in rows if not row.tools]
    try:
        texts = iter(tokenizer.apply_chat_template(plain, tokenize=False) if plain else [])
    except Exception:  # each is tried again, and named
        return [None] * len(rows)
    return [None if row.tools else str(next(texts)) for row in rows]


def read_chat(row: Row, tokenizer: Tokenizer, skeletons: dict[Any, Skeleton | None], text: str | None) -> Chat:
    """
    Args:
        text: its rendering, if it is known.

    Raises:
        UpcycleError: it has no answer, the template cannot render it, or an answer cannot be found in the rendering.
    """
    if not any(message["role"] == "assistant" for message in row.messages):
        raise UpcycleError(f"{row.where}: no assistant turn, so there is nothing to learn")
    if _marks_generations(_template(row, tokenizer)):
        return _marked_chat(row, tokenizer)
    text = _render(tokenizer, row, row.messages) if text is None else text
    divisions = [_divide(message) for message in row.messages]
    shape = _shape(row, divisions)
    if shape not in skeletons:
        if len(skeletons) == MAX_SKELETONS:
            skeletons.clear()
        skeletons[shape] = _skeleton(tokenizer, row, divisions)
    skeleton = skeletons[shape]
    spans = skeleton and skeleton.fit(_free_texts(divisions), text)
    if skeleton and spans and len(spans) == len(_turns(row)):
        return Chat(text, spans, _answer(row, tokenizer, text, spans), skeleton.dropped)
    return _searched_chat(row, tokenizer, text)


def _searched_chat(row: Row, tokenizer: Tokenizer, text: str) -> Chat:
    """A chat whose template looks at the texts: only answers are replaced by markers, or nothing at all."""
    lost = _turns(row)[0]
    answers, nothing = [_divide_answer(message) for message in row.messages], [Division() for _ in row.messages]
    for divisions, free_head in ((answers, False), (answers, True), (nothing, False)):
        skeleton = _skeleton(tokenizer, row, divisions)
        spans = (skeleton and skeleton.fit(_free_texts(divisions), text, free_head)) or {}
        hidden = _first_hidden(row, text, spans)
        if hidden is None:
            answer = _answer(row, tokenizer, text, spans)
            return Chat(text, spans, answer, _count_dropped(row, text, spans))
        lost = hidden if spans else lost
    raise _rewritten(row, lost)


def _rewritten(row: Row, turn: int) -> UpcycleError:
    return UpcycleError(
        f"{row.where}: the chat template rewrites message {turn}, so the answer's tokens cannot be told apart; "
        "give a plainer data.chat_template, or single-turn rows"
    )


def _turns(row: Row) -> list[int]:
    return [turn for turn, message in enumerate(row.messages) if message["role"] == "assistant"]


# --- texts of messages


def _glued(text: str) -> tuple[str, ...]:
    """A text between its outer white space, which templates strip or keep: a fixed, a free and a fixed piece."""
    core = text.strip()
    if not core:
        return (text,)
    if len(core) == len(text):
        return "", core, ""
    ahead = len(text) - len(text.lstrip())
    return text[:ahead], core, text[ahead + len(core) :]


def _divide(message: Message) -> Division:
    """Everything in a message that differs between rows of one shape, thoughts apart from the answer behind them."""
    content = message.get("content")
    is_answer = message["role"] == "assistant"
    division: Division = {}
    if isinstance(content, str):
        division["content"] = _glued(content)
        if is_answer and THOUGHTS_END in content:
            division["content"] = _divide_thoughts(content)
    if is_answer and (field := _reasoning(message)) is not None:
        division[field] = _glued(message[field])
    return division


def _divide_thoughts(content: str) -> tuple[str, ...]:
    head, closing, answer = content.rpartition(THOUGHTS_END)
    opening = THOUGHTS_BEGIN.match(head)
    length = opening.end() if opening else 0
    *first, behind = _glued(head[length:])
    ahead, *rest = _glued(answer)
    pieces = [*first, behind + closing + ahead, *rest]
    return head[:length] + pieces[0], *pieces[1:]


def _divide_answer(message: Message) -> Division:
    """The visible answer, even an empty one; thoughts and other messages' texts are fixed."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return {}
    answer = _behind_thoughts(content)
    ahead = content.rindex(answer) if answer else len(content)
    return {"content": (content[:ahead], answer, content[ahead + len(answer) :])}


def _behind_thoughts(content: str) -> str:
    return content.rpartition(THOUGHTS_END)[2].strip()


def _reasoning(message: Message) -> str | None:
    if message.keys().isdisjoint(REASONING):
        return None
    return next((field for field in REASONING if isinstance(message.get(field), str)), None)


def _free_texts(divisions: Sequence[Division]) -> list[str]:
    return [text for division in divisions for pieces in division.values() for text in pieces[1::2]]


def _shape(row: Row, divisions: Sequence[Division]) -> tuple[Any, ...]:
    """All that a template sees of a row but the free texts: rows of the same shape share a skeleton."""
    messages = []
    for message, division in zip(row.messages, divisions, strict=True):
        fixed = [(field, pieces[::2]) for field, pieces in division.items()]
        others = ""
        if len(message) > 1 + len(division):
            others = repr([(key, message[key]) for key in message if key not in division and key not in NO_TEXT])
        messages.append((message["role"], *fixed, others))
    return repr(row.tools) if row.tools else "", *messages


# --- skeletons


@lru_cache(maxsize=8)
def skeletons_of(template: str, special_tokens: str) -> dict[Any, Skeleton | None]:
    """Those known of a template by shape, None for a shape that has none. A stale one does no harm: it does not fit."""
    return {}


def _skeleton(tokenizer: Tokenizer, row: Row, divisions: Sequence[Division]) -> Skeleton | None:
    """Render a row with markers for its free texts; None where the template refuses them."""
    marker = _unused(row)
    messages = _with_markers(row.messages, divisions, marker)
    text = _try_render(tokenizer, row, messages)
    if text is None:
        return None
    owners = [turn for turn, division in enumerate(divisions) for _ in _free_texts([division])]
    places = [(int(found[1]), found.span()) for found in re.finditer(rf"{marker}(\d+)x", text)]
    sketch = _Sketch(tokenizer, row, divisions, messages, marker, text, owners, places)
    spans = {turn: span for turn in _turns(row) if (span := _span(sketch, turn)) and sketch.holds_its_own(turn, span)}
    slots = [slot for slot, _ in places]
    dropped = {turn for slot, turn in enumerate(owners) if slot not in slots} & set(_turns(row))
    pieces = [piece for fixed in re.split(rf"{marker}\d+x", text) for piece in (fixed, "")]
    return Skeleton(pieces[:-1], slots, {turn: sketch.as_places(span) for turn, span in spans.items()}, len(dropped))


def _unused(row: Row) -> str:
    """A word of letters, which no template treats in a special way and which the row does not have."""
    marker, content = "Slot", repr((row.messages, row.tools))
    while marker in content:
        marker += "q"
    return f"{marker}Q"


def _with_markers(messages: Sequence[Message], divisions: Sequence[Division], marker: str) -> list[Message]:
    marked, count = [], 0
    for message, division in zip(messages, divisions, strict=True):
        fields = {}
        for field, pieces in division.items():
            texts = list(pieces)
            texts[1::2] = [f"{marker}{count + i}x" for i in range(len(pieces) // 2)]
            count += len(pieces) // 2
            fields[field] = "".join(texts)
        marked.append({**message, **fields})
    return marked


def _span(sketch: _Sketch, turn: int) -> Span | None:
    """A turn from behind the generation prompt to its end-of-turn token.

    Where a template renders a turn in another way once others follow (Qwen3 drops an earlier turn's thoughts), or opens
    thoughts in the generation prompt, the turn begins with its text, and ends as a plain answer in its place does.
    """
    text, own = sketch.text, sketch.own(turn)
    before = sketch.render(turn, add_generation_prompt=True)
    until = sketch.render(turn + 1)
    follows = before is not None and text.startswith(before)
    if before is not None and until is not None and until.startswith(before) and text.startswith(until):
        return len(before), len(until.rstrip())
    content = sketch.messages[turn].get("content")
    if not own and (not follows or (isinstance(content, str) and content.strip())):
        return None
    begin = len(before) if before is not None and follows else _begin(text[: own[0][0]], sketch.divisions[turn])
    ending = _ending(sketch, turn)
    if not ending and (ending is None or not own):
        return None
    found = text.find(ending, own[-1][1] if own else begin)
    return (begin, found + len(ending)) if found >= 0 else None


def _begin(ahead: str, division: Division) -> int:
    """Where a turn begins whose first marker stands behind `ahead`: with what its content has there, as `<think>`.

    Spaces belong to it too: most tokenizers join one to the word behind it.
    """
    fixed = division.get("content", ("",))[0].strip()
    if fixed and ahead.rstrip().endswith(fixed):
        ahead = ahead.rstrip().removesuffix(fixed)
    return len(ahead.rstrip(" "))


def _ending(sketch: _Sketch, turn: int) -> str | None:
    """What the template writes behind an answer."""
    answer = f"{sketch.marker}end"
    messages = [*sketch.messages[:turn], {"role": "assistant", "content": answer}]
    text = _try_render(sketch.tokenizer, sketch.row, messages)
    _, found, ending = (text or "").rpartition(answer)
    return ending.rstrip() if found else None


# --- what the template shows of an answer


def _answer(row: Row, tokenizer: Tokenizer, text: str, spans: dict[int, list[Span]]) -> str:
    """The last turn's text; of a call of a tool, which has none, what the template writes."""
    turn = max(spans)
    content = row.messages[turn].get("content")
    covered = _covered(text, spans[turn])
    if not isinstance(content, str):
        special = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        ending = next((token for token in special if covered.endswith(token)), "")
        return covered.removesuffix(ending).strip()
    return content.strip() if THOUGHTS_END not in content else _visible(row.messages[turn], covered) or ""


def _covered(text: str, spans: list[Span]) -> str:
    return "".join(text[begin:end] for begin, end in spans)


def _visible(message: Message, covered: str) -> str | None:
    """What the template shows of a content: all of it, or what is behind the thoughts; None if neither is there."""
    content = message.get("content")
    if not isinstance(content, str):
        return covered.strip()
    texts = (content.strip(), _behind_thoughts(content))
    return next((text for text in texts if text in covered or _squeezed(text) in _squeezed(covered)), None)


def _squeezed(text: str) -> str:
    """Without white space, which templates change at the borders of texts and thoughts."""
    return "".join(text.split())


def _first_hidden(row: Row, text: str, spans: dict[int, list[Span]]) -> int | None:
    """The first assistant turn that has no span, or whose visible text is not in it."""
    for turn in _turns(row):
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
        texts = [message.get("content"), message.get(_reasoning(message) or "")]
        shown = _squeezed(text[begin:end])
        count += any(_squeezed(part) not in shown for part in texts if isinstance(part, str))
        begin = end
    return count


# --- templates that mark the answers themselves


@lru_cache(maxsize=16)
def _marks_generations(template: str) -> bool:
    return GENERATION.search(template) is not None


def _marked_chat(row: Row, tokenizer: Tokenizer) -> Chat:
    """A chat whose template has `{% generation %}` blocks."""
    text, marks = _render_marked(tokenizer, row, row.messages)
    turns = _turns(row)
    counts = [1] * len(turns)
    if len(marks) != len(turns):
        totals = [len(_render_marked(tokenizer, row, row.messages[: turn + 1])[1]) for turn in turns]
        counts = [total - before for total, before in zip(totals, [0, *totals], strict=False)]
    ends = list(accumulate(counts))
    blocks = {turn: marks[end - count : end] for turn, count, end in zip(turns, counts, ends, strict=True)}
    spans = {turn: block for turn, block in blocks.items() if block}
    hidden = _first_hidden(row, text, spans)
    if hidden is not None or ends[-1] != len(marks):
        raise _rewritten(row, turns[-1] if hidden is None else hidden)
    answer = _answer(row, tokenizer, text, spans)
    return Chat(text, spans, answer, _count_dropped(row, text, spans))


# --- renderings


def _template(row: Row, tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    try:
        return str(tokenizer.get_chat_template(None, list(row.tools) or None))
    except ValueError as error:
        raise UpcycleError(f"{row.where}: {error}") from None


def _render(tokenizer: Tokenizer, row: Row, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tools=list(row.tools) or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except Exception as error:  # jinja2 raises its own and the template's exceptions
        raise UpcycleError(f"{row.where}: the chat template cannot render this chat: {error}") from None


def _try_render(
    tokenizer: Tokenizer, row: Row, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str | None:
    """A part of a chat, or one with markers, which a template may refuse although it renders the row."""
    try:
        return _render(tokenizer, row, messages, add_generation_prompt)
    except UpcycleError:
        return None


def _render_marked(tokenizer: Tokenizer, row: Row, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """As `apply_chat_template` renders, with the character ranges that its mask of assistant's tokens is made from."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        texts, marks = render_jinja_template(
            [given],
            tools=list(row.tools) or None,
            chat_template=_template(row, tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # as above
        raise UpcycleError(f"{row.where}: the chat template cannot render this chat: {error}") from None
    return str(texts[0]), [(int(begin), int(end)) for begin, end in marks[0]]
