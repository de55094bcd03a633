"""What a template writes around the texts of a chat.

A chat of the same shape whose texts are markers that occur nowhere else tells: what the template writes between them is
the shape's skeleton.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from upcycle.data.formats import Message, Row, called
from upcycle.data.renderings import Span, try_render
from upcycle.types import Tokenizer

Division = dict[str, tuple[str, ...]]
"""The texts of a message by field, each in pieces that are fixed and free in turn; markers replace the free ones."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold thoughts; transformers takes them for one."""
NO_TEXT = {"role", "weight", "train"}
"""Fields that no template prints with a message's text."""
THOUGHTS_END = "</think>"
THOUGHTS_BEGIN = re.compile(r"\s*(?:<think>)?")


@dataclass(frozen=True)
class Skeleton:
    """A rendered chat without its free texts."""

    pieces: list[str]
    """What the template writes, with an empty piece for every free text: piece `2 * i + 1` is the text `slots[i]`."""
    slots: list[int]
    spans: dict[int, tuple[Span, Span]]
    """Begin and end of the assistant turns that could be told, each as a piece and a distance from where it begins."""
    dropped: int
    ignored: tuple[str, ...]
    """What the template leaves out besides text of answers: roles of messages, or tools."""

    @property
    def is_open(self) -> bool:
        """Whether the chat ends with an answer, and the template writes nothing behind it."""
        last, behind = self.spans[max(self.spans)][1] if self.spans else (0, 0)
        return 0 < last == len(self.pieces) - 1 and not behind and not self.pieces[last].strip()

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
        return try_render(self.tokenizer, self.row, self.messages[:count], add_generation_prompt)

    def holds_its_own(self, turn: int, span: Span) -> bool:
        """Whether the markers in a turn's span are the turn's own and all of them, its answer among them."""
        inside = {slot for slot, (begin, end) in self.places if span[0] < end and begin < span[1]}
        own = {slot for slot, _ in self.places if self.owners[slot] == turn}
        num_free = len(self.divisions[turn].get("content", ())) // 2  # the last of them is the answer
        silent = not own and bool(called(self.messages[turn]))
        return inside == own and (silent or not num_free or self.owners.index(turn) + num_free - 1 in own)

    def as_places(self, span: Span) -> tuple[Span, Span]:
        """A span's begin and end, each as a piece and a distance: a begin ahead of markers, an end behind them."""
        begins = [0, *(end for _, (_, end) in self.places)]
        ends = [*(begin for _, (begin, _) in self.places), len(self.text)]
        first = bisect_left(ends, span[0])
        last = bisect_right(begins, span[1]) - 1
        return (2 * first, span[0] - begins[first]), (2 * last, span[1] - begins[last])


def skeleton_of(tokenizer: Tokenizer, row: Row, divisions: Sequence[Division]) -> Skeleton | None:
    """Render a row with markers for its free texts; None where the template refuses them."""
    marker = _unused(row)
    messages = _with_markers(row.messages, divisions, marker)
    text = try_render(tokenizer, row, messages)
    if text is None:
        return None
    owners = [turn for turn, division in enumerate(divisions) for _ in free_texts([division])]
    places = [(int(found[1]), found.span()) for found in re.finditer(rf"{marker}(\d+)x", text)]
    sketch = _Sketch(tokenizer, row, divisions, messages, marker, text, owners, places)
    spans = {turn: span for turn in turns_of(row) if (span := _span(sketch, turn)) and sketch.holds_its_own(turn, span)}
    slots = [slot for slot, _ in places]
    dropped = {turn for slot, turn in enumerate(owners) if slot not in slots} & set(turns_of(row))
    pieces = [piece for fixed in re.split(rf"{marker}\d+x", text) for piece in (fixed, "")]
    found = {turn: sketch.as_places(span) for turn, span in spans.items()}
    return Skeleton(pieces[:-1], slots, found, len(dropped), ignored_of(tokenizer, row))


