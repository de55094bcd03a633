"""The first screen: did it help, by how much, against what, and is that noise?"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from upcycle.records.comparison import METRICS, Dense, Found, Measures, Spread
from upcycle.records.record import ALL
from upcycle.records.scores import BASE
from upcycle.reporting.charts import with_error
from upcycle.studies.statistics import over_seeds, p_text, summary, values

WORDS = {"loss": "held-out loss", "exact_match": "exact match", "benchmark": "mean over benchmarks"}
ALPHA = 0.05
ENOUGH = 5
"""Seeds that a comparison should have."""
ONE_SEED = (
    f"There is one seed, so this cannot be told from noise; {ENOUGH} would tell (upcycle compare ... --seeds {ENOUGH})."
)


@dataclass(frozen=True)
class Line:
    """One metric of the MoE beside that of another model."""

    metric: str
    gap: str
    """`0.0863 lower`"""
    values: str
    """`0.3310, against 0.4172`"""
    noise: str
    """Interval and p; empty for one seed."""
    sure: str
    """`better` or `worse` where that is more than noise; else empty."""


@dataclass(frozen=True)
class Card:
    """The MoE against another model."""

    heading: str
    lines: Sequence[Line]
    note: str = ""
    command: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the first screen says."""

    lead: str
    noise: str
    cards: Sequence[Card]


def on_the_way(runs: Sequence[Measures]) -> list[Card]:
    """Against the base and the last checkpoint, which have seen fewer training tokens; a run for each seed."""
    models = [run.dense or {} for run in runs]
    names = list(models[0])
    last = [names[-1]] if names and names[-1] != BASE and not any(run.by_domain for run in runs) else []
    cards = []
    for name in [BASE, *last]:
        known = {run.seed: found[name] for run, found in zip(runs, models, strict=True) if name in found}
        heading, note = "Against the base", "It has seen none of the training tokens."
        if name != BASE:
            heading, note = f"Against the last checkpoint ({name})", "It has seen fewer training tokens."
        if len(known) == len(runs):
            cards.append(Card(heading, _against(runs, known), note))
    return cards


def _against(runs: Sequence[Measures], known: Mapping[int, Dense]) -> list[Line]:
    lines = []
    for metric in ("loss", "exact_match"):
        own = values(runs, metric)
        found = {seed: entry[ALL] for seed, model in known.items() if (entry := getattr(model, metric)) is not None}
        if len(own) == len(found) == len(runs):
            lines.append(line(metric, over_seeds(own, found), over_seeds(found)))
    return lines


def against_variant(found: Found, number: int, other: int, heading: str) -> Card:
    """A variant of a comparison against another one, by the comparison's own statistics.

    Args:
        number: place of the variant.
        other: place of the other one.
    """
    labels = [row.label for row in found.summary]
    is_reference = found.summary[other].metric("loss").difference is None
    rows = found.summary if is_reference else summary(found.variants, labels, against=other)
    lines = [line(metric, rows[number].metric(metric), rows[other].metric(metric)) for metric in found.metrics]
    return Card(heading, lines)


def _budget(found: Found, number: int, other: int) -> str:
    """Training tokens of both, and the FLOPs of the one in those of the other."""
    own, its = found.summary[number], found.summary[other]
    alike = own.tokens == its.tokens
    tokens = (
        f"Both saw {own.tokens:,} training tokens"
        if alike
        else f"“{own.label}” saw {own.tokens:,} training tokens, “{its.label}” {its.tokens:,}"
    )
    if not (own.flops and its.flops):
        return f"{tokens}."
    return f"{tokens}; “{own.label}” took {own.flops / its.flops:.2f} times the training FLOPs of “{its.label}”."


def line(metric: str, own: Spread, other: Spread) -> Line:
    """
    Args:
        own: with the difference to the other.
    """
    pattern, gap = METRICS[metric], own.difference
    both = [with_error(pattern, value.mean, 0.0 if math.isnan(value.std) else value.std) for value in (own, other)]
    if gap is None or not math.isfinite(gap):
        return Line(WORDS[metric], "diverged", ", against ".join(both), "", "")
    better = gap < 0 if metric == "loss" else gap > 0
    sure = ("better" if better else "worse") if is_sure(own) else ""
    return Line(WORDS[metric], gap_text(metric, gap), ", against ".join(both), noise(metric, own), sure)


