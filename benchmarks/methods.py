"""Every upcycling method at the same number of training tokens, on the embedded model.

    python benchmarks/methods.py --seeds 5 --out runs/methods        # about 100 minutes on one thread

Half of the quickstart's rows, a budget of 4 epochs, 8 experts top-2 (one for the dense baselines), held-out seed rows
for all, so that all train on the same rows. Learning rate 1e-3 for full tensors, 3e-3 for adapters of rank 8. The first
row, dense tuning for the whole budget, is what the others are compared with. Resumable.
"""

import argparse
from pathlib import Path

from upcycle.reporting.figures import comparison_figure
from upcycle.studies.compare import compare

COMMON = (
    "base=builtin:tiny data.train=builtin:train data.validation=builtin:validation data.max_length=128 "
    "data.fraction=0.5 "
    "prepare.checkpoint_every=0.5 prepare.batch_size=32 prepare.micro_batch_size=32 "
    "posttrain.checkpoint_every=2 posttrain.batch_size=32 posttrain.micro_batch_size=32 evaluate.models=ends"
)
FULL = "prepare.learning_rate=1e-3 posttrain.learning_rate=1e-3"
ADAPTERS = "prepare.learning_rate=3e-3 posttrain.learning_rate=3e-3 lora.rank=8 lora.alpha=16"
EIGHT = "expand.num_experts=8"
ONE = "route.min_samples_per_expert=160"  # as many seed rows as eight experts have
METHODS = [
    f"sft: sft {FULL} {ONE}",
    *(f"{name}: {name} {FULL} {EIGHT}" for name in ("vanilla", "vanilla-sft", "noise", "drop", "btx", "upit")),
    f"upit-paper: upit-paper {FULL} {EIGHT} route.seed_from=held_out",
    f"sft (LoRA): sft {ADAPTERS} {ONE} prepare.train=lora",
    *(f"{name}: {name} {ADAPTERS} {EIGHT}" for name in ("lora-moe", "self-moe", "upit-lora", "pesc")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    # forced: the paper's start of the router trains on some tokens of its own; the table says on how many
    found = compare([f"{method} {COMMON}" for method in METHODS], arguments.seeds, arguments.out, force=True)
    comparison_figure(found, arguments.out / "methods.png")


if __name__ == "__main__":
    main()