def ignored_of(tokenizer: Tokenizer, row: Row) -> tuple[str, ...]:
    """Whose messages the template leaves out, by role; and `tools` where it shows none of them.

    Answers aside, and questions, which every template shows.
    """
    said = {turn: message for turn, message in enumerate(row.messages) if message["role"] not in ("user", "assistant")}
    if not said and not row.tools:
        return ()
    marker = _unused(row)
    marked = {turn: {**message, "content": f"{message['content']} {marker}{turn}x"} for turn, message in said.items()}
    messages = [marked.get(turn, message) for turn, message in enumerate(row.messages)]
    text = try_render(tokenizer, row, messages)
    if text is None:
        return ()
    roles = dict.fromkeys(message["role"] for turn, message in said.items() if f"{marker}{turn}x" not in text)
    bare = bool(row.tools) and try_render(tokenizer, replace(row, tools=()), messages) == text
    return (*roles, *(["tools"] if bare else []))


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

    Where a template renders a turn in another way once others follow (Qwen3 drops an earlier turn's thoughts, Phi-3
    writes an end of text behind the last), or opens thoughts in the generation prompt, the turn begins with its text.
    """
    text, own = sketch.text, sketch.own(turn)
    before = sketch.render(turn, add_generation_prompt=True)
    until = sketch.render(turn + 1)
    follows = before is not None and text.startswith(before)
    if before is not None and until is not None and until.startswith(before) and text.startswith(until):
        return len(before), len(until.rstrip())
    content, calls = sketch.messages[turn].get("content"), called(sketch.messages[turn])
    if not own:  # nothing is said, or what is said beside a call is left out
        before = before if follows else _opening(sketch, turn, before)
        if before is None or (isinstance(content, str) and content.strip() and not calls):
            return None
        follows = True
    begin = len(before) if before is not None and follows else _begin(text[: own[0][0]], sketch.divisions[turn])
    end = _end(sketch, turn, text[slice(*own[-1])] if own else before or "", own[-1][1] if own else begin)
    return None if end is None else (begin, end)


def _opening(sketch: _Sketch, turn: int, prompt: str | None) -> str | None:
    """What stands before a turn of the generation prompt, where a turn of the past opens no thoughts (Qwen3.5)."""
    shared, ahead = shared_head(sketch.text, prompt or "", sketch.tokenizer), sketch.render(turn)
    return shared if ahead is not None and len(shared) >= len(ahead) else None


def shared_head(text: str, other: str, tokenizer: Tokenizer) -> str:
    """What two renderings begin with, to the last token that is whole."""
    if text.startswith(other):
        return other
    differ = (place for place, (one, its) in enumerate(zip(text, other, strict=False)) if one != its)
    shared = text[: next(differ, len(text))]
    ends = [found.end() for found in re.finditer(_whole_marks(tokenizer), shared)]
    return shared[: ends[-1]] if ends else ""


def _whole_marks(tokenizer: Tokenizer) -> str:
    return "|".join([*map(re.escape, tokenizer.all_special_tokens), r"[\s>\])}]"])


def _begin(ahead: str, division: Division) -> int:
    """Where a turn begins whose first marker stands behind `ahead`: with what its content has there, as `<think>`.

    Spaces belong to it too: most tokenizers join one to the word behind it.
    """
    fixed = division.get("content", ("",))[0].strip()
    if fixed and ahead.rstrip().endswith(fixed):
        ahead = ahead.rstrip().removesuffix(fixed)
    return len(ahead.rstrip(" "))


def _end(sketch: _Sketch, turn: int, last: str, place: int) -> int | None:
    """Where a turn ends of which nothing is free behind `place`, where `last` ends."""
    behind = sketch.text[place:]
    for ending in _endings(sketch, turn, last, behind):
        if behind.startswith(ending):
            return place + len(ending)
    # a chat that begins with an answer may have no beginning that can be rendered
    ending = next(filter(None, (_plain_ending(sketch, other) for other in (turn, *turns_of(sketch.row)))), "")
    found = sketch.text.find(ending, place) if ending else -1
    later = [message.get("content") for message in sketch.messages[turn + 1 :]]
    passed = any(isinstance(said, str) and said.strip() and said.strip() in sketch.text[place:found] for said in later)
    return found + len(ending) if found >= 0 and not passed else None


def _endings(sketch: _Sketch, turn: int, last: str, behind: str) -> Iterator[str]:
    """What may stand behind a turn's last free text: what does if the turn is the last one.

    Without the generation prompt, where that changes it (gpt-oss); without what marks the end of the whole chat.
    """
    until = _behind(sketch.render(turn + 1), last)
    if until is None:
        return
    if until.strip() or sketch.own(turn):
        yield until.rstrip()
    ahead, asked = sketch.render(turn), sketch.render(turn, add_generation_prompt=True)
    answered = _behind(sketch.render(turn + 1, add_generation_prompt=True), last)
    if ahead and asked and answered and asked.startswith(ahead):
        prompt = asked[len(ahead) :]
        if prompt and answered.endswith(prompt) and (shorter := answered.removesuffix(prompt).rstrip()):
            yield shorter
    shared = shared_head(until, behind, sketch.tokenizer).rstrip()
    if shared:
        yield shared


def _behind(text: str | None, last: str) -> str | None:
    if not last:
        return text
    _, found, rest = (text or "").rpartition(last)
    return rest if found else None


def _plain_ending(sketch: _Sketch, turn: int) -> str:
    """What the template writes behind a plain answer in a turn's place; no text if it cannot be told."""
    answer = f"{sketch.marker}end"
    messages = [*sketch.messages[:turn], {"role": "assistant", "content": answer}]
    return (_behind(try_render(sketch.tokenizer, sketch.row, messages), answer) or "").rstrip()


