"""Training questions that are, or nearly are, held-out ones: an evaluation that saw them says nothing."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from unicodedata import normalize

from upcycle.data.formats import UnusableError, to_row
from upcycle.data.sources import decoded_rows
from upcycle.errors import UpcycleError

WORDS = 13
"""Successive words that two questions must share to be alike (Brown et al. 2020, arXiv 2005.14165, appendix C)."""
ASKS = ("question", "prompt")
"""Fields of a benchmark's row that hold what is asked."""
FEWEST = 6
"""Words of a shorter question that is looked for within others; one of fewer words is only found as a whole."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai to Khmer, Kana, Han: written without spaces, so each character is a word."""
SIGN = re.compile(f"[{UNSPACED}]")
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


class Alike:
    """Tells whether a question shares `WORDS` words in a row with one of those given, or has all of a shorter one.

    Of a question that is written without spaces twice as many characters count as so many words.
    """

    def __init__(self, questions: Iterable[str]) -> None:
        self._wholes: set[int] = set()
        self._parts: dict[int, set[int]] = defaultdict(set)
        """By the number of words."""
        for question in questions:
            words = _words(question)
            times = 1 + (2 * sum(SIGN.fullmatch(word) is not None for word in words) > len(words))
            self._wholes.update(_grams(words, len(words)))
            if len(words) >= times * FEWEST:
                size = min(len(words), times * WORDS)
                self._parts[size].update(_grams(words, size))

    def __contains__(self, question: str) -> bool:
        words = _words(question)
        if not self._wholes.isdisjoint(_grams(words, len(words))):
            return True
        return any(gram in known for size, known in self._parts.items() for gram in _grams(words, size))


def as_seen(question: str) -> str:
    """Without what templates strip or no reader sees: white space at the ends of lines, how they end, how accents are
    encoded."""
    return "\n".join(line.rstrip() for line in normalize("NFC", question).splitlines()).strip()


def _words(question: str) -> list[str]:
    """Of case and punctuation nothing is left."""
    return WORD.findall(question.lower())


def _grams(words: Sequence[str], size: int) -> Iterator[int]:
    """Hashes of so many words in a row."""
    for begin in range(len(words) - size + 1):
        yield hash(tuple(words[begin : begin + size]))


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
