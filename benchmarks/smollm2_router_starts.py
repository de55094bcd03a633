"""Which router start, on a real model and real instruction data?

    python benchmarks/smollm2_router_starts.py --base SMOLLM2_FOLDER --data DATA_FOLDER --out runs/smollm2_starts
    python benchmarks/smollm2_router_starts.py --base ... --data ... --out ... --size full      # on a GPU

DATA_FOLDER has `instruct/*.jsonl.gz` and `instruct_valid.jsonl.gz`. Four checkpoints are the four experts, top-2,
three seeds. The size `cpu` compares two starts on 0.2% of the rows, about an hour on two cores; `full` compares six
starts with checkpoints and with copies of the half-trained model as experts, on all rows; `toy` is for any model and a
few rows. Resumable.
"""

import argparse
from pathlib import Path

from smollm2_methods import inputs

from upcycle.reporting.figures import comparison_figure
from upcycle.studies.cells import Study
from upcycle.studies.compare import compare

STARTS = ("random", "mean_hidden", "kmeans", "ridge", "upit", "contrastive")
EXPERTS = ("none", "last")
"""Checkpoints and their children, or copies of the last (`expand.copies_of`)."""

CPU = "data.fraction=0.002"
FULL = (
    "data.fraction=1 data.max_length=1024 data.max_validation=1000 route.min_samples_per_expert=100 "
    "prepare.batch_size=64 prepare.micro_batch_size=32 posttrain.batch_size=64 posttrain.micro_batch_size=32 "
    "route.tokens_per_batch=32768 evaluate.tokens_per_batch=32768 evaluate.max_generated=500"
)
VARIANTS = {
    "toy": [
        f"data.fraction=1 data.max_length=96 route.min_samples_per_expert=2 route.start={start}"
        for start in ("random", "upit")
    ],
    "cpu": [f"{CPU} route.start={start}" for start in ("random", "upit")],
    "full": [f"{FULL} expand.copies_of={copies} route.start={start}" for copies in EXPERTS for start in STARTS],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=VARIANTS, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    common = f"smollm2-cpu {inputs(arguments.base, arguments.data)} expand.num_experts=4 evaluate.models=ends"
    variants = [f"{common} {variant}" for variant in VARIANTS[arguments.size]]
    # forced: the paper's start of the router trains on some tokens of its own; the table says on how many
    found = compare(Study(variants, range(arguments.seeds), arguments.out), force=True)
    comparison_figure(found, arguments.out / "comparison.png")


if __name__ == "__main__":
    main()
