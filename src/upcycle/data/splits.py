"""Who sees which sample: training, seed data (fit and test), validation."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from upcycle.console import say, warn
from upcycle.data.chat import Sample
from upcycle.data.encoding import encoded
from upcycle.data.overlap import Alike, as_seen, questions_of
from upcycle.data.rows import Rows, open_rows
from upcycle.data.samples import Encoded, Samples, check_known
from upcycle.data.sources import share_of, too_many
from upcycle.errors import UpcycleError, counted
from upcycle.reading import brief
from upcycle.recipe import Recipe
from upcycle.settings import DataSettings
from upcycle.types import Tokenizer

NOTHING_LEFT = "nothing is left to train on; give rows with more questions"
MOST = 0.9
"""Share of the rows from which on all are encoded, so that other seeds and settings find them encoded."""


@dataclass(frozen=True)
class SeedData:
    """Samples for the router's initialization."""

    fit: Sequence[Sample]
    """The router is started from them."""
    test: Sequence[Sample]
    """They only measure it."""


@dataclass(frozen=True)
class Splits:
    """Disjoint by question, except that `seed_from: train` leaves the seed data in `train`."""

    train: Sequence[Sample]
    seed: SeedData
    validation: Sequence[Sample]

    @property
    def has_system_messages(self) -> bool:
        """Whether a table that the parts are from has one."""
        parts = (self.train, self.seed.fit, self.seed.test, self.validation)
        return any(part.encoded.rows.has_system_messages for part in parts if isinstance(part, Samples))


@dataclass(frozen=True)
class Part:
    """Some rows of a table, in an order."""

    rows: Rows
    numbers: list[int]
    """A row that counts twice is there twice."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, some: slice) -> "Part":
        return Part(self.rows, self.numbers[some])

    @property
    def questions(self) -> list[str]:
        return [self.rows.questions[number] for number in self.numbers]

    @property
    def seen(self) -> list[str]:
        return [self.rows.seen[number] for number in self.numbers]


def load_splits(recipe: Recipe, tokenizer: Tokenizer, context_length: int, vocabulary: int | None = None) -> Splits:
    """Read, encode and split the data of a recipe; says what was left out and why.

    Args:
        vocabulary: see `load_parts`.

    Raises:
        UpcycleError: see `load_parts`; or too few rows for the seed data that the recipe asks for.
    """
    training, validation = load_parts(recipe, tokenizer, context_length, vocabulary)
    seed, rest = _seed_data(training, recipe)
    fit, test = cut_questions(seed, seed_sizes(len(training), recipe)[0])
    splits = Splits(rest if recipe.route.seed_from == "held_out" else training, SeedData(fit, test), validation)
    where = "held out" if recipe.route.seed_from == "held_out" else "taken from them"
    say(
        f"data: {counted(len(splits.train), 'training row')}, {len(fit):,} + {counted(len(test), 'seed row')} {where} "
        f"to start the router and to test it, {counted(len(validation), 'validation row')}"
    )
    return splits


def load_parts(
    recipe: Recipe, tokenizer: Tokenizer, context_length: int, vocabulary: int | None = None
) -> tuple[Samples, Samples]:
    """What is trained on, seed data included, and what is held out; says what was left out and why.

    Args:
        vocabulary: tokens that the model has embeddings for; None: all that the tokenizer gives.

    Raises:
        UpcycleError: unreadable data, or a token that the model does not know.
    """
    data, limit = recipe.data, min(recipe.data.max_length, context_length)
    train = in_hash_order(answered(open_rows(data.sources(data.train), data.max_bad), "training"), recipe.seed)
    if data.validation:
        rows = open_rows(data.sources(data.validation), data.max_bad)
        held_out = in_hash_order(answered(rows, "validation"), recipe.seed)
    else:
        every = train
        held_out, train = split_questions(every, math.ceil(len(every) * data.validation_fraction))
        if every and not train:
            few = _few(every.questions)
            raise UpcycleError(f"{few}: held out for the evaluation, {NOTHING_LEFT}, or data.validation")
    train = _without_questions(train, held_out, data)
    train, held_out = train[: math.ceil(len(train) * data.fraction)], held_out[: data.max_validation]
    encode = _encoder(train, held_out, tokenizer, data, limit)
    training, validation = encode(train, "training"), encode(held_out, "validation")
    if vocabulary is not None:
        for part in (training, validation):
            check_known(part, tokenizer, vocabulary)
    return training, validation


def answered(rows: Rows, name: str) -> Part:
    """The rows that have an answer, as often as their source's weight says."""
    there, copies = (rows.table[column].to_numpy() for column in ("answered", "copies"))
    if missing := len(there) - int(there.sum()):
        first = rows.table["where"][int(np.argmin(there))].as_py()
        warn(f"left out {counted(missing, f'{name} row')} with no assistant turn (first: {first})")
    return Part(rows, np.repeat(np.arange(len(rows)), np.where(there, copies, 0)).tolist())


