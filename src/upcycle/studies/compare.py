"""Recipes side by side: the same data, the same number of training tokens, several seeds, a paired test."""

from collections.abc import Sequence
from pathlib import Path

from upcycle.console import say, table
from upcycle.errors import UpcycleError
from upcycle.records.comparison import METRICS, Comparison
from upcycle.records.files import COMPARISON
from upcycle.studies.cells import Benchmark, labels, run_cells
from upcycle.studies.statistics import Cells, summary


def compare(
    texts: Sequence[str],
    seeds: int,
    out: Path,
    force: bool,
    keep_models: bool = True,
    benchmark: Benchmark | None = None,
) -> Comparison:
    """Run every variant with every seed and write `comparison.json`; resumable.

    Args:
        force: compare all the same if variants saw other data or another number of training tokens.
        keep_models: without, the weights of a seed's runs are deleted once all of them are measured.
        benchmark: scores a finished run on benchmarks.

    Raises:
        UpcycleError: the variants are not comparable (after the first seed), and `force` is not given.
    """

    def refuse(cells: Cells) -> None:
        if problems := differences(cells):
            raise UpcycleError(f"{'; '.join(problems)}; such a comparison says little (--force makes it all the same)")

    check = (lambda _: None) if force else refuse
    cells = run_cells(texts, seeds, out, keep_models, benchmark, check)
    found = Comparison(variants=cells, summary=summary(cells, labels(texts)), not_comparable=differences(cells))
    COMPARISON.write(out, found)
    show(found)
    return found


def differences(cells: Cells) -> list[str]:
    """What makes the variants not comparable: different data, or a different number of training tokens for a seed.

    Training tokens are those of all stages, the router's start included.
    """
    problems = []
    for runs in zip(*cells.values(), strict=True):
        seed = runs[0].seed
        if len({run.data for run in runs}) > 1:
            problems.append(f"seed {seed}: the variants saw different data")
        totals = {text: run.total_tokens for text, run in zip(cells, runs, strict=True)}
        if len(set(totals.values())) > 1:
            listed = ", ".join(f"{text}: {total:,}" for text, total in totals.items())
            problems.append(f"seed {seed}: different numbers of training tokens ({listed})")
    return problems


def show(found: Comparison) -> None:
    """The table on the terminal."""
    for metric in found.metrics:
        pattern, lines = METRICS[metric], []
        for row in found.summary:
            value = row.metric(metric)
            gap = "" if value.difference is None else pattern.format(value.difference)
            p = "" if value.p is None else f"{value.p:.3f}"
            lines.append((row.label, pattern.format(value.mean), pattern.format(value.std), gap, p))
        tokens = " or ".join(f"{count:,}" for count in sorted({row.tokens for row in found.summary}))
        title = f"{metric.replace('_', ' ')} of the MoE, {found.seeds} seeds, {tokens} training tokens each"
        table(title, ("variant", "mean", "std", "against the first", "p (paired)"), lines)
    for problem in found.not_comparable:
        say(f"NOT COMPARABLE: {problem}")
