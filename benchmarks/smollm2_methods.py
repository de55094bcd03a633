"""Every upcycling method at the same number of training tokens, on a real model and real instruction data.

    python benchmarks/smollm2_methods.py --base SMOLLM2_FOLDER --data DATA_FOLDER --out runs/smollm2_methods
    timeout 590 python benchmarks/smollm2_methods.py --base ... --data ... --out ... --size full   # GPU, repeatedly

DATA_FOLDER has `instruct/*.jsonl.gz`, `instruct_valid.jsonl.gz` and `bench/*.jsonl.gz`. Two settings as in the paper:
whole FFNs as experts, 4 of them top-2, and LoRA experts, 8 of them top-2; half of a budget of 4 epochs is dense. The
size `cpu` takes the FFN setting and 0.12% of the rows, about two hours on one core; `cpu-lora` the LoRA setting and
0.1% of the rows, of at most 96 tokens, about half an hour; `full` both settings at 10%, 50% and 100% of the rows, and
scores every result on benchmarks too; `toy` is for any model and a few rows. Kill it and run it again: it goes on where
it stopped.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from upcycle.pipeline.run import Run
from upcycle.records.comparison import Comparison, Summary, Sweep
from upcycle.records.files import BENCHMARK, RESULT
from upcycle.records.record import ALL, ByDomain, write_record
from upcycle.reporting.figures import comparison_figure, sweep_figure
from upcycle.studies.benchmark import choose_tasks, run_benchmark
from upcycle.studies.cells import Study
from upcycle.studies.compare import compare
from upcycle.studies.sweep import show_sweep

SCHEDULE = "prepare.epochs=2 prepare.checkpoint_every=0.25"
EVALUATE = "evaluate.models=ends evaluate.max_answer_tokens=8"
# a rate at which this model learns in a few dozen steps, for full tensors; the paper's for adapters
FULL = "prepare.learning_rate=5e-5 posttrain.learning_rate=5e-5"
LORA = "prepare.learning_rate=2e-4 posttrain.learning_rate=2e-4"
BENCHMARKS = ("arc_easy", "arc_challenge", "boolq", "csqa", "piqa", "winogrande", "gsm8k", "svamp")


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    fractions: tuple[float, ...]
    kinds: tuple[str, ...]
    settings: str
    seed_rows: int
    """Held out of training for the router, the same for every method."""
    bench_rows: int = 0
    """Of each benchmark; 0: none."""


CPU = (
    "data.max_validation=40 evaluate.exact_match=false posttrain.checkpoint_every=2 "
    "prepare.batch_size=8 prepare.micro_batch_size=4 posttrain.batch_size=8 posttrain.micro_batch_size=4 "
    "prepare.warmup_fraction=0 posttrain.warmup_fraction=0 "
    "route.tokens_per_batch=1024 evaluate.tokens_per_batch=1024"
)
SIZES = {
    "toy": Size((1.0,), ("ffn", "lora"), f"{CPU} data.max_length=96 lora.rank=2", 8),
    "cpu": Size((0.0012,), ("ffn",), f"{CPU} data.max_length=160", 12),
    "cpu-lora": Size((0.001,), ("lora",), f"{CPU} data.max_length=96 prepare.batch_size=4 posttrain.batch_size=4", 8),
    "full": Size(
        (0.1, 0.5, 1.0),
        ("ffn", "lora"),
        "data.max_length=1024 evaluate.max_generated=500 posttrain.checkpoint_every=0.25 "
        "prepare.batch_size=64 prepare.micro_batch_size=32 posttrain.batch_size=64 posttrain.micro_batch_size=32 "
        "route.tokens_per_batch=32768 evaluate.tokens_per_batch=32768",
        400,
        300,
    ),
}


def methods(kind: str, seed_rows: int) -> dict[str, str]:
    """Name to recipe and settings; all hold the same rows out of training."""

    def experts(count: int) -> str:
        return f"expand.num_experts={count} route.min_samples_per_expert={seed_rows // count}"

    if kind == "ffn":
        upcycled = f"{FULL} {experts(4)}"
        return {
            "sft": f"sft {FULL} {experts(1)}",
            "vanilla": f"vanilla {upcycled}",
            "vanilla-sft": f"vanilla-sft {upcycled}",
            "drop": f"drop {upcycled}",
            "upit-paper": f"upit-paper {upcycled} route.seed_from=held_out",
            "upit": f"upit {upcycled}",
        }
    upcycled = f"{LORA} {experts(8)}"
    paper = "route.start=upit route.assignment=lowest_loss expand.adapters=apart"
    return {
        "sft": f"sft {LORA} {experts(1)} prepare.train=lora",
        "lora-moe": f"lora-moe {upcycled}",
        # the paper's stronger baseline
        "lora-moe-sft": f"upit-lora {upcycled} expand.copies_of=last route.start=random",
        "upit-paper": f"upit-lora {upcycled} {paper}",
        "upit": f"upit-lora {upcycled}",
    }


def inputs(base: Path, data: Path) -> str:
    """The settings that name the model and all instruction rows of the data folder."""
    train = ",".join(map(str, sorted((data / "instruct").glob("*.jsonl.gz"))))
    return f"base={base} data.train=[{train}] data.validation={data / 'instruct_valid.jsonl.gz'}"


def groups(size: Size, base: Path, data: Path) -> Iterator[tuple[str, float, dict[str, str]]]:
    """(kind of experts, share of the data, method to what `compare` runs)."""
    common = f"{inputs(base, data)} {EVALUATE}"
    for kind in size.kinds:
        for fraction in size.fractions:
            rest = f"{common} {size.settings} data.fraction={fraction}"
            texts = {
                name: f"{name}: {text} {_schedule(text)} {rest}" for name, text in methods(kind, size.seed_rows).items()
            }
            yield kind, fraction, texts


def _schedule(text: str) -> str:
    """The dense half of the budget, for the methods that have one."""
    return SCHEDULE if text.split()[0] in ("vanilla-sft", "upit", "upit-paper", "upit-lora") else ""


def benchmark_mean(run: Run, data: Path, rows: int) -> ByDomain:
    """The MoE's score on each benchmark, and their mean."""
    tasks = choose_tasks(BENCHMARKS, data / "bench", allow_code=False)
    folder = BENCHMARK.of(run.folder)
    (scores,) = run_benchmark([str(RESULT.of(run.folder))], tasks, False, folder, rows).values()
    by_task = {task: found.main[0] for task, found in scores.items()}
    return {ALL: fmean(by_task.values()), **by_task}