def seed_sizes(num_rows: int, recipe: Recipe) -> tuple[int, int]:
    """Number of seed samples for fitting and for testing the router."""
    route = recipe.route
    fit = max(math.ceil(num_rows * route.seed_fraction), route.min_samples_per_expert * recipe.expand.num_experts)
    return fit, round(fit * route.test_fraction / (1 - route.test_fraction))


def most_samples_per_expert(num_rows: int, recipe: Recipe) -> int:
    """The largest `route.min_samples_per_expert` (up to the recipe's) with which half of the rows suffice; 0: none."""
    route = recipe.route
    for least in range(route.min_samples_per_expert, 0, -1):
        lower = recipe.model_copy(update={"route": route.model_copy(update={"min_samples_per_expert": least})})
        if sum(seed_sizes(num_rows, lower)) <= num_rows // 2:
            return least
    return 0


def in_hash_order(part: Part, seed: int) -> Part:
    """Shuffled by a keyed hash of the question: independent of file order, questions that look equal side by side."""
    seen, spelt = part.seen, dict[str, str]()
    for key, question in zip(seen, part.questions, strict=True):
        spelt[key] = min(spelt.get(key, question), question)
    keys = [hashlib.blake2b(f"{seed}\n{spelt[key]}".encode()).digest() for key in seen]
    return Part(part.rows, [part.numbers[place] for place in sorted(range(len(keys)), key=keys.__getitem__)])


def split_questions(part: Part, size: int) -> tuple[Part, Part]:
    """The first `size` rows and the rest, the cut moved on so that no question is on both sides."""
    size = _cut(part.seen, size)
    return part[:size], part[size:]


def cut_questions(samples: Samples, size: int) -> tuple[Samples, Samples]:
    """`split_questions` of samples."""
    size = _cut(_questions(samples), size)
    return samples[:size], samples[size:]


def _questions(samples: Samples) -> list[str]:
    known, rows = samples.encoded.rows.seen, samples.encoded.numbers("row")[samples.chosen]
    return [known[row] for row in rows]


def _cut(questions: list[str], size: int) -> int:
    while 0 < size < len(questions) and questions[size] == questions[size - 1]:
        size += 1
    return size


def _without_questions(part: Part, held_out: Part, data: DataSettings) -> Part:
    """Without the rows that ask what is held out, and perhaps without those that nearly do."""
    asked = {"the validation data": held_out.seen}
    if data.decontaminate_with:
        asked[", ".join(data.decontaminate_with)] = list(map(as_seen, questions_of(data.decontaminate_with)))
    for where, questions in asked.items():
        known = Alike(questions) if data.decontaminate == "ngram" else set(questions)
        kept = [number for number in part.numbers if part.rows.seen[number] not in known]
        if len(kept) < len(part):
            like = "is like one" if data.decontaminate == "ngram" else "is"
            warn(f"left out {counted(len(part) - len(kept), 'training row')} whose question {like} in {where}")
        part = Part(part.rows, kept)
    return part


def _encoder(
    train: Part, held_out: Part, tokenizer: Tokenizer, data: DataSettings, limit: int
) -> Callable[[Part, str], Samples]:
    """What encodes a part: both parts of one table are encoded together."""
    known: dict[str, Encoded] = {}
    if "strftime_now" in repr(tokenizer.chat_template):
        say("data: the chat template prints today's date, so rows encoded on another day differ by it")

    def tables(rows: Rows) -> Encoded:
        if rows.key not in known:
            parts = [part for part in (train, held_out) if part.rows.key == rows.key]
            wanted = sorted({number for part in parts for number in part.numbers})
            some = wanted if len(wanted) < MOST * len(rows) else None
            most = limit if data.too_long == "truncate" else None
            known[rows.key] = Encoded(rows, tuple(encoded(rows, some, tokenizer, data.turns, most)))
        return known[rows.key]

    return lambda part, name: _fitting(tables(part.rows), part, data, limit, name)


