"""Chat rows to tokens, with a label on the assistant's tokens only."""

from collections.abc import Sequence
from dataclasses import dataclass

from upcycle.data.sources import Message, Row
from upcycle.errors import UpcycleError
from upcycle.routing.batch import IGNORED
from upcycle.types import Tokenizer


@dataclass(frozen=True)
class Sample:
    """A tokenised chat. `labels` equals `input_ids` on the assistant's tokens and is -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    domain: str
    question: str
    answer: str
    """Text of the last assistant turn."""
    answer_start: int
    """Index of the last turn's first token: `input_ids[:answer_start]` is the prompt for generation."""
    where: str

    @property
    def num_answer_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def encode(row: Row, tokenizer: Tokenizer) -> Sample:
    """Render and tokenise a chat; every assistant turn, its end-of-turn token included, gets labels.

    Raises:
        UpcycleError: the template does not render a chat as an extension of its own beginning.
    """
    text = _render(tokenizer, row.messages, row.where)
    spans = [_span(tokenizer, row, i, text) for i, m in enumerate(row.messages) if m["role"] == "assistant"]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        token if any(begin <= first and last <= end for begin, end in spans) else IGNORED
        for token, (first, last) in zip(ids, offsets, strict=True)
    ]
    begin = spans[-1][0]
    start = next((i for i, (first, _) in enumerate(offsets) if first >= begin), len(ids))
    answer = next(m["content"] for m in reversed(row.messages) if m["role"] == "assistant")
    return Sample(ids, labels, row.domain, row.question, answer.strip(), start, row.where)


def _span(tokenizer: Tokenizer, row: Row, turn: int, text: str) -> tuple[int, int]:
    """Character range of an assistant turn: from behind the generation prompt to its end-of-turn token."""
    before = _render(tokenizer, row.messages[:turn], row.where, add_generation_prompt=True)
    until = _render(tokenizer, row.messages[: turn + 1], row.where)
    if not (until.startswith(before) and text.startswith(until)):
        raise UpcycleError(
            f"{row.where}: the chat template rewrites earlier turns (message {turn}), so the answer's tokens "
            "cannot be told apart; give a plainer data.chat_template, or single-turn rows"
        )
    return len(before), len(until.rstrip())


def _render(tokenizer: Tokenizer, messages: Sequence[Message], where: str, add_generation_prompt: bool = False) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except Exception as error:  # jinja2 raises its own and the template's exceptions
        raise UpcycleError(f"{where}: the chat template cannot render this chat: {error}") from None
