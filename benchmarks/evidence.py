"""Which method, and which part of it, does what? Tables of variants on a testbed, from cells that are kept.

    python benchmarks/testbeds.py capacity --data DATA_FOLDER --out runs/testbeds
    python benchmarks/evidence.py capacity core --search      # learning rates, on a seed and rows that no table uses
    python benchmarks/evidence.py capacity core when --seeds 5     # goes on where it, or another machine, stopped
    python benchmarks/evidence.py toy core --seeds 1 --only sft upit        # as small as can be
    python benchmarks/evidence.py smollm2-full core core-lora rows-10 rows-30 --benchmarks DATA_FOLDER/bench

Every cell (a variant with a seed) leaves its measures in `benchmarks/results/TESTBED/`; a table takes what is there and
runs the rest. Tables share cells: a variant has one name on a testbed. One thread is enough (OMP_NUM_THREADS=1). With
`--jobs N`, so many seeds go at once, on as many cores or on one GPU. Three testbeds tune SmolLM2-135M-Instruct:
`smollm2` on short rows and `smollm2-full` on all need a GPU; `smollm2-cpu` is a night of CPU.
"""

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

from upcycle.pipeline.run import Run
from upcycle.records.comparison import Cell
from upcycle.records.files import BENCHMARK, RESULT
from upcycle.records.record import ALL, ByDomain, read_record
from upcycle.studies.benchmark import choose_tasks, run_benchmark
from upcycle.studies.cells import Study, cell_file
from upcycle.studies.compare import compare, matched

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEARCH_SEED = 100