# --- texts of messages


def turns_of(row: Row) -> list[int]:
    return [turn for turn, message in enumerate(row.messages) if message["role"] == "assistant"]


def _glued(text: str) -> tuple[str, ...]:
    """A text between its outer white space, which templates strip or keep: a fixed, a free and a fixed piece."""
    core = text.strip()
    if not core:
        return (text,)
    if len(core) == len(text):
        return "", core, ""
    ahead = len(text) - len(text.lstrip())
    return text[:ahead], core, text[ahead + len(core) :]


def divide(message: Message) -> Division:
    """Everything in a message that differs between rows of one shape, thoughts apart from the answer behind them."""
    content = message.get("content")
    is_answer = message["role"] == "assistant"
    division: Division = {}
    if isinstance(content, str):
        division["content"] = _glued(content)
        if is_answer and THOUGHTS_END in content:
            division["content"] = _divide_thoughts(content)
    if is_answer and (field := reasoning_field(message)) is not None:
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


def divide_answer(message: Message) -> Division:
    """The visible answer, even an empty one; thoughts and other messages' texts are fixed."""
    content = message.get("content")
    if message["role"] != "assistant" or not isinstance(content, str):
        return {}
    answer = behind_thoughts(content)
    ahead = content.rindex(answer) if answer else len(content)
    return {"content": (content[:ahead], answer, content[ahead + len(answer) :])}


def behind_thoughts(content: str) -> str:
    return content.rpartition(THOUGHTS_END)[2].strip()


def reasoning_field(message: Message) -> str | None:
    if message.keys().isdisjoint(REASONING):
        return None
    return next((field for field in REASONING if isinstance(message.get(field), str)), None)


def free_texts(divisions: Sequence[Division]) -> list[str]:
    return [text for division in divisions for pieces in division.values() for text in pieces[1::2]]


def shape_of(row: Row, divisions: Sequence[Division]) -> tuple[Any, ...]:
    """All that a template sees of a row but the free texts: rows of the same shape share a skeleton."""
    messages = []
    for message, division in zip(row.messages, divisions, strict=True):
        fixed = [(field, pieces[::2]) for field, pieces in division.items()]
        others = ""
        if len(message) > 1 + len(division):
            others = repr([(key, message[key]) for key in message if key not in division and key not in NO_TEXT])
        messages.append((message["role"], *fixed, others))
    return repr(row.tools) if row.tools else "", *messages