def gap_text(metric: str, gap: float) -> str:
    """`0.0863 lower`, `2.0 points higher`"""
    size = f"{abs(gap):.4f}" if metric == "loss" else f"{abs(100 * gap):.1f} points"
    return f"{size} {'lower' if gap < 0 else 'higher'}" if float(size.split()[0]) else "no difference"


def is_sure(own: Spread) -> bool:
    """Whether a difference is more than noise, counting all tests of its comparison."""
    p = own.p if own.p_corrected is None else own.p_corrected
    return p is not None and p < ALPHA  # never of nan


def noise(metric: str, own: Spread) -> str:
    """Whether a difference is more than noise, with interval and p of the paired test; empty without a test."""
    if own.interval is None or own.p is None or math.isnan(own.p):
        return ""
    ends = " to ".join(f"{end:+.4f}" if metric == "loss" else f"{100 * end:+.1f}" for end in own.interval)
    holm = own.p_corrected
    corrected = "" if holm is None or holm == own.p else f", {p_text(holm)} after Holm"
    verdict = "more than noise" if is_sure(own) else "not more than noise"
    return f"{verdict}: 95% interval {ends}, p {p_text(own.p)}{corrected}"


def sentence(name: str, card: Card) -> str:
    """`UpIT has a held-out loss of 0.3310, 0.0016 lower than dense tuning.`"""
    first, other = card.lines[0], card.heading.removeprefix("Against ")
    value = first.values.split(",")[0]
    if first.gap == "diverged":
        return f"{name} or {other} has no finite held-out loss: a training diverged."
    than = f"the same as {other}" if first.gap == "no difference" else f"{first.gap} than {other}"
    return f"{name} has a held-out loss of {value}, {than}."


def noise_sentence(card: Card, seeds: int) -> str:
    """Whether that is noise."""
    if seeds == 1:
        return ONE_SEED
    said = card.lines[0].noise
    if not said:
        return "No paired test could be made of these seeds."
    few = "" if seeds >= ENOUGH else f" So few seeds show large differences only; --seeds {ENOUGH} shows smaller ones."
    return f"Over {seeds} seeds, paired, that is {said}.{few}"


def of_variant(found: Found, number: int, dense: int | None, name: str) -> Verdict:
    """A variant of a comparison against the dense one; without such a one, against the reference.

    Args:
        number: place of the variant.
        dense: place of the dense one.
        name: what the variant is called in a sentence.
    """
    runs = list(found.variants.values())[number]
    cards, budget = on_the_way(runs), ""
    reference = next(n for n, row in enumerate(found.summary) if row.metric("loss").difference is None)
    other = reference if dense is None else dense
    if other != number:
        label = found.summary[other].label
        heading = f"Against “{label}”" if dense is None else f"Against dense tuning (“{label}”)"
        cards.append(against_variant(found, number, other, heading))
        budget = f" {_budget(found, number, other)}"
    if not cards:
        return Verdict(f"{name} has a held-out loss of {found.summary[number].metric('loss').mean:.4f}.", "", cards)
    cards.reverse()
    return Verdict(sentence(name, cards[0]) + budget, noise_sentence(cards[0], len(runs)), cards)


def of_run(measures: Measures, dense: bool, command: str) -> Verdict:
    """A run by itself.

    Args:
        dense: whether it is dense tuning.
        command: that would compare it with dense tuning.
    """
    cards = on_the_way([measures])[::-1]
    lead = sentence("The model" if dense else "The MoE", cards[0])
    if dense:
        return Verdict(f"{lead} It has one expert: this is dense tuning.", ONE_SEED, cards)
    missing = Card(
        "Against dense tuning", (), "No dense model was tuned for as many training tokens. This does it:", command
    )
    lead += f" That model saw fewer than the MoE's {measures.total_tokens:,} training tokens: what upcycling itself "
    return Verdict(f"{lead}gave is not known without dense tuning for as many.", ONE_SEED, [*cards, missing])
