"""Which method, and which part of it, does what? Tables of variants on a testbed, from cells that are kept.

    python benchmarks/testbeds.py capacity --data DATA_FOLDER --out runs/testbeds
    python benchmarks/evidence.py capacity core --search      # learning rates, on a seed and rows that no table uses
    python benchmarks/evidence.py capacity core --seeds 5     # goes on where it, or another machine, stopped

Every cell (a variant with a seed) leaves its measures in `benchmarks/results/TESTBED/`; a table takes what is there and
runs the rest. Tables share cells: a variant has one name on a testbed. One thread is enough (OMP_NUM_THREADS=1).
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from upcycle.records.comparison import Cell
from upcycle.records.record import ALL, read_record
from upcycle.studies.cells import Study, cell_file
from upcycle.studies.compare import compare

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


BATCH = (
    "prepare.batch_size=32 prepare.micro_batch_size=32 posttrain.batch_size=32 posttrain.micro_batch_size=32 "
    "posttrain.checkpoint_every=4"
)
EMBEDDED = f"base=builtin:tiny data.train=builtin:train data.max_length=128 {BATCH}"
CAPACITY = (
    "base=benchmarks/testbeds/capacity data.train=runs/testbeds/capacity/train.jsonl data.max_length=256 "
    f"evaluate.exact_match=false {BATCH}"
)
BEDS = {
    "embedded": Bed(
        f"{EMBEDDED} data.fraction=0.5",
        "data.validation=builtin:validation",
        "data.validation_fraction=0.05",
        ("5e-4", "1e-3", "2e-3"),
    ),
    "capacity": Bed(
        f"{CAPACITY} data.fraction=0.5",
        "data.validation=runs/testbeds/capacity/validation.jsonl",
        "data.validation=runs/testbeds/capacity/search.jsonl",
        ("4e-3", "8e-3", "16e-3"),
    ),
}

EIGHT, ONE = "expand.num_experts=8", "route.min_samples_per_expert=160"
"""A MoE, and a dense model that holds as many seed rows out as eight experts do."""


def dense_for(epochs: float, train: str = "full") -> str:
    """Settings for so many of four epochs as a dense model, with four checkpoints."""
    return (
        f"{EIGHT} prepare.train={train} prepare.epochs={epochs} prepare.checkpoint_every={epochs / 4} "
        f"posttrain.epochs={4 - epochs:g}"
    )


HALF = dense_for(2)
FOUR_OF_EIGHT = "prepare.checkpoint_every=0.25 expand.num_checkpoints=4"
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
Variants = dict[str, tuple[str, str]]
"""Name to family, and to recipe and settings."""

METHODS: Variants = {
    "sft": ("dense", f"sft {ONE}"),
    "vanilla": ("base", f"vanilla {EIGHT}"),
    "vanilla-sft": ("upcycled", f"vanilla-sft {HALF}"),
    "upit": ("upcycled", f"upit {HALF}"),
    "upit, FFN alone": ("upcycled", f"upit {dense_for(2, 'ffn')}"),
    "upit-paper": ("upcycled", f"upit-paper {HALF} route.seed_from=held_out"),
    "noise": ("base", f"noise {EIGHT}"),
    "drop": ("base", f"drop {EIGHT} expand.perturb_rate=0.1"),
    "btx": ("upcycled", f"btx {EIGHT} prepare.epochs=2 posttrain.epochs=2"),
    "sft-lora": ("dense-lora", f"sft {ONE} {LORA} prepare.train=lora"),
    "lora-moe": ("base-lora", f"lora-moe {EIGHT} {LORA}"),
    "upit-lora": ("upcycled-lora", f"upit-lora {dense_for(2, 'lora')} {LORA}"),
    "self-moe": ("upcycled-lora", f"self-moe {EIGHT} {LORA} prepare.epochs=2 posttrain.epochs=2"),
    "pesc": ("base-lora", f"pesc {EIGHT} {LORA}"),
}
WHEN: Variants = {
    f"{recipe} after {epochs / 4:.0%}": ("upcycled", f"{recipe} {dense_for(epochs)}")
    for epochs in (0.4, 1)
    for recipe in ("upit", "vanilla-sft")
}
PARTS: Variants = {
    name: ("upcycled", f"upit {HALF} {changed}")
    for name, changed in {
        "eight checkpoints, no expansion": "prepare.checkpoint_every=0.25",
        "random parents": "expand.parents=random",
        "first half of eight checkpoints": f"{FOUR_OF_EIGHT} expand.select=first",
        "last half of eight checkpoints": f"{FOUR_OF_EIGHT} expand.select=last",
        "router start on random buckets": "route.assignment=random",
    }.items()
}
SPREAD: Variants = {
    f"upit, spread {scale}": ("upcycled", f"upit {HALF} expand.spread={scale}") for scale in (0.5, 0.25, -0.25)
}
STARTS: Variants = {
    **{
        f"router start {start}": ("upcycled", f"upit {HALF} route.start={start}")
        for start in ("random", "mean_hidden", "kmeans", "ridge", "upit")
    },
    **{
        f"copies, router start {start}": ("upcycled", f"vanilla-sft {HALF} route.start={start}")
        for start in ("mean_hidden", "kmeans", "ridge", "upit", "contrastive")
    },
}
VARIANTS = METHODS | WHEN | SPREAD | PARTS | STARTS
TABLES = {
    "core": ("sft", "vanilla", "vanilla-sft", "upit"),
    "methods": tuple(METHODS),
    "when": ("sft", "vanilla", "upit", "vanilla-sft", *WHEN),
    "spread": ("vanilla-sft", "upit", *SPREAD),
    "parts": ("upit", *PARTS, "router start random"),
    "starts": ("upit", "vanilla-sft", *STARTS),
}
"""The first variant of a table is what the others are compared with."""


def text(testbed: str, name: str) -> str:
    """A variant as `compare` takes it, with the rates of its family."""
    family, words = VARIANTS[name]
    bed = BEDS[testbed]
    rates = f"{dense_rate(testbed, family)} posttrain.learning_rate={best_rate(testbed, family)}"
    return f"{name}: {words} {bed.common} {bed.validation} {rates}"


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

    return min(BEDS[testbed].candidates, key=loss)


def search(testbed: str, table: str, work: Path) -> None:
    """Held-out loss at each rate, for each family that a table has: of the method that stands for it."""
    bed, results = BEDS[testbed], RESULTS / f"{testbed}-search"
    for family, variant in FAMILIES.items():
        if family in {VARIANTS[name][0] for name in TABLES[table]}:
            words = f"{VARIANTS[variant][1]} {bed.common} {bed.search} {dense_rate(testbed, family)}"
            texts = [f"{variant} {rate}: {words} posttrain.learning_rate={rate}" for rate in bed.candidates]
            folder = work / f"search-{family}-{'-'.join(bed.candidates)}"
            compare(Study(texts, [SEARCH_SEED], folder, keep_models=False, results=results), force=True)
            print(f"{family}: {best_rate(testbed, family)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", choices=BEDS)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--search", action="store_true", help="only look for the learning rates that the table needs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these variants of the table alone")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="folder for the runs")
    arguments = parser.parse_args()
    testbed, table, work = arguments.testbed, arguments.table, arguments.work / arguments.testbed
    search(testbed, table, work)
    if not arguments.search:
        texts = [text(testbed, name) for name in arguments.only or TABLES[table]]
        seeds, results = range(arguments.seeds), RESULTS / testbed
        compare(Study(texts, seeds, work / table, keep_models=False, results=results), force=True)


if __name__ == "__main__":
    main()
