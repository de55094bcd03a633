"""Training questions that are, or nearly are, held-out ones: an evaluation that saw them says nothing."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from upcycle.data.formats import UnusableError, to_row
from upcycle.data.sources import decoded_rows
from upcycle.errors import UpcycleError

WORDS = 13
"""Successive words that two questions must share to be alike (Brown et al. 2020, arXiv 2005.14165, appendix C)."""
ASKS = ("question", "prompt")
"""Fields of a benchmark's row that hold what is asked."""
WORD = re.compile(r"\w+")


class Alike:
    """Tells whether a question shares `WORDS` words in a row with one of those given; a shorter one, all its words."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._known = {gram for question in questions for gram in _grams(question)}

    def __contains__(self, question: str) -> bool:
        return any(gram in self._known for gram in _grams(question))


def _grams(question: str) -> Iterator[int]:
    """Hashes: of case and punctuation nothing is left."""
    words = WORD.findall(question.lower())
    for begin in range(max(1, len(words) - WORDS + 1)):
        yield hash(tuple(words[begin : begin + WORDS]))


def questions_of(names: Sequence[str]) -> list[str]:
    """What the rows of files ask: chats, or a benchmark's `question` or `prompt`.

    Raises:
        UpcycleError: a row has neither, or a file has no rows.
    """
    found: list[str] = []
    for name in names:
        asked = [_asked(value, where) for value, where in decoded_rows(str(Path(name)))]
        if not asked:
            raise UpcycleError(f"data.decontaminate_with: {name} has no rows; expected questions")
        found += asked
    return found


def _asked(value: object, where: str) -> str:
    fields = value if isinstance(value, dict) else {}
    for name in ASKS:
        if isinstance(fields.get(name), str) and "completion" not in fields:
            return str(fields[name])
    try:
        return to_row(value, where).question
    except UnusableError as error:
        raise UpcycleError(f"{error}; of a benchmark, one of {', '.join(ASKS)}") from None