def points(found: Comparison, names: Sequence[str], fraction: float) -> list[Summary]:
    """A comparison as points of a sweep over the share of the data, a line per method (UpIT, figure 3)."""
    settings = [{"data.fraction": str(fraction), "method": name} for name in names]
    return [row.model_copy(update={"settings": s}) for row, s in zip(found.summary, settings, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    grids: dict[str, Sweep] = {}
    for kind, fraction, texts in groups(size, arguments.base, arguments.data):
        folder = arguments.out / f"{kind}-{fraction}"
        benchmark = partial(benchmark_mean, data=arguments.data, rows=size.bench_rows) if size.bench_rows else None
        # forced: the paper's start of the router trains on some tokens of its own; the table says on how many
        study = Study(list(texts.values()), range(arguments.seeds), folder, keep_models=False, benchmark=benchmark)
        found = compare(study, force=True)
        comparison_figure(found, folder / "comparison.png")
        before = grids.get(kind)
        grids[kind] = Sweep(
            variants={**(before.variants if before else {}), **found.variants},
            summary=[*(before.summary if before else []), *points(found, list(texts), fraction)],
            recipe=f"smollm2 {kind}",
            grid=[],
            axes=["data.fraction", "method"],
        )
    for kind, grid in grids.items():
        write_record(arguments.out / f"{kind}.json", grid)
        show_sweep(grid)
        sweep_figure(grid, arguments.out / f"{kind}.png")


if __name__ == "__main__":
    main()
