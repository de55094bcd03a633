"""Seeded generators of short instruction data with checkable answers, and of the text its base model reads.

A `Family` is one kind of question: a function that draws a `Fact`, and the phrasings that ask or state it.
A hash of the fact's key decides whether it belongs to the training or the validation split, and the key is a
function of what the question says. So the two splits share neither a question nor a rephrased one, whatever
their sizes and seeds.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any, Literal

Split = Literal["train", "validation"]
Row = dict[str, Any]

DEFAULT_ROWS: dict[str, int] = {"train": 6000, "validation": 300}
VALIDATION_ONE_IN = 8
DRAWS_BEFORE_REPEAT = 50

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
NAMES = (
    "Ann", "Bob", "Cal", "Dan", "Eva", "Fay", "Gus", "Hal", "Ida", "Jon", "Kim", "Leo", "Mia",
    "Ned", "Pam", "Sam",
)  # fmt: skip
PLACES = ("first", "second", "last")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
ROMAN = (
    (100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip
# Idle words before a statement and before its answer: a base that reads the answer at varying distances from the
# numbers it depends on does not stumble over a chat template between the two.
OPENINGS = ("", "", "Note that ", "We know ", "As ever, ", "Look, ")
FILLERS = ("", "", "of course ", "clearly ", "just ", "as we know ", "in short ", "so it is said, ")
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"


@dataclass(frozen=True)
class Fact:
    """What one question is about: `key` names it in any phrasing, `slots` fill the phrasings."""

    key: str
    answer: str
    slots: dict[str, str]


@dataclass(frozen=True)
class Family:
    """One kind of question. `questions` end in "?" or ":"; the answer and "." follow `statements`."""

    draw: Callable[[Random], Fact]
    questions: tuple[str, ...]
    statements: tuple[str, ...]


def _fact(key: str, answer: object, **slots: object) -> Fact:
    return Fact(key, str(answer), {name: str(value) for name, value in slots.items()})


def _ordered(a: int, b: int) -> str:
    """A key that a commutative question shares with its mirror image."""
    return f"{min(a, b)},{max(a, b)}"


def _word(rng: Random, shortest: int, longest: int) -> str:
    """A pronounceable word, consonants and vowels by turns."""
    vowel_first = rng.random() < 0.3
    length = rng.randint(shortest, longest)
    return "".join(rng.choice(VOWELS if i % 2 != vowel_first else CONSONANTS) for i in range(length))


# Arithmetic


def _add(rng: Random) -> Fact:
    a, b = rng.randint(2, 25), rng.randint(2, 25)
    return _fact(_ordered(a, b), a + b, a=a, b=b)


def _subtract(rng: Random) -> Fact:
    a = rng.randint(5, 30)
    b = rng.randint(1, a)
    return _fact(f"{a},{b}", a - b, a=a, b=b)


def _multiply(rng: Random) -> Fact:
    a, b = rng.randint(2, 9), rng.randint(2, 12)
    a, b = (a, b) if rng.random() < 0.5 else (b, a)
    return _fact(_ordered(a, b), a * b, a=a, b=b)


# Sequences


def _progression(terms: list[int]) -> Fact:
    """Show all terms but the last, which is the answer."""
    shown = ", ".join(str(term) for term in terms[:-1])
    return _fact(shown, terms[-1], terms=shown)


def _increasing(rng: Random) -> Fact:
    start, step = rng.randint(1, 25), rng.randint(2, 7)
    return _progression([start + i * step for i in range(4)])


def _decreasing(rng: Random) -> Fact:
    last, step = rng.randint(0, 25), rng.randint(2, 7)
    return _progression([last + i * step for i in range(3, -1, -1)])


def _additive(rng: Random) -> Fact:
    terms = [rng.randint(1, 9), rng.randint(1, 9)]
    while len(terms) < 5:
        terms.append(terms[-1] + terms[-2])
    return _progression(terms)


# Strings


def _reverse(rng: Random) -> Fact:
    word = _word(rng, 3, 4)
    return _fact(word, word[::-1], word=word)


def _sort_letters(rng: Random) -> Fact:
    word = _word(rng, 3, 4)
    return _fact(word, "".join(sorted(word)), word=word)


def _nth_letter(rng: Random) -> Fact:
    word = _word(rng, 3, 5)
    position = rng.randrange(len(word))
    return _fact(f"{word},{position}", word[position], word=word, nth=ORDINALS[position])


# Calendar and clock


def _shifted(rng: Random, names: tuple[str, ...], sign: int, most: int) -> Fact:
    start, count = rng.randrange(len(names)), rng.randint(2, most)
    answer = names[(start + sign * count) % len(names)]
    return _fact(f"{names[start]},{count}", answer, start=names[start], n=count)


def _hours_later(rng: Random) -> Fact:
    hour, count = rng.randrange(24), rng.randint(2, 12)
    return _fact(f"{hour},{count}", f"{(hour + count) % 24}:00", start=f"{hour}:00", n=count)


# Notation of numbers


def to_roman(number: int) -> str:
    """Write 1 to 399 in Roman numerals."""
    digits = ""
    for value, symbol in ROMAN:
        digits += symbol * (number // value)
        number %= value
    return digits


def _notation(rng: Random, most: int, write: Callable[[int], str], read: bool) -> Fact:
    """A number and how it is written: asked for the number if `read`, else for the writing."""
    number = rng.randint(1, most)
    written = write(number)
    return _fact(str(number), number if read else written, written=written, number=number)


def _binary(number: int) -> str:
    return f"{number:b}"


# Logic


def _extreme(rng: Random, largest: bool) -> Fact:
    numbers = rng.sample(range(10, 60), 3)
    answer = max(numbers) if largest else min(numbers)
    a, b, c = numbers
    return _fact(str(sorted(numbers)), answer, a=a, b=b, c=c)


def _sort_numbers(rng: Random) -> Fact:
    a, b, c = numbers = rng.sample(range(1, 30), 3)
    return _fact(str(sorted(numbers)), " ".join(map(str, sorted(numbers))), a=a, b=b, c=c)


def _race(rng: Random) -> Fact:
    """Three people and two comparisons; who comes first, second or last."""
    people = rng.sample(NAMES, 3)
    premises = [f"{people[0]} beat {people[1]}", f"{people[1]} beat {people[2]}"]
    rng.shuffle(premises)
    place = rng.randrange(3)
    return _fact(",".join(people), people[place], p=premises[0], q=premises[1], place=PLACES[place])


FAMILIES: dict[str, dict[str, Family]] = {
    "arithmetic": {
        "add": Family(
            _add,
            ("What is {a}+{b}?", "{a} plus {b}?", "Add {a} and {b}:", "Sum of {a} and {b}?"),
            ("{a}+{b}=", "{a} plus {b} is ", "The sum of {a} and {b} is "),
        ),
        "subtract": Family(
            _subtract,
            ("What is {a}-{b}?", "{a} minus {b}?", "Take {b} from {a}:"),
            ("{a}-{b}=", "{a} minus {b} is ", "Taking {b} from {a} leaves "),
        ),
        "multiply": Family(
            _multiply,
            ("What is {a}*{b}?", "{a} times {b}?", "Multiply {a} by {b}:", "Product of {a} and {b}?"),
            ("{a}*{b}=", "{a} times {b} is ", "The product of {a} and {b} is "),
        ),
    },
    "sequence": {
        name: Family(
            draw,
            ("What is next: {terms}?", "Continue {terms}:", "{terms}, then?"),
            ("{terms}, ", "After {terms} comes "),
        )
        for name, draw in (
            ("increasing", _increasing),
            ("decreasing", _decreasing),
            ("additive", _additive),
        )
    },
    "string": {
        "reverse": Family(
            _reverse,
            ("Spell {word} backward:", "Reverse {word}:", "What is {word} backward?"),
            ("{word} backward is ", "{word} reversed is ", "Backward {word} is "),
        ),
        "sort": Family(
            _sort_letters,
            ("Sort the letters of {word}:", "Letters of {word} in order?"),
            ("{word} sorted is ", "Letters of {word} by order are "),
        ),
        "nth": Family(
            _nth_letter,
            ("The {nth} letter of {word}?", "Letter {nth} in {word}?", "Give {nth} letter of {word}:"),
            ("The {nth} letter of {word} is ", "In {word} the {nth} letter is "),
        ),
    },
    "calendar": {
        "days_later": Family(
            lambda rng: _shifted(rng, WEEKDAYS, 1, 14),
            ("What is {n} days after {start}?", "{start} plus {n} days?"),
            ("{start} plus {n} days is ", "{n} days after {start} is "),
        ),
        "days_earlier": Family(
            lambda rng: _shifted(rng, WEEKDAYS, -1, 14),
            ("What is {n} days before {start}?", "{start} minus {n} days?"),
            ("{start} minus {n} days is ", "{n} days before {start} is "),
        ),
        "months_later": Family(
            lambda rng: _shifted(rng, MONTHS, 1, 11),
            ("What is {n} months after {start}?", "{start} plus {n} months?"),
            ("{start} plus {n} months is ", "{n} months after {start} is "),
        ),
        "hours_later": Family(
            _hours_later,
            ("What is {n} hours after {start}?", "{start} plus {n} hours?"),
            ("{start} plus {n} hours is ", "{n} hours after {start} is "),
        ),
    },
    "conversion": {
        "to_binary": Family(
            lambda rng: _notation(rng, 63, _binary, read=False),
            ("What is {number} in binary?", "Write {number} in base 2:", "{number} to binary?"),
            ("{number} in binary is ", "In base 2 {number} is "),
        ),
        "from_binary": Family(
            lambda rng: _notation(rng, 63, _binary, read=True),
            ("What is binary {written}?", "Read {written} in base 2:", "{written} from binary?"),
            ("Binary {written} is ", "{written} in base 2 means "),
        ),
        "to_roman": Family(
            lambda rng: _notation(rng, 120, to_roman, read=False),
            ("What is {number} in Roman?", "Write {number} as Roman:"),
            ("{number} in Roman is ", "As Roman {number} is "),
        ),
        "from_roman": Family(
            lambda rng: _notation(rng, 120, to_roman, read=True),
            ("What is Roman {written}?", "Which number is {written}?"),
            ("Roman {written} is ", "{written} means "),
        ),
    },
    "logic": {
        "largest": Family(
            lambda rng: _extreme(rng, largest=True),
            ("Which is largest: {a}, {b} or {c}?", "Largest of {a}, {b}, {c}?"),
            ("Largest among {a}, {b}, {c} is ", "{a}, {b}, {c} have largest "),
        ),
        "smallest": Family(
            lambda rng: _extreme(rng, largest=False),
            ("Which is smallest: {a}, {b} or {c}?", "Smallest of {a}, {b}, {c}?"),
            ("Smallest among {a}, {b}, {c} is ", "{a}, {b}, {c} have smallest "),
        ),
        "sort_numbers": Family(
            _sort_numbers,
            ("Sort {a} {b} {c}:", "Order {a} {b} {c}:", "What is {a} {b} {c} sorted?"),
            ("{a} {b} {c} sorted is ", "{a} {b} {c} in order is "),
        ),
        "race": Family(
            _race,
            ("{p}, {q}: {place}?", "Who is {place}: {p}, {q}?"),
            ("{p}, {q}, so {place} is ", "With {p}, {q}, the {place} is "),
        ),
    },
}

DOMAINS: tuple[str, ...] = tuple(FAMILIES)


def split_of(family_name: str, key: str) -> Split:
    """The split that a fact belongs to, for all seeds and sizes."""
    digest = hashlib.blake2b(f"{family_name}:{key}".encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") % VALIDATION_ONE_IN == 0 else "train"


def quickstart_rows(split: Split, size: int | None = None, seed: int = 0) -> list[Row]:
    """Return `size` chat rows of one split, in equal parts from all domains and in random order.

    A question is repeated only when new ones have become hard to find.
    """
    if split not in DEFAULT_ROWS:
        raise ValueError(f"split is {split!r}, expected one of {sorted(DEFAULT_ROWS)}")
    rng = Random(f"{split}/{seed}")
    asked: set[str] = set()
    domains = islice(cycle(DOMAINS), DEFAULT_ROWS[split] if size is None else size)
    rows = [_new_row(rng, split, domain, asked) for domain in domains]
    rng.shuffle(rows)
    return rows


def _new_row(rng: Random, split: Split, domain: str, asked: set[str]) -> Row:
    for _ in range(DRAWS_BEFORE_REPEAT):
        question, answer = _ask(rng, split, domain)
        if question not in asked:
            break
    asked.add(question)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "domain": domain}


def _ask(rng: Random, split: Split, domain: str) -> tuple[str, str]:
    """Draw facts of one family until one belongs to the split, and phrase it as a question."""
    name = rng.choice(list(FAMILIES[domain]))
    family = FAMILIES[domain][name]
    fact = family.draw(rng)
    while split_of(name, fact.key) != split:
        fact = family.draw(rng)
    return rng.choice(family.questions).format(**fact.slots), fact.answer


def pretraining_statements(seed: int = 0) -> Iterator[tuple[str, str]]:
    """Yield statements about the same skills without end, as a stem and the answer that completes it."""
    rng = Random(f"pretraining/{seed}")
    while True:
        family = rng.choice(list(FAMILIES[rng.choice(DOMAINS)].values()))
        fact = family.draw(rng)
        stem = rng.choice(OPENINGS) + rng.choice(family.statements).format(**fact.slots)
        yield stem + (rng.choice(FILLERS) if stem.endswith(" ") else ""), f"{fact.answer}."


def pretraining_text(seed: int = 0) -> Iterator[str]:
    """Yield the same statements as text; no question and no chat among them."""
    return (stem + answer for stem, answer in pretraining_statements(seed))
