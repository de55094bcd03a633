"""Which router start, if one fine-tunes afterwards? Six starts x two kinds of experts x two choices of seed data.

    python benchmarks/router_starts.py --seeds 5 --out runs/router_starts

On the embedded model, with half of its rows: the recipe `quickstart` with each start, with checkpoints or copies of the
half-trained model as experts, once with seed data held out and balanced buckets, once with those of the training set
and lowest loss (the paper's). The two choices train on other rows (held-out seed data are not trained on), so they are
two comparisons. Resumable; `--only held_out` and `--only train` may run side by side with OMP_NUM_THREADS=1.
"""

import argparse
from pathlib import Path

from upcycle.compare import compare
from upcycle.reporting.figures import comparison_figure

STARTS = ("random", "mean_hidden", "kmeans", "ridge", "upit", "contrastive")
EXPERTS = ("none", "last")
SEED_DATA = {
    "held_out": "route.seed_from=held_out route.assignment=balanced",
    "train": "route.seed_from=train route.assignment=lowest_loss",
}
COMMON = "quickstart data.fraction=0.5 evaluate.models=ends"


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
            found = compare(variants, arguments.seeds, arguments.out / name, force=False)
            comparison_figure(found, arguments.out / f"{name}.png")


if __name__ == "__main__":
    main()
