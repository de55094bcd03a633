"""Chat rows to tokens, with a label on the assistant's tokens only."""

from collections.abc import Sequence
from dataclasses import dataclass

from upcycle.data.formats import Message, Row
from upcycle.errors import UpcycleError
from upcycle.routing.batch import IGNORED
from upcycle.types import Tokenizer
from upcycle.weights.base import load_tokenizer

__all__ = ["Sample", "encode", "is_learned", "load_tokenizer"]


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

    A turn with `weight: 0` or `train: false` gets none.

    Raises:
        UpcycleError: an answer is not where it can be found in the rendered chat.
    """
    text = _render(tokenizer, row, row.messages)
    spans = _spans(tokenizer, row, text)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    learned = [spans[turn] for turn in spans if is_learned(row.messages[turn])]
    labels = [
        token if any(begin <= first and last <= end for begin, end in learned) else IGNORED
        for token, (first, last) in zip(ids, offsets, strict=True)
    ]
    last_turn = max(spans)
    start = next((i for i, (first, _) in enumerate(offsets) if first >= spans[last_turn][0]), len(ids))
    answer = str(row.messages[last_turn]["content"])
    return Sample(ids, labels, row.domain, row.question, answer.strip(), start, row.where)


def is_learned(message: Message) -> bool:
    """Whether an answer is trained on: OpenAI's and mistral-finetune's `weight`, axolotl's `train`."""
    return message.get("weight") != 0 and message.get("train") is not False


def _spans(tokenizer: Tokenizer, row: Row, text: str) -> dict[int, tuple[int, int]]:
    """Character range of every assistant turn: from behind the generation prompt to its end-of-turn token.

    Where a template renders a turn in another way once others follow (Qwen3 drops an earlier turn's thoughts), the
    turn is found by its content, and ends as the last one does.
    """
    turns = [turn for turn, message in enumerate(row.messages) if message["role"] == "assistant"]
    by_prefix = {turn: _by_prefix(tokenizer, row, turn, text) for turn in turns}
    spans: dict[int, tuple[int, int]] = {}
    cursor = 0
    for turn, message in enumerate(row.messages):
        content = str(message["content"]).strip()
        place = text.find(content, cursor)
        if turn in by_prefix and (span := by_prefix[turn] or _by_content(row, turn, text, place)) is not None:
            spans[turn] = span
            cursor = span[1]
        elif turn in by_prefix:
            raise UpcycleError(
                f"{row.where}: the chat template rewrites message {turn}, so the answer's tokens cannot be told apart; "
                "give a plainer data.chat_template, or single-turn rows"
            )
        elif place >= 0:
            cursor = place + len(content)
    return spans


def _by_prefix(tokenizer: Tokenizer, row: Row, turn: int, text: str) -> tuple[int, int] | None:
    """The range of a turn that renders the same whatever follows it."""
    before = _render(tokenizer, row, row.messages[:turn], add_generation_prompt=True)
    until = _render(tokenizer, row, row.messages[: turn + 1])
    if until.startswith(before) and text.startswith(until):
        return len(before), len(until.rstrip())
    return None


def _by_content(row: Row, turn: int, text: str, place: int) -> tuple[int, int] | None:
    """The range of an earlier turn whose content stands at `place`, with what ends the last turn behind its content."""
    last = str(row.messages[-1]["content"]).strip()
    content = str(row.messages[turn]["content"]).strip()
    if place < 0 or not content or not last or row.messages[-1]["role"] != "assistant":
        return None
    ending = text[text.rfind(last) + len(last) :].rstrip()
    end = place + len(content)
    return (place, end + len(ending)) if text.startswith(ending, end) else None


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
