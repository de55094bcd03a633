"""Does it scale? 8 to 64 experts of a small model: seconds against bytes written, planning alone; and memory.

    python benchmarks/many_experts.py --work /tmp/many
    python benchmarks/many_experts.py --work /tmp/toy --toy

Four perturbed checkpoints of a random 20M Llama (bf16); each row is one process-internal run, the best of three. Prints
how the time grows against the bytes: 1.00 is linear. Then the seconds with experts in slices, in turn with whole ones,
and the peak anonymous memory of expansion and assembly to 16 experts in a process of their own, for more layers and for
more checkpoints.
"""

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import assembly_vs_mergekit as job
from torch import Tensor

from upcycle.console import table
from upcycle.experts.gram import task_vector_gram
from upcycle.experts.kinds import KINDS
from upcycle.recipe import parse_recipe
from upcycle.records.plan import Checkpoint
from upcycle.stages.expert_expansion.plan import make_plan
from upcycle.stages.model_upcycling.assemble import assemble
from upcycle.weights.base import Base

EXPERTS = (8, 16, 32, 64)
GRANULARITIES = (1, 2, 4, 8)
SHAPES = ((8, 4), (32, 4), (8, 12))
"""Layers and checkpoints."""
SMALL = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}


def memory(work: Path, shapes: tuple[tuple[int, int], ...]) -> None:
    """Peak anonymous memory against layers and checkpoints."""
    rows = []
    job.NUM_EXPERTS = 16
    for layers, checkpoints in shapes:
        job.CONFIG["num_hidden_layers"], job.NUM_CHECKPOINTS = layers, checkpoints
        folders = job.make_models(work / f"{layers}-{checkpoints}")
        cost = job.run_ours(folders, work / "moe", work / "log.txt")
        rows.append((str(layers), str(checkpoints), f"{cost.anonymous_mb:.0f}"))
    table("memory, 16 experts", ("layers", "checkpoints", "peak anonymous MB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models: 5 GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="as small as can be")
    arguments = parser.parse_args()
    job.CONFIG.update(SMALL, num_key_value_heads=6, vocab_size=8000)
    job.CONFIG.update(job.TOY if arguments.toy else {})
    made = make_job(arguments.work)
    growth(made, arguments.repeats, EXPERTS[:2] if arguments.toy else EXPERTS)
    slices(made, arguments.repeats)
    memory(arguments.work, ((2, 4),) if arguments.toy else SHAPES)


@dataclass(frozen=True)
class Job:
    """What all assemblies start from."""

    base: Base
    folders: list[Path]
    gram: Tensor
    out: Path

    def run(self, num_experts: int, granularity: int = 1) -> tuple[float, float]:
        """Seconds of planning, and of assembly."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        choice = {"assemble": {"granularity": granularity}, "expand": {"num_experts": num_experts}}
        recipe = parse_recipe({"base": self.base.name, "data": {"train": "none"}, **choice}, "benchmark")
        checkpoints = [Checkpoint(name=folder.name, path=str(folder)) for folder in self.folders]
        begin = time.perf_counter()
        plan = make_plan(checkpoints, self.gram, recipe.expand, 0)
        planned = time.perf_counter()
        assemble(KINDS["ffn"], self.base, self.folders, plan, recipe, self.out)
        return planned - begin, time.perf_counter() - planned


def make_job(work: Path) -> Job:
    folder, *folders = job.make_models(work / "base-8")
    base = Base(folder, str(folder))
    return Job(base, folders, task_vector_gram(base, folders), work / "moe")


def growth(made: Job, repeats: int, numbers: tuple[int, ...]) -> None:
    """Seconds against bytes, from few to many experts."""
    rows, first = [], None
    for num_experts in numbers:
        planning, seconds = (min(taken) for taken in zip(*(made.run(num_experts) for _ in range(repeats)), strict=True))
        size = sum(p.stat().st_size for p in made.out.glob("*.safetensors")) / 1e9
        first = first or (size, seconds)
        ratio = (seconds / first[1]) / (size / first[0])
        rows.append((str(num_experts), f"{size:.2f}", f"{seconds:.2f}", f"{ratio:.2f}", f"{planning:.3f}"))
    columns = ("experts", "GB written", "assembly s", "growth against bytes", "planning s")
    table("experts of a 20M Llama, bf16, 4 checkpoints", columns, rows)


def slices(made: Job, repeats: int) -> None:
    """Seconds with experts in slices against whole ones, in turn."""
    taken: dict[int, list[float]] = {granularity: [] for granularity in GRANULARITIES}
    for _ in range(repeats):
        for granularity, seconds in taken.items():
            seconds.append(made.run(EXPERTS[0], granularity)[1])
    whole = min(taken[1])
    rows = [
        (str(granularity), f"{min(found):.2f}", f"{min(found) / whole:.2f}") for granularity, found in taken.items()
    ]
    table(f"{EXPERTS[0]} experts in slices", ("slices", "assembly s", "over whole experts"), rows)


if __name__ == "__main__":
    main()