@dataclass(frozen=True)
class Bed:
    """What all variants on a testbed have alike."""

    common: str
    validation: str
    search: str
    """Rows that rates are chosen on."""
    candidates: tuple[str, ...]
    """Learning rates."""
    fraction: float
    """Share of the training rows."""
    epochs: float = 4.0
    """The budget, of both stages."""
    experts: int = 8
    seed_rows: int = 160
    """Held out of every variant's training, for the router or not."""
    by_family: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Learning rates of a family, where others are tried."""

    def rates(self, family: str) -> tuple[str, ...]:
        """That are tried for a family."""
        return self.by_family.get(family, self.candidates)


def batches(size: int, micro: int) -> str:
    """Settings of both stages."""
    return " ".join(f"{stage}.batch_size={size} {stage}.micro_batch_size={micro}" for stage in ("prepare", "posttrain"))


def files(testbed: str, common: str) -> tuple[str, str, str]:
    """What all variants have alike, the rows of `testbeds.py` among it; rows for the tables, and for the search."""
    rows = f"runs/testbeds/{testbed}"
    return (
        f"{common} data.train={rows}/train.jsonl evaluate.exact_match=false",
        f"data.validation={rows}/validation.jsonl",
        f"data.validation={rows}/search.jsonl",
    )


SMALL = f"{batches(32, 32)} posttrain.checkpoint_every=4"
EMBEDDED = f"base=builtin:tiny data.train=builtin:train data.max_length=128 {SMALL}"
EMBEDDED_ROWS = ("data.validation=builtin:validation", "data.validation_fraction=0.05")
SMOLLM2 = "base=runs/testbeds/smollm2/base posttrain.checkpoint_every=2"
REAL_RATES = ("3e-5", "1e-4", "3e-4")
BEDS = {
    "embedded": Bed(EMBEDDED, *EMBEDDED_ROWS, ("2.5e-4", "5e-4", "1e-3", "2e-3"), 0.5),
    "toy": Bed(f"{EMBEDDED} data.max_validation=20 evaluate.exact_match=false", *EMBEDDED_ROWS, ("1e-3",), 0.1, 1.0),
    "embedded-once": Bed(EMBEDDED, *EMBEDDED_ROWS, ("2.5e-4", "5e-4", "1e-3", "2e-3"), 1.0, 2.0),
    "capacity": Bed(
        *files("capacity", f"base=benchmarks/testbeds/capacity data.max_length=256 {SMALL}"),
        ("4e-3", "8e-3", "16e-3"),
        0.5,
    ),
    "middle": Bed(
        *files("middle", f"base=benchmarks/testbeds/middle data.max_length=256 {SMALL}"),
        ("1e-3", "2e-3", "4e-3"),
        0.25,
        2.0,
    ),
    "smollm2": Bed(*files("smollm2", f"{SMOLLM2} data.max_length=256 {batches(64, 32)}"), REAL_RATES, 0.5, 2.0),
    "smollm2-cpu": Bed(
        *files(
            "smollm2",
            f"{SMOLLM2} data.max_length=256 {batches(8, 8)} data.max_validation=100 evaluate.models=ends "
            "evaluate.tokens_per_batch=1024",
        ),
        REAL_RATES,
        0.008,
        2.0,
        experts=4,
        seed_rows=16,
        by_family={
            "upcycled": ("1e-5", "3e-5", "1e-4"),
            "dense-lora": ("1e-3", "3e-3", "1e-2"),
            "base-lora": ("1e-3", "3e-3", "1e-2"),
            "upcycled-lora": ("1e-4", "3e-4", "1e-3", "3e-3"),
        },
    ),
    "smollm2-full": Bed(
        *files(
            "smollm2-full",
            f"{SMOLLM2} data.max_length=1024 {batches(64, 32)} data.max_validation=1000 "
            "route.tokens_per_batch=32768 evaluate.tokens_per_batch=32768",
        ),
        REAL_RATES,
        1.0,
        seed_rows=400,
        by_family=dict.fromkeys(("dense-lora", "base-lora", "upcycled-lora"), ("1e-4", "3e-4", "1e-3")),
    ),
}
BENCHMARKS = ("arc_easy", "arc_challenge", "boolq", "csqa", "piqa", "winogrande", "gsm8k", "svamp")
LORA = "lora.rank=8 lora.alpha=16"
FAMILIES = {
    "dense": "sft",
    "base": "vanilla",
    "upcycled": "upit",
    "dense-lora": "sft-lora",
    "base-lora": "lora-moe",
    "upcycled-lora": "upit-lora",
}
"""Methods that have their learning rates alike, and the one that the rates are searched with."""
DENSE_HALF = {"upcycled": "dense", "upcycled-lora": "dense-lora"}
"""Families that prepare: preparation is dense tuning, so it has the rate that is best for that."""


@dataclass(frozen=True)
class Row:
    """A variant: a recipe with settings."""

    family: str
    recipe: str
    share: float | None = None
    """Of the budget, for preparation; None: it is all in one stage."""
    more: str = ""
    experts: int | None = None
    """None: as many as the testbed has."""
    checkpoints: int = 4
    """That preparation leaves."""
    rows: float = 1.0
    """Share of the testbed's rows."""
    flops_of: str | None = None
    """Has the training FLOPs of that variant, by more epochs, instead of its tokens."""

    def words(self, bed: Bed) -> str:
        prepared = (self.share or 0) * bed.epochs
        experts = self.experts or bed.experts
        stages = f"posttrain.epochs={bed.epochs - prepared:g} expand.num_experts={experts}"
        if self.share:
            stages += f" prepare.epochs={prepared:g} prepare.checkpoint_every={prepared / self.checkpoints:g}"
        held_out = f"route.min_samples_per_expert={bed.seed_rows // experts}"
        return f"{self.recipe} {stages} {held_out} data.fraction={self.rows * bed.fraction:g} {self.more}"

    def but(self, changed: str) -> "Row":
        """With more settings."""
        return replace(self, more=f"{self.more} {changed}")


