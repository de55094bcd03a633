"""Several seeds in figures: mean, spread, a paired test against the first variant."""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from upcycle.records.comparison import METRICS, Measures, Spread, Summary
from upcycle.records.record import ALL

Cells = Mapping[str, Sequence[Measures]]
"""Each variant's measures, one for each seed."""


def summary(cells: Cells, labels: Sequence[str], settings: Sequence[Mapping[str, str]] | None = None) -> list[Summary]:
    """Mean and standard deviation over seeds of each variant, for what all have; against the first, paired by seed.

    Args:
        labels: what the variants are called.
        settings: of the points of a sweep.
    """
    first = next(iter(cells.values()))
    metrics = [m for m in METRICS if all(run.metric(m) is not None for runs in cells.values() for run in runs)]
    rows = []
    for number, (text, runs) in enumerate(cells.items()):
        spreads = {m: over_seeds(values(runs, m), None if runs is first else values(first, m)) for m in metrics}
        rows.append(
            Summary(
                variant=text,
                label=labels[number],
                tokens=runs[0].total_tokens,
                settings=dict(settings[number]) if settings else None,
                **spreads,
            )
        )
    return rows


def values(runs: Sequence[Measures], metric: str) -> list[float]:
    """A metric of each run, over all domains."""
    found = (run.metric(metric) for run in runs)
    return [by_domain[ALL] for by_domain in found if by_domain is not None]


def over_seeds(found: Sequence[float], reference: Sequence[float] | None = None) -> Spread:
    """Mean and spread; with the values of a reference for the same seeds, the paired test against it."""
    difference, p = paired(found, reference) if reference is not None else (None, None)
    return Spread(mean=statistics.fmean(found), std=spread(found), difference=difference, p=p)


def spread(found: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1), nan for one seed."""
    return float(np.std(found, ddof=1)) if len(found) > 1 else math.nan  # nan too if a run diverged


def paired(found: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """Mean difference to the reference with the same seeds, and the p-value of a paired t-test (two-sided)."""
    gaps = [a - b for a, b in zip(found, reference, strict=True)]
    if len(gaps) < 2 or len(set(gaps)) == 1:
        return statistics.fmean(gaps), math.nan
    from scipy.stats import ttest_rel

    return statistics.fmean(gaps), float(ttest_rel(found, reference).pvalue)
