"""Which of UpIT's parts does what? The paper's ablations, one part changed at a time, on the embedded model.

    python benchmarks/ablation.py --seeds 5 --out runs/ablation        # about 35 minutes on one thread

The recipe `upit-paper` with half of the quickstart's rows: 2 epochs of full tuning leave 8 checkpoints, four of them
(evenly spaced) are expanded to 8 experts, top-2; 2 epochs of post-training. All train on the same rows; the stages that
two variants share are made once. The first row is what the others are compared with. Resumable.
"""

import argparse
from pathlib import Path

from methods import COMMON, FULL

from upcycle.reporting.figures import comparison_figure
from upcycle.studies.compare import compare

FOUR = "expand.num_checkpoints=4"
ABLATIONS = {
    "UpIT": FOUR,
    "no expansion, all checkpoints": "expand.num_checkpoints=8",
    "random parents": f"{FOUR} expand.parents=random",
    "first half of the checkpoints": f"{FOUR} expand.select=first",
    "last half of the checkpoints": f"{FOUR} expand.select=last",
    "no router start": f"{FOUR} route.start=random",
    "router start on random buckets": f"{FOUR} route.assignment=random",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    common = f"upit-paper {FULL} {COMMON} prepare.checkpoint_every=0.25 expand.num_experts=8"
    texts = [f"{name}: {common} {changed}" for name, changed in ABLATIONS.items()]
    # forced: the paper's start of the router trains on some tokens of its own; the table says on how many
    found = compare(texts, arguments.seeds, arguments.out, force=True)
    comparison_figure(found, arguments.out / "ablation.png")


if __name__ == "__main__":
    main()