FULL = "prepare.train=full"
UPIT = Row("upcycled", "upit", 0.5, FULL)
COPIES = Row("upcycled", "vanilla-sft", 0.5, FULL)
EIGHT = replace(UPIT, checkpoints=8)
DENSE, FROM_BASE = Row("dense", "sft", experts=1), Row("base", "vanilla")

METHODS = {
    "sft": DENSE,
    "vanilla": FROM_BASE,
    "vanilla-sft": COPIES,
    "upit": UPIT,
    "upit, FFN alone": replace(UPIT, more="prepare.train=ffn"),
    "upit-paper": replace(UPIT, recipe="upit-paper", more=f"{FULL} route.seed_from=held_out"),
    "noise": Row("base", "noise"),
    "drop": Row("base", "drop", more="expand.perturb_rate=0.1"),
    "btx": Row("upcycled", "btx", 0.5),
    "sft-lora": Row("dense-lora", "sft", more=f"{LORA} prepare.train=lora", experts=1),
    "lora-moe": Row("base-lora", "lora-moe", more=LORA),
    "upit-lora": Row("upcycled-lora", "upit-lora", 0.5, f"{LORA} prepare.train=lora"),
    "self-moe": Row("upcycled-lora", "self-moe", 0.5, LORA),
    "pesc": Row("base-lora", "pesc", more=LORA),
}
LORA_COPIES = {"lora-moe-sft": METHODS["upit-lora"].but("expand.copies_of=last route.start=random")}
"""Of the half-trained adapter: the paper's stronger baseline."""
WHEN = {
    f"{name} after {share:.0%}": replace(row, share=share)
    for share in (0.1, 0.25)
    for name, row in (("upit", UPIT), ("vanilla-sft", COPIES))
}
FLOPS = {
    "sft, FLOPs of upit": replace(DENSE, flops_of="upit"),
    "sft, FLOPs of vanilla": replace(DENSE, flops_of="vanilla"),
}
PARTS = {
    "random parents": UPIT.but("expand.parents=random"),
    "eight checkpoints, no expansion": EIGHT,
    "first half of eight checkpoints": EIGHT.but("expand.num_checkpoints=4 expand.select=first"),
    "last half of eight checkpoints": EIGHT.but("expand.num_checkpoints=4 expand.select=last"),
    "router start on random buckets": UPIT.but("route.assignment=random"),
}
SPREAD = {f"upit, spread {scale}": UPIT.but(f"expand.spread={scale}") for scale in (1, 0.5, -0.5)}
RATES = {
    f"{name}, {what}": row.but(changed)
    for name, row in (("upit", UPIT), ("vanilla-sft", COPIES), ("vanilla", FROM_BASE))
    for what, changed in {
        "experts' rate 2": "posttrain.experts_rate=2",
        "experts' rate 4": "posttrain.experts_rate=4",
        "Adam's state carried": "posttrain.optimizer_state=carry",
    }.items()
    if row.share or "carry" not in changed
}
UNSCALED = {
    f"{name}, start unscaled": row.but("route.logit_std=null")
    for name, row in (
        ("vanilla", FROM_BASE),
        ("vanilla-sft", COPIES),
        ("upit, spread 1", SPREAD["upit, spread 1"]),
    )
}
STARTS = {
    **{
        f"router start {start}": UPIT.but(f"route.start={start}")
        for start in ("random", "mean_hidden", "kmeans", "ridge", "upit")
    },
    "router start upit, rate 1e-2": UPIT.but("route.start=upit route.learning_rate=1e-2"),
    **{
        f"copies, router start {start}": COPIES.but(f"route.start={start}")
        for start in ("mean_hidden", "kmeans", "ridge", "upit", "contrastive")
    },
}
ROWS = {
    f"{name}, {share:.0%} of the rows": replace(row, rows=share)
    for share in (0.1, 0.3)
    for name, row in (("sft", DENSE), ("vanilla-sft", COPIES), ("upit", UPIT))
}
SIZES = {
    f"upit, {m} experts, top-{k}": replace(UPIT, experts=m).but(f"assemble.num_experts_per_tok={k}")
    for m, k in ((4, 2), (16, 2), (8, 4), (16, 4))
}


