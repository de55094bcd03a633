"""What cutting experts into slices adds to `upcycle assemble`: whole commands on the 502M job, in turn.

    python benchmarks/slices_assembly.py --work /tmp/assembly
    python benchmarks/slices_assembly.py --work /tmp/toy --toy --repeats 1

The models are those of `assembly_vs_mergekit.py`, prepared and expanded once. Before each command what is read is in
the page cache, and what was written is not. Prints medians, and their ratio to that of whole experts: wall time, CPU
seconds of the command, and anonymous memory.
"""

import argparse
import shutil
import statistics
from pathlib import Path

import assembly_vs_mergekit as job

from upcycle.console import say, table

MOST = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and the run: 16 GB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slices", type=int, nargs="+", default=[4], help="of an expert")
    parser.add_argument("--toy", action="store_true", help="as small as can be")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    job.CONFIG.update(job.TOY if arguments.toy else {})
    work.mkdir(parents=True, exist_ok=True)
    report(measure(work, [1, *arguments.slices], arguments.repeats))


def measure(work: Path, numbers: list[int], repeats: int) -> dict[int, list[job.Cost]]:
    """The costs of `upcycle assemble` for each number of slices, all in turn."""
    folders, run, log = job.make_models(work), work / "run", work / "log.txt"
    job.run_verbs(folders, run, log, (("run", "--until", "expand"),))
    found: dict[int, list[job.Cost]] = {}
    for _ in range(repeats):
        for number in numbers:
            job.drop_caches([run])
            job.warm_caches(folders)
            choice = ("--update", f"assemble.granularity={number}")
            found.setdefault(number, []).append(job.run_verb(folders, run, log, "assemble", *choice))
            say(f"{number}: {found[number][-1]}")
    shutil.rmtree(run)
    return found


def report(found: dict[int, list[job.Cost]]) -> None:
    def median(number: int, what: str) -> float:
        return statistics.median(getattr(cost, what) for cost in found[number])

    columns = ("wall_s", "cpu_s", "anonymous_mb")
    rows = [
        (
            str(number),
            *(f"{median(number, what):.2f} ({median(number, what) / median(1, what):.3f})" for what in columns),
        )
        for number in found
    ]
    table(
        "`upcycle assemble`",
        ("slices", "wall s (over whole)", "CPU s (over whole)", "peak anonymous MB (over whole)"),
        rows,
    )
    say(f"to be at most {MOST} times whole experts'")


if __name__ == "__main__":
    main()
