"""Chat rows to tokens, with a label on the assistant's tokens only."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal

from upcycle.data.formats import Message, Row
from upcycle.data.masks import Chat, read_chat, skeletons_of
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
    """Text of the last assistant turn, as far as the template shows it."""
    answer_start: int
    """Index of the last turn's first token: `input_ids[:answer_start]` is the prompt for generation."""
    where: str
    dropped: int = 0
    """Number of assistant turns of which the template left text out, such as earlier thoughts."""

    @property
    def num_answer_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


def encode(row: Row, tokenizer: Tokenizer, turns: Turns = "all") -> Sample:
    """One row of `encode_rows`."""
    return encode_rows([row], tokenizer, turns)[0]


def encode_rows(rows: Sequence[Row], tokenizer: Tokenizer, turns: Turns = "all") -> list[Sample]:
    """Render and tokenise chats; the assistant turns, their end-of-turn token included, get labels.

    A turn with `weight: 0` or `train: false` gets none. Rows of one shape cost one rendering each: give many at once.

    Args:
        turns: `last` learns the last assistant turn only.

    Raises:
        UpcycleError: a template that cannot render a row, an answer that is not where it can be found in the rendered
            chat, or a tokenizer that gives no character offsets.
    """
    if not tokenizer.is_fast:
        raise UpcycleError(f"{type(tokenizer).__name__} is not a fast tokenizer, which the answer mask needs")
    skeletons = skeletons_of(repr(tokenizer.chat_template), repr(tokenizer.special_tokens_map))
    samples: list[Sample] = []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[first : first + ROWS_AT_ONCE]
        chats = [read_chat(row, tokenizer, skeletons) for row in batch]
        encodings = _tokenise(tokenizer, [chat.text for chat in chats])
        samples += [_sample(*row, turns) for row in zip(batch, chats, encodings, strict=True)]
    return samples


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


def _sample(row: Row, chat: Chat, encoding: Any, turns: Turns) -> Sample:
    """A token is learned if all its characters are in the span of a learned turn."""
    ids, offsets, last_turn = encoding.ids, encoding.offsets, max(chat.spans)
    labels = [IGNORED] * len(ids)
    for turn, spans in chat.spans.items():
        if is_learned(row.messages[turn]) and (turns == "all" or turn == last_turn):
            for begin, end in spans:
                # offsets never go back, though tokens may share a character or have none
                inside = slice(bisect_left(offsets, (begin,)), bisect_right(offsets, end, key=itemgetter(1)))
                labels[inside] = ids[inside]
    start = bisect_left(offsets, (chat.spans[last_turn][0][0],))
    return Sample(ids, labels, row.domain, row.question, chat.answer, start, row.where, chat.dropped)
