"""Chat rows to tokens, with a label on the assistant's tokens only."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from upcycle.data.formats import Message, Row, called, to_row
from upcycle.data.masks import Chat, read_chat, skeletons_of
from upcycle.data.renderings import rendered
from upcycle.data.skeletons import behind_thoughts
from upcycle.errors import UpcycleError
from upcycle.routing.batch import IGNORED
from upcycle.types import Tokenizer

Turns = Literal["all", "last"]
"""Which assistant turns of a chat are learned."""
ROWS_AT_ONCE = 256
"""Tokenised together; the tokenizer keeps far more of a text than is used."""


@dataclass(frozen=True)
class Sample:
    """A tokenised chat. `labels` equals `input_ids` on the assistant's tokens and is -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    domain: str
    question: str
    answer: str
    """Text of the last assistant turn without its thoughts; what the template writes for it, if it calls tools."""
    answer_start: int
    """Index of the last turn's first token: `input_ids[:answer_start]` is the prompt for generation."""
    where: str
    dropped: int = 0
    """Number of assistant turns of which the template left text out, such as earlier thoughts."""
    ignored: str = ""
    """What the template leaves out besides: roles of messages, tools."""

    @property
    def num_answer_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


def encode(row: Row, tokenizer: Tokenizer, turns: Turns = "all") -> Sample:
    """One row of `encode_rows`."""
    return encode_rows([row], tokenizer, turns)[0]


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts behind an answer; None if it puts none, or cannot render a chat.

    It need not be the tokenizer's end token: a base may end texts with another one than its template ends turns with.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        labels = encode(to_row({"messages": turns}, "a chat"), tokenizer).labels
    except UpcycleError:
        return None
    last = next((label for label in reversed(labels) if label != IGNORED), None)
    token = tokenizer.added_tokens_decoder.get(last)
    return last if token is not None and token.special else None


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, turns: Turns = "all") -> list[Sample]:
    """Render and tokenise chats; the assistant turns, their end-of-turn token included, get labels.

    A turn with `weight: 0` or `train: false` gets none. Rows of one shape cost one rendering each: give many at once.

    Args:
        turns: `last` learns the last assistant turn only.

    Raises:
        UpcycleError: a template that cannot render a row or leaves calls of tools out, an answer that is not where it
            can be found in the rendered chat, or a tokenizer that gives no character offsets.
    """
    check_fast(tokenizer)
    skeletons = skeletons_of(repr(tokenizer.chat_template), repr(tokenizer.special_tokens_map))
    samples: list[Sample] = []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[first : first + ROWS_AT_ONCE]
        texts = rendered(batch, tokenizer)
        chats = [read_chat(row, tokenizer, skeletons, text) for row, text in zip(batch, texts, strict=True)]
        encodings = _tokenise(tokenizer, [chat.text for chat in chats])
        samples += [_sample(*row, turns, tokenizer) for row in zip(batch, chats, encodings, strict=True)]
    return samples


def check_fast(tokenizer: Tokenizer) -> None:
    """Raises UpcycleError for a tokenizer that does not say where its tokens stand."""
    if not tokenizer.is_fast:
        raise UpcycleError(f"{type(tokenizer).__name__} is not a fast tokenizer, which the answer mask needs")


def is_learned(message: Message) -> bool:
    """Whether an answer is trained on: OpenAI's and mistral-finetune's `weight`, axolotl's `train`."""
    return message.get("weight") != 0 and message.get("train") is not False


def _tokenise(tokenizer: Tokenizer, texts: list[str]) -> list[Any]:
    """By the backend, which is quicker than the tokenizer's own call and its lists of all texts' offsets at once."""
    backend = tokenizer.backend_tokenizer
    # as a call of the tokenizer would, whatever was asked of the last one
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return list(backend.encode_batch(texts, add_special_tokens=False))


def _sample(row: Row, chat: Chat, encoding: Any, turns: Turns, tokenizer: Tokenizer) -> Sample:
    """A token is learned if all its characters are in the span of a learned turn."""
    ids, last_turn = encoding.ids, max(chat.spans)
    labels = [IGNORED] * len(ids)
    for turn, spans in chat.spans.items():
        if is_learned(row.messages[turn]) and (turns == "all" or turn == last_turn):
            _check_calls(row, turn, "".join(chat.text[begin:end] for begin, end in spans))
            for begin, end in spans:
                inside = slice(_first_from(encoding, begin), _first_behind(encoding, end, len(chat.text)))
                labels[inside] = ids[inside]
    start = _first_from(encoding, chat.prompt_end)
    answer = row.messages[last_turn]["content"]
    if called(row.messages[last_turn]):
        stop = _first_behind(encoding, chat.spans[last_turn][-1][1], len(chat.text))
        answer = tokenizer.decode(ids[start:stop], skip_special_tokens=True)
    ignored = ", ".join(chat.ignored)
    return Sample(
        ids, labels, row.domain, row.question, behind_thoughts(answer), start, row.where, chat.dropped, ignored
    )


def _check_calls(row: Row, turn: int, learned: str) -> None:
    """Raises UpcycleError for an answer of whose calls of tools the template leaves one out."""
    names = [str(function["name"]) for function in called(row.messages[turn]) if function.get("name")]
    if not names:
        return
    said = row.messages[turn]["content"]
    beside = learned.replace(said.strip(), "", 1) if isinstance(said, str) else learned
    if any(len(re.findall(rf"(?<!\w){re.escape(name)}(?!\w)", beside)) < names.count(name) for name in names):
        raise UpcycleError(
            f"{row.where}: the chat template leaves out the tool calls of message {turn} ({', '.join(names)}); give a "
            "data.chat_template that writes them, or leave such rows out"
        )


def _first_from(encoding: Any, place: int) -> int:
    """The first token that begins at that character or behind it; offsets never go back.

    The backend is asked for some tokens, as a list of all offsets takes a quarter of the time of the encoding itself.
    """
    token = encoding.char_to_token(place)
    if token is None:  # no token has the character
        return bisect_left(encoding.offsets, (place,))
    while token < len(encoding) and encoding.token_to_chars(token)[0] < place:
        token += 1
    while token and encoding.token_to_chars(token - 1)[0] >= place:  # of no characters
        token -= 1
    return int(token)


def _first_behind(encoding: Any, place: int, length: int) -> int:
    """The first token that ends behind that character's begin: those before it end there at the latest."""
    token = len(encoding) if place >= length else encoding.char_to_token(place)
    if token is None:
        return bisect_right(encoding.offsets, place, key=itemgetter(1))
    while token < len(encoding) and encoding.token_to_chars(token)[1] <= place:
        token += 1
    while token and encoding.token_to_chars(token - 1)[1] > place:
        token -= 1
    return int(token)
