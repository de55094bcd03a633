"""Several seeds in figures: mean, spread, a paired test against one of the variants."""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from upcycle.records.comparison import METRICS, Measures, Spread, Summary
from upcycle.records.record import ALL

Cells = Mapping[str, Sequence[Measures]]
"""Each variant's measures, one for each seed."""
ROUNDING = 1e-12
"""Differences of shares or losses that are alike up to it are the same."""
CONFIDENCE = 0.95


def summary(
    cells: Cells, labels: Sequence[str], settings: Sequence[Mapping[str, str]] | None = None, against: int = 0
) -> list[Summary]:
    """Mean and standard deviation over seeds of each variant, for what all have; against one of them, paired by seed.

    Args:
        labels: what the variants are called.
        settings: of the points of a sweep.
        against: place of the variant that the others are compared with.
    """
    runs_of = list(cells.values())
    columns = {metric: _column(runs_of, metric, against) for metric in METRICS if _all_have(runs_of, metric)}
    return [
        Summary(
            variant=text,
            label=labels[number],
            tokens=runs[0].total_tokens,
            flops=runs[0].total_flops or None,
            settings=dict(settings[number]) if settings else None,
            **{metric: column[number] for metric, column in columns.items()},
        )
        for number, (text, runs) in enumerate(cells.items())
    ]


def _all_have(runs_of: Sequence[Sequence[Measures]], metric: str) -> bool:
    return all(run.metric(metric) is not None for runs in runs_of for run in runs)


def _column(runs_of: Sequence[Sequence[Measures]], metric: str, against: int) -> list[Spread]:
    """Every variant in one metric, with p corrected for their number."""
    found = [values(runs, metric) for runs in runs_of]
    spreads = [over_seeds(f, None if i == against else found[against]) for i, f in enumerate(found)]
    tests = [i for i, spread in enumerate(spreads) if spread.p is not None]
    corrected = dict(zip(tests, holm([spreads[i].p or 0.0 for i in tests]), strict=True))
    return [s.model_copy(update={"p_corrected": corrected[i]}) if i in corrected else s for i, s in enumerate(spreads)]


def values(runs: Sequence[Measures], metric: str) -> dict[int, float]:
    """A metric of each run by its seed, over all domains."""
    found = ((run.seed, run.metric(metric)) for run in runs)
    return {seed: by_domain[ALL] for seed, by_domain in found if by_domain is not None}


def over_seeds(found: Mapping[int, float], reference: Mapping[int, float] | None = None) -> Spread:
    """Mean and spread; with the values of a reference, the paired test against it over the seeds that both have."""
    own = list(found.values())
    if reference is None:
        return Spread(mean=statistics.fmean(own), std=spread(own))
    gaps = [found[seed] - reference[seed] for seed in found if seed in reference]
    difference, interval, p = paired(gaps)
    return Spread(mean=statistics.fmean(own), std=spread(own), difference=difference, interval=interval, p=p)


def spread(found: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1), nan for one seed."""
    return float(np.std(found, ddof=1)) if len(found) > 1 else math.nan  # nan too if a run diverged


def paired(gaps: Sequence[float]) -> tuple[float, list[float], float]:
    """Mean of differences with the same seeds, its 95% interval, and the p-value of a two-sided paired t-test.

    Where no test can be made (one seed, or differences that are all the same) the last two are nan.
    """
    mean = statistics.fmean(gaps) if gaps else math.nan
    if len(gaps) < 2 or max(gaps) - min(gaps) <= ROUNDING * max(1.0, *map(abs, gaps)):
        return mean, [math.nan, math.nan], math.nan
    from scipy.stats import ttest_1samp

    test = ttest_1samp(gaps, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return mean, [float(low), float(high)], float(test.pvalue)


def std_text(pattern: str, value: Spread) -> str:
    """Nothing for one seed, which has no spread; `nan` of a run that diverged."""
    return "" if math.isnan(value.std) and not math.isnan(value.mean) else pattern.format(value.std)


def filled(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns of a table in which a row has something: one seed has neither spread nor tests."""
    places = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    return [heads[place] for place in places], [[row[place] for place in places] for row in rows]


def p_text(p: float | None) -> str:
    """Three digits, or `< 0.001`; nothing of the reference itself or where no test could be made."""
    if p is None or math.isnan(p):
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def holm(ps: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979, a sequentially rejective procedure); nan stays and counts not."""
    order = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    corrected, least = list(ps), 0.0
    for rank, (p, i) in enumerate(order):
        least = max(least, min(1.0, p * (len(order) - rank)))
        corrected[i] = least
    return corrected
