"""Which router start, if one fine-tunes afterwards? Six starts x two kinds of experts x two choices of seed data.

    python benchmarks/router_starts.py --seeds 5 --out runs/router_starts

On the embedded model, with half of its rows: the recipe `quickstart` with each start, with checkpoints or copies of the
half-trained model as experts, once with seed data held out and balanced buckets, once with those of the training set
and lowest loss (the paper's). The two choices train on other rows (held-out seed data are not trained on), so they are
two comparisons. Resumable; `--only held_out` and `--only train` may run side by side with OMP_NUM_THREADS=1. When both
are there, prints one table of them: loss after post-training and before it, how often the router ranks the assigned
expert of unseen seed samples first, and paired tests over all pairs of a seed and a column.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

from upcycle.console import say, table
from upcycle.records.files import COMPARISON, ROUTE_REPORT, SCORES, run_of
from upcycle.records.record import ALL
from upcycle.records.scores import MOE, MOE_INIT
from upcycle.reporting.figures import comparison_figure
from upcycle.studies.compare import compare
from upcycle.studies.statistics import paired, spread

STARTS = ("random", "mean_hidden", "kmeans", "ridge", "upit", "contrastive")
EXPERTS = ("none", "last")
SEED_DATA = {
    "held_out": "route.seed_from=held_out route.assignment=balanced",
    "train": "route.seed_from=train route.assignment=lowest_loss",
}
COMMON = "quickstart data.fraction=0.5 evaluate.models=ends"


def ranks_first(cell: Path) -> float:
    held_out = ROUTE_REPORT.read_of(cell).held_out
    assert held_out is not None
    return held_out.accuracy


MEASURES: dict[str, Callable[[Path], float]] = {
    "loss after post-training": lambda cell: SCORES.read_of(cell)[MOE].loss[ALL],
    "loss before post-training": lambda cell: SCORES.read_of(cell)[MOE_INIT].loss[ALL],
    "ranks the assigned expert first": ranks_first,
}


def folder(out: Path, name: str, copies: str, start: str, seed: int) -> Path:
    """Of a cell, as `compare` numbers the variants."""
    return run_of(out / name, EXPERTS.index(copies) * len(STARTS) + STARTS.index(start), seed)


def show_all(out: Path, seeds: int) -> None:
    """Each measure by start and column, and each start against `random` over all columns, paired by seed."""
    columns = list(itertools.product(SEED_DATA, EXPERTS))
    for title, measure in MEASURES.items():
        found = {
            (name, copies, start): [measure(folder(out, name, copies, start, seed)) for seed in range(seeds)]
            for name, copies in columns
            for start in STARTS
        }
        rows = []
        for start in STARTS:
            cells = [found[*column, start] for column in columns]
            flat, reference = ([v for c in columns for v in found[*c, which]] for which in (start, "random"))
            difference, p = paired(flat, reference)
            against = [f"{difference:+.3f}", f"{p:.3f}"] if start != "random" else ["", ""]
            rows.append((start, *(f"{statistics.fmean(v):.3f} +- {spread(v):.3f}" for v in cells), *against))
        heads = [f"{'copies' if copies == 'last' else 'checkpoints'}, {name}" for name, copies in columns]
        table(title, ("start", *heads, "against random", "p"), rows)
        both = [[v for n in SEED_DATA for start in STARTS for v in found[n, copies, start]] for copies in EXPERTS]
        difference, p = paired(*both)
        say(f"{title}: checkpoints against copies {difference:+.4f} (p {p:.2f}, {len(both[0])} pairs)")
        within = [paired(found[*c, s], found[*c, "random"])[1] for c in columns for s in STARTS if s != "random"]
        say(f"{title}: smallest p of the {len(within)} tests against random within a column: {min(within):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=SEED_DATA, help="one of the two choices of seed data")
    arguments = parser.parse_args()
    for name, choice in SEED_DATA.items():
        if arguments.only in (None, name):
            variants = [
                f"{COMMON} {choice} route.start={start} expand.copies_of={copies}"
                for copies in EXPERTS
                for start in STARTS
            ]
            # forced: the starts' own training tokens differ, which is part of what is compared
            found = compare(variants, arguments.seeds, arguments.out / name, force=True)
            comparison_figure(found, arguments.out / f"{name}.png")
    if all(COMPARISON.of(arguments.out / name).exists() for name in SEED_DATA):
        show_all(arguments.out, arguments.seeds)


if __name__ == "__main__":
    main()