def sliced(row: Row, slices: int, more: str = "") -> Row:
    """With experts cut into slices, and the dense model's FLOPs."""
    return row.but(f"assemble.granularity={slices} assemble.num_experts_per_tok=1 {more}")


SLOW = "posttrain.router_rate=0.1"
FINE = {
    "upit, 2 slices, top-1, balanced over experts": sliced(UPIT, 2, "posttrain.balance_over=experts"),
    "upit, 2 slices, top-1, router's rate a tenth": sliced(UPIT, 2, SLOW),
    "vanilla, 2 slices, top-1": sliced(FROM_BASE, 2),
    "upit, 2 slices, top-1": sliced(UPIT, 2),
}
SLICES = {
    "upit, 2 slices, top-1, router frozen": sliced(UPIT, 2, "posttrain.freeze=router"),
    "upit, 4 slices, top-1": sliced(UPIT, 4),
    "upit, 4 slices, top-1, router's rate a tenth": sliced(UPIT, 4, SLOW),
    "upit, router's rate a tenth": UPIT.but(SLOW),
}
VARIANTS: dict[str, Row] = (
    METHODS | LORA_COPIES | WHEN | FLOPS | SPREAD | RATES | PARTS | STARTS | UNSCALED | ROWS | SIZES | FINE | SLICES
)
TABLES = {
    "core": ("sft", "vanilla", "vanilla-sft", "upit"),
    "upit": ("upit", "vanilla-sft", "vanilla"),
    "core-lora": ("sft-lora", "lora-moe", *LORA_COPIES, "upit-lora"),
    "methods": tuple(METHODS),
    "from-base": ("vanilla", "noise", "drop"),
    "lora": ("upit-lora", "sft-lora", "self-moe", "lora-moe", "pesc"),
    "when": ("sft", "vanilla", "upit", "vanilla-sft", *WHEN),
    "flops": ("sft", "vanilla", "vanilla-sft", "upit", *FLOPS),
    "upit-flops": ("sft, FLOPs of upit", "sft", "vanilla-sft", "upit"),
    "scale": ("sft", "vanilla", "vanilla-sft", "upit, spread 1", *UNSCALED),
    "fine": ("sft", "vanilla", "upit", *FINE),
    "slices": ("upit, 2 slices, top-1", "upit, 2 slices, top-1, router's rate a tenth", *SLICES),
    "spread": ("vanilla-sft", "upit", *SPREAD),
    "rates": ("sft", "vanilla", "vanilla-sft", "upit", *RATES),
    "parts": ("upit", *PARTS, "router start random"),
    "starts": (*(name for name in STARTS if name.startswith("router")), "upit"),
    "three-starts": ("router start random", "router start upit", "router start upit, rate 1e-2", "upit"),
    "copies-starts": ("vanilla-sft", *(name for name in STARTS if name.startswith("copies"))),
    **{f"rows-{share}": tuple(name for name in ROWS if f" {share}%" in name) for share in (10, 30)},
    "carry": ("upit", "upit, Adam's state carried"),
    "copies-carry": ("vanilla-sft", "vanilla-sft, Adam's state carried"),
    "sizes": ("upit", *SIZES),
}
"""The first variant of a table is what the others are compared with."""


def text(testbed: str, name: str) -> str:
    """A variant as `compare` takes it, with the rates of its family."""
    row, bed = VARIANTS[name], BEDS[testbed]
    rates = f"{dense_rate(testbed, row.family)} posttrain.learning_rate={best_rate(testbed, row.family)}"
    words = f"{name}: {row.words(bed)} {bed.common} {bed.validation} {rates}"
    if row.flops_of is None:
        return words
    scaled = matched([text(testbed, row.flops_of), words])
    return f"{words} {' '.join(scaled[words])}"


