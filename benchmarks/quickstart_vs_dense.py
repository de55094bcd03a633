"""Is the quickstart's MoE better than going on with the dense model? Same rows, same number of training tokens.

    python benchmarks/quickstart_vs_dense.py --seeds 3 --out runs/quickstart_vs_dense

Per seed: the recipe `quickstart` (2 epochs dense, FFN only; 2 epochs MoE), and two dense models of 4 epochs: the last
checkpoint tuned on for the same 2 epochs with the same settings, FFN only and fully. Prints mean and standard
deviation over seeds of held-out loss and exact match. Resumable: what is complete is not done again.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from upcycle.evaluation.score import score
from upcycle.models.folders import load_model
from upcycle.pipeline import run_stages
from upcycle.recipe import Recipe, load_recipe
from upcycle.run import MOE, Run
from upcycle.settings import TrainingSettings

BEST = "best checkpoint (2 epochs)"


def dense_continuation(moe: Run, train: str, folder: Path) -> Run:
    """The last checkpoint, tuned on as a dense model with the settings of the MoE's post-training."""
    recipe, last = moe.recipe, moe.checkpoint_folders[-1]
    post = recipe.posttrain.model_dump(include=set(TrainingSettings.model_fields))
    values = recipe.model_dump() | {"base": str(last)}
    values["prepare"] = {**post, "checkpoint_every": recipe.posttrain.epochs / 2, "train": train}
    run = Run(Recipe.model_validate(values), folder)
    run_stages(run, ("prepare",))
    return run


def scores_of_seed(seed: int, out: Path) -> dict[str, Any]:
    """Loss and exact match of each contender, and the training tokens it saw."""
    moe = Run(load_recipe("quickstart", [f"seed={seed}"]), out / f"moe-{seed}")
    run_stages(moe)
    known = json.loads((moe.folder / "evaluate" / "scores.json").read_text())
    dense = {name: entry for name, entry in known.items() if name.startswith("checkpoint-")}
    prepared = tokens(moe, "prepare")
    found = {
        BEST: (min(dense.values(), key=lambda entry: entry["loss"]["all"]), prepared),
        "MoE": (known[MOE], prepared + tokens(moe, "posttrain")),
    }
    for train in ("ffn", "full"):
        run = dense_continuation(moe, train, out / f"dense-{train}-{seed}")
        model = load_model(run.checkpoint_folders[-1], torch.float32)
        entry = score(model, run.tokenizer, moe.splits.validation, moe.recipe.evaluate, f"dense {train}", is_moe=False)
        found[f"dense, 2 epochs more ({train})"] = (entry, prepared + tokens(run, "prepare"))
    return found


def tokens(run: Run, stage: str) -> int:
    return int(json.loads((run.folder / stage / "log.json").read_text())["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_vs_dense"))
    arguments = parser.parse_args()
    seeds = [scores_of_seed(seed, arguments.out) for seed in range(arguments.seeds)]
    print(f"\n{'model':34} {'training tokens':>16} {'held-out loss':>18} {'exact match':>18}   ({len(seeds)} seeds)")
    for name in seeds[0]:
        seen = {entry[name][1] for entry in seeds}
        cells = []
        for metric, pattern in (("loss", "{:.3f} +- {:.3f}"), ("exact_match", "{:.1%} +- {:.1%}")):
            values = [entry[name][0][metric]["all"] for entry in seeds]
            cells.append(pattern.format(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0))
        print(f"{name:34} {'/'.join(f'{t:,}' for t in sorted(seen)):>16} {cells[0]:>18} {cells[1]:>18}")


if __name__ == "__main__":
    main()
