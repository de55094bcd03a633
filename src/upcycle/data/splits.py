"""Who sees which sample: training, seed data (fit and test), validation."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from upcycle.console import say, track, warn
from upcycle.data.chat import Sample, encode
from upcycle.data.formats import Row
from upcycle.data.sources import read_rows
from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe
from upcycle.types import Tokenizer

Asked = TypeVar("Asked", Row, Sample)


@dataclass(frozen=True)
class SeedData:
    """Samples for the router's initialization."""

    fit: list[Sample]
    """The router is started from them."""
    test: list[Sample]
    """They only measure it."""


@dataclass(frozen=True)
class Splits:
    """Disjoint by question, except that `seed_from: train` leaves the seed data in `train`."""

    train: list[Sample]
    seed: SeedData
    validation: list[Sample]


def load_splits(recipe: Recipe, tokenizer: Tokenizer, context_length: int) -> Splits:
    """Read, encode and split the data of a recipe; says what was left out and why.

    Raises:
        UpcycleError: unreadable data, or too few rows for the seed data that the recipe asks for.
    """
    data, limit = recipe.data, min(recipe.data.max_length, context_length)
    rows = in_hash_order(read_rows(data.sources(data.train), data.max_bad), recipe.seed)
    held_out = []
    if data.validation:
        held_out = in_hash_order(read_rows(data.sources(data.validation), data.max_bad), recipe.seed)
    if not data.validation:
        held_out, rows = split_questions(rows, math.ceil(len(rows) * data.validation_fraction))
    rows = _without_questions(rows, held_out)
    rows = rows[: math.ceil(len(rows) * data.fraction)]
    train = _encode_all(rows, tokenizer, limit, "training")
    validation = _encode_all(held_out[: data.max_validation], tokenizer, limit, "validation")
    seed, rest = _seed_data(train, recipe)
    fit, test = split_questions(seed, seed_sizes(len(train), recipe)[0])
    splits = Splits(rest if recipe.route.seed_from == "held_out" else train, SeedData(fit, test), validation)
    say(
        f"data: {len(splits.train)} training rows, {len(fit)} + {len(test)} seed rows "
        f"({recipe.route.seed_from.replace('_', ' ')}), {len(validation)} validation rows"
    )
    return splits


def seed_sizes(num_rows: int, recipe: Recipe) -> tuple[int, int]:
    """Number of seed samples for fitting and for testing the router."""
    route = recipe.route
    fit = max(math.ceil(num_rows * route.seed_fraction), route.min_samples_per_expert * recipe.expand.num_experts)
    return fit, round(fit * route.test_fraction / (1 - route.test_fraction))


def in_hash_order(rows: Sequence[Row], seed: int) -> list[Row]:
    """Shuffled by a keyed hash of the question: independent of file order, equal questions side by side."""
    return sorted(rows, key=lambda row: hashlib.blake2b(f"{seed}\n{row.question}".encode()).digest())


def split_questions(rows: Sequence[Asked], size: int) -> tuple[list[Asked], list[Asked]]:
    """The first `size` rows and the rest, the cut moved on so that no question is on both sides."""
    while 0 < size < len(rows) and rows[size].question == rows[size - 1].question:
        size += 1
    return list(rows[:size]), list(rows[size:])


def _without_questions(rows: list[Row], held_out: list[Row]) -> list[Row]:
    questions = {row.question for row in held_out}
    kept = [row for row in rows if row.question not in questions]
    if len(kept) < len(rows):
        warn(f"left out {len(rows) - len(kept)} training rows whose question is in the validation data")
    return kept


def _encode_all(rows: list[Row], tokenizer: Tokenizer, limit: int, name: str) -> list[Sample]:
    answered = [row for row in rows if row.has_answer]
    if len(answered) < len(rows):
        first = next(row for row in rows if not row.has_answer)
        warn(f"left out {len(rows) - len(answered)} {name} rows with no assistant turn (first: {first.where})")
    samples = [encode(row, tokenizer) for row in track(answered, f"encoding {name} rows")]
    fitting = [s for s in samples if len(s.input_ids) <= limit]
    if len(fitting) < len(samples):
        warn(f"left out {len(samples) - len(fitting)} {name} rows longer than {limit} tokens")
    kept = [s for s in fitting if s.num_answer_tokens]
    if len(kept) < len(fitting):
        warn(f"left out {len(fitting) - len(kept)} {name} rows whose answer is empty")
    if not kept:
        raise UpcycleError(f"no {name} row is left of {len(rows)}; see the warnings above")
    return kept


def _seed_data(train: list[Sample], recipe: Recipe) -> tuple[list[Sample], list[Sample]]:
    size = sum(seed_sizes(len(train), recipe))
    if size > len(train) // 2:
        raise UpcycleError(
            f"the recipe asks for {size} seed rows, more than half of the {len(train)} training rows; lower "
            f"route.min_samples_per_expert (now {recipe.route.min_samples_per_expert}), route.seed_fraction or "
            "expand.num_experts, or give more data"
        )
    return split_questions(train, size)