def _fitting(table: Encoded, part: Part, data: DataSettings, limit: int, name: str) -> Samples:
    places = np.array([table.places[number] for number in part.numbers], dtype=np.int64)
    places = _without_refused(table, places, data.max_bad, name)
    fits = table.lengths[places] <= limit
    if not fits.all():
        if data.too_long == "refuse":
            raise UpcycleError(_too_long(table, places, limit, name))
        warn(f"left out {counted(int((~fits).sum()), f'{name} row')} longer than {counted(limit, 'token')}")
    places = places[fits]
    learns = table.numbers("num_answer_tokens")[places] > 0
    if not learns.all():
        warn(f"left out {counted(int((~learns).sum()), f'{name} row')} that learn nothing (an empty answer, weight 0)")
    places = places[learns]
    if not len(places):
        raise UpcycleError(
            f"no {name} row is left; see the warnings above, and the weights of data.train if it has any"
        )
    if dropped := int((table.numbers("dropped")[places] > 0).sum()):
        where = counted(dropped, f"{name} row")
        say(f"data: the chat template leaves text of answers out of {where} (earlier thoughts, mostly)")
    for found in table.table["ignored"].take(places).value_counts().to_pylist():
        if what := found["values"]:
            warn(f"the chat template does not show what {counted(found['counts'], f'{name} row')} have of: {what}")
    return Samples(table, places)


def _without_refused(
    table: Encoded, places: Int[np.ndarray, " n"], max_bad: float, name: str
) -> Int[np.ndarray, " kept"]:
    """Without the rows that the chat template cannot render, or in whose rendering an answer cannot be found.

    Raises:
        UpcycleError: they are a larger share than `max_bad`.
    """
    bad = np.isin(places, list(table.refused))
    if not bad.any():
        return places
    first, count, total = table.refused[int(places[bad][0])], int(bad.sum()), len(places)
    if count > max_bad * total:
        raise UpcycleError(f"{first}; {too_many(count, total, f'{name} row', 'encoded', max_bad)}")
    warn(f"left out {share_of(count, total, f'{name} row')} that cannot be encoded (first: {first})")
    return places[~bad]


def _few(questions: Sequence[str]) -> str:
    """What is wrong if holding out a question, everything before the first answer, leaves nothing."""
    asks = counted(len(set(questions)), "question")
    return (
        f"{counted(len(questions), 'row')} with {asks} (everything before the first answer, such as "
        f"{brief(questions[0])})"
    )


def _too_long(table: Encoded, places: Int[np.ndarray, " n"], limit: int, name: str) -> str:
    lengths = table.lengths[places]
    worst = table.sample(int(places[int(lengths.argmax())]))
    longer = int((lengths > limit).sum())
    return (
        f"{counted(longer, f'{name} row')} {'is' if longer == 1 else 'are'} longer than {counted(limit, 'token')} (the "
        f"longest: {worst.where}, {len(worst.input_ids):,}); raise data.max_length, or set data.too_long=leave_out or "
        "truncate"
    )


def _seed_data(train: Samples, recipe: Recipe) -> tuple[Samples, Samples]:
    fit, test = seed_sizes(len(train), recipe)
    if fit + test > len(train) // 2:
        most, now = most_samples_per_expert(len(train), recipe), recipe.route.min_samples_per_expert
        would = f"set route.min_samples_per_expert={most} (now {now})" if most else "lower expand.num_experts"
        raise UpcycleError(
            f"the recipe asks for {fit} + {test} seed rows (for the router, and to test it), more than half of the "
            f"{counted(len(train), 'training row')}; {would}, or give more data"
        )
    seed, rest = cut_questions(train, fit + test)
    if recipe.route.seed_from == "held_out" and not len(rest):
        raise UpcycleError(f"{_few(_questions(train))}: held out to start the router, {NOTHING_LEFT}")
    return seed, rest
