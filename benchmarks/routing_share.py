"""What share of the training time goes into everything between preparation and post-training?

    python benchmarks/routing_share.py --out runs/share "quickstart"
    python benchmarks/routing_share.py --out runs/share135 "smollm2-cpu base=FOLDER data.train=ROWS data.fraction=..."

The paper's schedule: 4 epochs (2 dense, 2 MoE), 1% seed data, 8 experts. Runs expand, assemble and route, and the two
trainings, of one recipe. Where 1% of the rows are fewer than two samples for each expert, more seed samples are taken,
and the training time is scaled to the rows of which they would be 1% (it grows with the rows; the scale is printed).
"""

import argparse
import shlex
from pathlib import Path

from upcycle.console import say, table
from upcycle.pipeline.costs import read_costs
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import load_recipe

EPOCHS, SEED_FRACTION = 2, 0.01
SCHEDULE = (
    f"prepare.epochs={EPOCHS}",
    f"posttrain.epochs={EPOCHS}",
    f"posttrain.checkpoint_every={EPOCHS}",
    f"route.seed_fraction={SEED_FRACTION}",
    "route.min_samples_per_expert=2",
    "route.test_fraction=0",
    "route.epochs=4",
    "expand.num_experts=8",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe and its overrides, in one argument")
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    arguments = parser.parse_args()
    recipe, *overrides = shlex.split(arguments.recipe)
    run = Run(load_recipe(recipe, [*overrides, *SCHEDULE]), arguments.out)
    run_stages(run, ("prepare", "expand", "assemble", "route", "posttrain"))
    times = {stage: cost.seconds for stage, cost in read_costs(run.folder).items()}
    seed_rows, rows = len(run.splits.seed.fit), len(run.splits.train)
    scale = max(1.0, seed_rows / (SEED_FRACTION * rows))
    training = (times["prepare"] + times["posttrain"]) * scale
    between = {stage: times[stage] for stage in ("expand", "assemble", "route")}
    lines = [(stage, f"{seconds:.1f}", f"{seconds / training:.2%}") for stage, seconds in between.items()]
    lines.append(("together", f"{sum(between.values()):.1f}", f"{sum(between.values()) / training:.2%}"))
    table("between preparation and post-training", ("stage", "seconds", "share of the training time"), lines)
    say(f"{rows} rows, {seed_rows} seed rows; training {training / scale:.1f} s, scaled by {scale:.1f}")


if __name__ == "__main__":
    main()
