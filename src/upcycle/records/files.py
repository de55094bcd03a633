"""Where everything of a run lies, and what each file holds. No other module spells these names.

A run folder has `recipe.yaml` and a folder per stage, named like the verb that makes it. A model folder of ours carries
`LINEAGE`; a comparison's folder has `COMPARISON` or `SWEEP` and a run folder for each variant and seed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from upcycle.disk import sizes, sync_files
from upcycle.errors import UpcycleError
from upcycle.records.benchmark import BenchmarkScores, ScoredModel
from upcycle.records.comparison import Cell, Comparison, Sweep
from upcycle.records.cost import Cost
from upcycle.records.manifest import Manifest
from upcycle.records.origin import Origin
from upcycle.records.plan import Checkpoint, ExpansionPlan
from upcycle.records.record import read_record, write_record
from upcycle.records.route import RouteReport
from upcycle.records.scores import Routing, Scores
from upcycle.records.training import TrainingRecord

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """A file or folder of a run."""

    stage: str
    """The stage whose folder it lies in; empty for the run's own."""
    name: str = ""
    """Empty for the stage's folder itself."""

    def of(self, run: Path) -> Path:
        """Its path in a run folder."""
        return run / self.stage / self.name


@dataclass(frozen=True)
class RecordFile(Place, Generic[T]):
    """A JSON file that holds a record, or a list or dictionary of records."""

    kind: Any = field(kw_only=True)
    """The type of what it holds."""
    remedy: str = field(default="restore it, or rebuild it", kw_only=True)
    """What to do if it is damaged."""

    def write(self, folder: Path, value: T) -> None:
        """Write it into a folder: the stage's, while it is being made."""
        write_record(folder / self.name, value)

    def read(self, folder: Path) -> T:
        """What it holds in a folder.

        Raises:
            UpcycleError: it is missing or damaged; names the file and the field.
        """
        found: T = read_record(folder / self.name, self.kind, self.remedy)
        return found

    def read_of(self, run: Path) -> T:
        """What it holds in a run."""
        return self.read(run / self.stage)

    def known(self, folder: Path) -> T | None:
        """What it holds in a folder, None where the file is not there."""
        return self.read(folder) if (folder / self.name).is_file() else None

    def known_of(self, run: Path) -> T | None:
        """What it holds in a run, None where the file is not there."""
        return self.known(run / self.stage)


PREPARE, EXPAND, ASSEMBLE, ROUTE = "prepare", "expand", "assemble", "route"
POSTTRAIN, EVALUATE = "posttrain", "evaluate"

# of a run
RECIPE = Place("", "recipe.yaml")
LOCK = Place("", ".lock")
COSTS: RecordFile[dict[str, Cost]] = RecordFile(
    "", "costs.json", kind=dict[str, Cost], remedy="restore it, or remove it: nothing else is made from it"
)
DELETED = Place("", "models-deleted")
"""Says that only the scores of a run were kept."""
MEASURES: RecordFile[Cell] = RecordFile("", "measures.json", kind=Cell)
REPORT = Place("", "report.html")

# of every stage
MANIFEST: RecordFile[Manifest] = RecordFile(
    "", "manifest.json", kind=Manifest, remedy="restore it, or rerun with --update to rebuild the stage"
)
INPUTS: RecordFile[dict[str, str]] = RecordFile("", "inputs.json", kind=dict[str, str])
"""Marks a working folder with the inputs of the run that left it."""
SIZES: RecordFile[dict[str, int]] = RecordFile("", "sizes.json", kind=dict[str, int])
"""Of files in a folder that is being made, noted once they are on the disk: what is cut later is noticed."""
LOG: RecordFile[TrainingRecord] = RecordFile("", "log.json", kind=TrainingRecord)
"""Of every training."""

# of the Trainer's checkpoints
TRAINER_STATE = Place("", "trainer_state.json")
"""The Trainer writes it last."""
ROUTER_BIAS = Place("", "router_bias.safetensors")

# by stage
CHECKPOINTS: RecordFile[list[Checkpoint]] = RecordFile(PREPARE, "checkpoints.json", kind=list[Checkpoint])
MOMENTS = Place(PREPARE, "moments")
"""Adam's moments of the last checkpoint, as two models whose weights they are; only where they are carried."""
PLAN: RecordFile[ExpansionPlan] = RecordFile(EXPAND, "plan.json", kind=ExpansionPlan)
ASSEMBLED = Place(ASSEMBLE)
"""The MoE before any training of its own."""
ORIGIN: RecordFile[Origin] = RecordFile(ASSEMBLE, "base.json", kind=Origin)
ROUTER = Place(ROUTE, "router.safetensors")
MOVED = Place(ROUTE, "moe")
"""The MoE whose experts moved with the router's start, if they did."""
ROUTE_REPORT: RecordFile[RouteReport] = RecordFile(ROUTE, "report.json", kind=RouteReport)
RESULT = Place(POSTTRAIN)
"""The finished model."""
SCORES: RecordFile[Scores] = RecordFile(EVALUATE, "scores.json", kind=Scores)
ROUTING: RecordFile[Routing] = RecordFile(EVALUATE, "routing.json", kind=Routing)

# of a model folder
LINEAGE: RecordFile[ExpansionPlan] = RecordFile("", "upcycle_plan.json", kind=ExpansionPlan)
"""The expansion plan that a MoE carries with it."""
CARD = Place("", "README.md")

# of benchmarks
BENCHMARK = Place("benchmark")
"""Of a run."""
BENCHMARK_SCORES: RecordFile[BenchmarkScores] = RecordFile("benchmark", "benchmark.json", kind=BenchmarkScores)
BENCHMARK_PICTURE = Place("benchmark", "benchmark.png")
BENCHMARK_OF: RecordFile[ScoredModel] = RecordFile("benchmark", "of.json", kind=ScoredModel)

# of a comparison
COMPARISON: RecordFile[Comparison] = RecordFile("", "comparison.json", kind=Comparison)
COMPARISON_PICTURE = Place("", "comparison.png")
SWEEP: RecordFile[Sweep] = RecordFile("", "sweep.json", kind=Sweep)
SWEEP_PICTURE = Place("", "sweep.png")


def note_sizes(folder: Path) -> None:
    """Have what is in a folder on the disk, and note that it is whole."""
    sync_files(folder)
    SIZES.write(folder, {name: size for name, size in sizes(folder).items() if name != SIZES.name})


def is_whole(folder: Path, but: Callable[[str], bool] = lambda _: False) -> bool:
    """Whether every file that was noted has the size that it had then.

    Args:
        but: says of a file's name that it does not matter.
    """
    try:
        noted = SIZES.known(folder)
    except UpcycleError:
        return False
    found = sizes(folder)
    return noted is not None and all(found.get(name) == size for name, size in noted.items() if not but(name))


def run_of(comparison: Path, number: int, seed: int) -> Path:
    """The run folder of a variant with a seed."""
    return comparison / f"{number}-seed{seed}"


def scored_model(evaluate: Path, number: int) -> Path:
    """Where a stage folder keeps the scores (`Scored`) of one model until all are scored."""
    return evaluate / "models" / f"{number}.json"


def cached_score(benchmark: Path, key: str) -> Path:
    """Where a benchmark's folder keeps the scores (`TaskScores`) of one model on one task."""
    return benchmark / "cache" / f"{key}.json"
