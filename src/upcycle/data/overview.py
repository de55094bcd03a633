"""What data hold, before anything is trained on them: what one looks at first."""

import statistics
from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from upcycle.console import console, table, tell, visible
from upcycle.data.chat import Sample
from upcycle.data.samples import by_domain, lengths, num_answer_tokens
from upcycle.errors import counted
from upcycle.records.record import ALL
from upcycle.routing.batch import IGNORED
from upcycle.types import Tokenizer

SHOWN = 3
LEARNED, MARKS = "bold green", "»«"
LONGEST = 1500
"""Tokens of a sample that are shown."""
COLUMNS = ("domain", "rows", "tokens", "mean", "median", "95% within", "longest", "learned")


def overview(train: Sequence[Sample], tokenizer: Tokenizer) -> None:
    """Print tokens by domain of what will be trained on, and three samples with the learned part in colour."""
    show_domains(train)
    for sample in _some(train, by_domain(train)):
        how = "in colour" if console.is_terminal else f"between {MARKS[0]} and {MARKS[1]}"
        console.print(visible(f"\n{sample.where} ({sample.domain}), learned {how}:"), style="bold", markup=False)
        console.print(coloured(sample, tokenizer))


def show_domains(train: Sequence[Sample]) -> None:
    """Print rows and tokens by domain."""
    parts = by_domain(train)
    rows = [_row("(no domain)" if name == ALL and len(parts) > 1 else name, some) for name, some in parts.items()]
    if len(rows) > 1:
        rows.append(_row(ALL, train))
    note = "mean to longest: tokens of a row; learned: share of the tokens that the loss covers"
    table("training rows", COLUMNS, rows, note=note)
    tell(f"{counted(sum(lengths(train)), 'token')} an epoch, of which {num_answer_tokens(train):,} are learned")


def _row(name: str, samples: Sequence[Sample]) -> tuple[str, ...]:
    found = sorted(lengths(samples))
    total, within = sum(found), found[min(len(found) - 1, int(0.95 * len(found)))]
    figures = (len(found), total, round(total / len(found)), round(statistics.median(found)), within, found[-1])
    return (name, *(f"{figure:,}" for figure in figures), f"{num_answer_tokens(samples) / total:.0%}")


def _some(samples: Sequence[Sample], parts: dict[str, Sequence[Sample]]) -> list[Sample]:
    """Of several domains, as far as they go; no row twice."""
    firsts = [some[0] for some in parts.values()]
    others = [samples[place] for place in range(min(len(samples), 2 * SHOWN))]
    return list({sample.where: sample for sample in (*firsts, *others)}.values())[:SHOWN]


def coloured(sample: Sample, tokenizer: Tokenizer) -> Text:
    """The rendered chat; what is learned in colour."""
    text = Text()
    pairs = list(zip(sample.input_ids, sample.labels, strict=True))[:LONGEST]
    for learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        said = visible(str(tokenizer.decode([token for token, _ in run])))
        marked = learned and not console.is_terminal
        text.append(f"{MARKS[0]}{said}{MARKS[1]}" if marked else said, style=LEARNED if learned else "")
    if len(sample.input_ids) > LONGEST:
        text.append(f" ... {len(sample.input_ids) - LONGEST} more tokens")
    return text
