"""The answers are right, the splits are disjoint, and the base model reads no question."""

import re
from itertools import islice
from random import Random
from typing import Any

import pytest

from upcycle.data import generators
from upcycle.data.generators import (
    DOMAINS,
    FAMILIES,
    MONTHS,
    ORDINALS,
    WEEKDAYS,
    Family,
    pretraining_text,
    quickstart_rows,
    split_of,
    to_roman,
)


def question(row: dict[str, Any]) -> str:
    return str(row["messages"][0]["content"])


def answer(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


def family_of(name: str) -> Family:
    return next(families[name] for families in FAMILIES.values() if name in families)


def asked(family: str, count: int = 400) -> list[tuple[str, str]]:
    """Questions and answers of one family, in all its phrasings."""
    phrasings = family_of(family).questions
    facts = [family_of(family).draw(Random(i)) for i in range(count)]
    return [(phrasing.format(**fact.slots), fact.answer) for fact in facts for phrasing in phrasings]


def filled(family: str, text: str, slot: str) -> str:
    """Read one slot back from the text of a question."""
    for phrasing in family_of(family).questions:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\S+)", re.escape(phrasing))
        if found := re.fullmatch(pattern, text):
            return found[slot]
    raise AssertionError(f"{text} is no question of {family}")


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def weekday_names(text: str) -> int:
    return next(i for i, name in enumerate(WEEKDAYS) if name in text)


def month_names(text: str) -> int:
    return next(i for i, name in enumerate(MONTHS) if name in text)


def test_arithmetic_is_right() -> None:
    assert all(int(reply) == sum(numbers(text)) for text, reply in asked("add"))
    assert all(int(reply) == max(numbers(text)) - min(numbers(text)) for text, reply in asked("subtract"))
    for text, reply in asked("multiply"):
        a, b = numbers(text)
        assert int(reply) == a * b


@pytest.mark.parametrize("family", ["increasing", "decreasing"])
def test_arithmetic_progressions_keep_their_step(family: str) -> None:
    for text, reply in asked(family):
        a, b, c = numbers(text)
        assert int(reply) - c == c - b == b - a


def test_additive_sequences_add_the_last_two_terms() -> None:
    for text, reply in asked("additive"):
        a, b, c, d = numbers(text)
        assert (c, d, int(reply)) == (a + b, b + c, c + d)


def test_letters_are_right() -> None:
    assert all(reply == filled("reverse", text, "word")[::-1] for text, reply in asked("reverse"))
    assert all(list(reply) == sorted(filled("sort", text, "word")) for text, reply in asked("sort"))
    for text, reply in asked("nth"):
        assert reply == filled("nth", text, "word")[ORDINALS.index(filled("nth", text, "nth"))]


@pytest.mark.parametrize(("family", "sign"), [("days_later", 1), ("days_earlier", -1)])
def test_weekdays_are_right(family: str, sign: int) -> None:
    for text, reply in asked(family):
        assert (weekday_names(text) + sign * numbers(text)[0]) % 7 == weekday_names(reply)


def test_months_are_right() -> None:
    for text, reply in asked("months_later"):
        assert (month_names(text) + numbers(text)[0]) % 12 == month_names(reply)


def test_hours_are_right() -> None:
    for text, reply in asked("hours_later"):
        hour, count = int(filled("hours_later", text, "start")[:-3]), int(filled("hours_later", text, "n"))
        assert reply == f"{(hour + count) % 24}:00"


def test_notations_are_right() -> None:
    assert all(int(reply, 2) == numbers(text)[0] for text, reply in asked("to_binary"))
    assert all(int(re.findall(r"[01]+", text)[0], 2) == int(reply) for text, reply in asked("from_binary"))
    assert all(to_roman(numbers(text)[0]) == reply for text, reply in asked("to_roman"))
    assert all(to_roman(int(reply)) in text for text, reply in asked("from_roman"))


def test_roman_numerals_by_hand() -> None:
    assert [to_roman(n) for n in (4, 9, 14, 40, 90, 249, 388)] == [
        "IV", "IX", "XIV", "XL", "XC", "CCXLIX", "CCCLXXXVIII",
    ]  # fmt: skip