def cell_folder(testbed: str, name: str) -> Path:
    """Where the cells of a variant are kept."""
    return cell_file(RESULTS / testbed, name, 0).parent


def dense_rate(testbed: str, family: str) -> str:
    """The rate of preparation, where there is one."""
    return f"prepare.learning_rate={best_rate(testbed, DENSE_HALF[family])}" if family in DENSE_HALF else ""


def best_rate(testbed: str, family: str) -> str:
    """The candidate of least loss on the rows for the search."""

    def loss(rate: str) -> float:
        path = cell_file(RESULTS / f"{testbed}-search", f"{FAMILIES[family]} {rate}", SEARCH_SEED)
        return float(read_record(path, Cell).loss[ALL])

    return min(BEDS[testbed].rates(family), key=loss)


def search(testbed: str, table: str, work: Path, jobs: int) -> None:
    """Held-out loss at each rate, for each family that a table has: of the method that stands for it."""
    bed, results = BEDS[testbed], RESULTS / f"{testbed}-search"
    for family, variant in FAMILIES.items():
        if family in {VARIANTS[name].family for name in TABLES[table]}:
            words = f"{VARIANTS[variant].words(bed)} {bed.common} {bed.search} {dense_rate(testbed, family)}"
            rates = bed.rates(family)
            texts = [f"{variant} {rate}: {words} posttrain.learning_rate={rate}" for rate in rates]
            folder = work / f"search-{family}-{'-'.join(rates)}"
            study = Study(texts, [SEARCH_SEED], folder, keep_models=False, results=results)
            at_once([replace(study, texts=[text], out=folder / text.split(":")[0]) for text in texts], jobs)
            compare(study, force=True)
            print(f"{family}: {best_rate(testbed, family)}")


def at_once(studies: Sequence[Study], jobs: int) -> None:
    """Have the cells of each study made, in processes of their own; with one job, nothing: they are made in turn."""
    if jobs > 1:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            list(pool.map(_make, studies))


def _make(study: Study) -> None:
    compare(study, force=True)


def benchmark_mean(run: Run, data: Path, rows: int) -> ByDomain:
    """The MoE's score on each benchmark, and their mean."""
    tasks = choose_tasks(BENCHMARKS, data, allow_code=False)
    (scores,) = run_benchmark([str(RESULT.of(run.folder))], tasks, False, BENCHMARK.of(run.folder), rows).values()
    by_task = {task: found.main[0] for task, found in scores.items()}
    return {ALL: fmean(by_task.values()), **by_task}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", choices=BEDS)
    parser.add_argument("tables", nargs="+", choices=TABLES, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--search", action="store_true", help="only look for the learning rates that the table needs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these variants of the tables alone")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, or rates in a search")
    parser.add_argument(
        "--benchmarks", type=Path, metavar="FOLDER", help="score every result on benchmarks from here too"
    )
    parser.add_argument("--benchmark-rows", type=int, default=300, metavar="N", help="of each")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder for the runs")
    arguments = parser.parse_args()
    testbed, work, jobs = arguments.testbed, arguments.work / arguments.testbed, arguments.jobs
    found = partial(benchmark_mean, data=arguments.benchmarks, rows=arguments.benchmark_rows)
    benchmark = found if arguments.benchmarks else None
    for table in arguments.tables:
        search(testbed, table, work, jobs)
        if not arguments.search:
            texts = [text(testbed, name) for name in arguments.only or TABLES[table]]
            seeds = range(arguments.seeds)
            kept = RESULTS / testbed
            study = Study(texts, seeds, work / table, keep_models=False, benchmark=benchmark, results=kept)
            at_once([replace(study, seeds=[seed], out=work / table / f"seed-{seed}") for seed in seeds], jobs)
            compare(study, force=True)


if __name__ == "__main__":
    main()
