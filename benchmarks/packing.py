"""How much quicker is a training whose rows lie side by side (`pack_rows`) than a padded one?

    OMP_NUM_THREADS=1 python benchmarks/packing.py "quickstart" --rows 640 --rounds 3

Trains the dense model of a recipe on the same rows, with and without, in turn, and prints seconds and their ratio.
"""

import argparse
import shlex
import tempfile
import time
from pathlib import Path
from statistics import median

from upcycle.console import say, table
from upcycle.pipeline.run import Run
from upcycle.recipe import load_recipe
from upcycle.training.fine_tune import fine_tune
from upcycle.training.training import Training


def seconds(run: Run, rows: int, packed: bool) -> float:
    """Of one epoch over the first rows, without what comes before and after it."""
    recipe = run.recipe
    once = {"epochs": 1.0, "checkpoint_every": 1.0, "pack_rows": packed}
    model, samples = run.kind.trainable(run.base, recipe.lora, recipe.seed, recipe.devices), run.splits.train[:rows]
    with tempfile.TemporaryDirectory() as folder:
        training = Training(recipe.prepare.model_copy(update=once), recipe.seed, f"packed: {packed}", Path(folder))
        begin = time.perf_counter()
        fine_tune(model, run.base.tokenizer, samples, training)
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a recipe and its overrides, in one argument")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    recipe, *overrides = shlex.split(arguments.recipe)
    run = Run(load_recipe(recipe, overrides), Path())
    lengths = [len(sample.input_ids) for sample in run.splits.train[: arguments.rows]]
    size = run.recipe.prepare.micro_batch_size
    batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    filled = sum(lengths) / sum(len(batch) * max(batch) for batch in batches)
    say(f"{len(lengths)} rows, micro-batches of {size}: {filled:.0%} of a padded batch are tokens of rows")
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for packed, times in found.items():
            times.append(seconds(run, arguments.rows, packed))
    padded, packed = median(found[False]), median(found[True])
    lines = [("padded", f"{padded:.1f}", "1.00"), ("side by side", f"{packed:.1f}", f"{padded / packed:.2f}")]
    table("one epoch of the dense model", ("batches", "seconds (median)", "times as quick"), lines)


if __name__ == "__main__":
    main()