def test_order_is_right() -> None:
    assert all(int(reply) == max(numbers(text)) for text, reply in asked("largest"))
    assert all(int(reply) == min(numbers(text)) for text, reply in asked("smallest"))
    assert all(numbers(reply) == sorted(numbers(text)) for text, reply in asked("sort_numbers"))


def test_race_is_right() -> None:
    for text, reply in asked("race"):
        pairs = re.findall(r"(\w+) beat (\w+)", text)
        better = sum(loser == reply for _, loser in pairs)
        worse = sum(winner == reply for winner, _ in pairs)
        expected = {"first": (0, 1), "second": (1, 1), "last": (1, 0)}
        assert (better, worse) == next(count for place, count in expected.items() if place in text)


@pytest.mark.parametrize(("size", "seeds"), [(6000, (0, 0)), (6000, (0, 1)), (900, (5, 3))])
def test_splits_share_no_question(size: int, seeds: tuple[int, int]) -> None:
    train = {question(row) for row in quickstart_rows("train", size, seeds[0])}
    validation = {question(row) for row in quickstart_rows("validation", size, seeds[1])}
    assert not train & validation


def test_a_question_belongs_to_one_split() -> None:
    """Facts that can be asked in the same words have the same split: no seed or size can mix them."""
    owner: dict[str, tuple[str, str]] = {}
    for families in FAMILIES.values():
        for name, family in families.items():
            for i in range(2000):
                fact = family.draw(Random(i))
                for phrasing in family.questions:
                    found = (split_of(name, fact.key), fact.answer)
                    assert owner.setdefault(phrasing.format(**fact.slots), found) == found


def test_mirror_images_stay_in_one_split() -> None:
    """37+45 and 45+37 are one fact."""

    def pairs(split: generators.Split) -> set[tuple[int, ...]]:
        texts = [question(row) for row in quickstart_rows(split, 6000)]
        return {tuple(sorted(numbers(text))) for text in texts if re.fullmatch(r"What is \d+\+\d+\?", text)}

    assert pairs("train")
    assert pairs("validation")
    assert not pairs("train") & pairs("validation")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_are_reproducible_and_balanced(split: generators.Split) -> None:
    rows = quickstart_rows(split, 600, seed=3)
    assert rows == quickstart_rows(split, 600, seed=3)
    assert rows != quickstart_rows(split, 600, seed=4)
    assert {domain: sum(row["domain"] == domain for row in rows) for domain in DOMAINS} == dict.fromkeys(
        DOMAINS, 600 // len(DOMAINS)
    )


def test_default_sizes() -> None:
    assert len(quickstart_rows("train")) == 6000
    validation = quickstart_rows("validation")
    assert len({question(row) for row in validation}) == len(validation) == 300


def test_rows_are_chats_with_short_answers() -> None:
    for row in quickstart_rows("train", 3000):
        assert set(row) == {"messages", "domain"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert 1 <= len(answer(row)) <= 12
        assert len(question(row)) <= 42


def test_odd_sizes() -> None:
    assert quickstart_rows("train", 0) == []
    assert len(quickstart_rows("train", 7)) == 7


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="'test'"):
        quickstart_rows("test")  # type: ignore[arg-type]


def test_pretraining_text_is_seeded() -> None:
    first = list(islice(pretraining_text(1), 20))
    assert first == list(islice(pretraining_text(1), 20))
    assert first != list(islice(pretraining_text(2), 20))


def test_pretraining_text_asks_nothing() -> None:
    text = "\n".join(islice(pretraining_text(0), 3000))
    assert "?" not in text
    assert not re.search(r"<\||user|assistant", text)
    assert not re.search(r": |:\n", text)
    assert not [row for row in quickstart_rows("validation") if question(row) in text]


def test_questions_end_as_no_statement_does() -> None:
    """What makes the test above hold for all questions, not only for those drawn."""
    for families in FAMILIES.values():
        for family in families.values():
            assert all(phrasing[-1] in "?:" for phrasing in family.questions)
            assert not any(mark in phrasing for phrasing in family.statements for mark in "?:")
