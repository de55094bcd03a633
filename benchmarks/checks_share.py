"""What trust costs: hashing, and comparing with transformers, as a share of `upcycle assemble` on the 502M job.

    python benchmarks/checks_share.py --work /tmp/assembly
    python benchmarks/checks_share.py --work /tmp/toy --toy --repeats 1

The models are those of `assembly_vs_mergekit.py`. `upcycle prepare`, `expand` and `assemble` are run as whole commands,
in turn with and without hashing and comparisons (their functions replaced by ones that do nothing). A command also adds
up the seconds that it spends in them. Each round begins with an empty cache, so a hash is remembered from one command
to the next, as a user's are. The share is that of assembly: all hashing of the command, and the comparisons
with transformers, which run once, in the first stage. Medians; prints the share, which has to be under a tenth.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import assembly_vs_mergekit as job

from upcycle.console import say, table
from upcycle.disk import CACHE

COMMANDS = ("prepare", "expand", "assemble")
MOST = 0.1
COMMAND = """
import json, sys, time
from pathlib import Path
spent, skip, out = {"hashing": 0.0, "comparing": 0.0}, json.loads(sys.argv.pop(1)), sys.argv.pop(1)
def watched(name, function, instead):
    def call(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return instead(*args) if skip else function(*args, **kwargs)
        finally:
            spent[name] += time.perf_counter() - begin
    return call
from upcycle.architectures import agreement, check
from upcycle.experts import ffn
from upcycle.pipeline import manifest
from upcycle.weights import hashing
def names(paths, *_):
    for path in paths:
        yield "%032x" % abs(hash((path.parent.name.removesuffix(".partial"), path.name)))  # PYTHONHASHSEED
def watched_hashes(function):
    def call(*args):
        found = (names if skip else function)(*args)
        while True:
            begin = time.perf_counter()
            try:
                value = next(found)
            except StopIteration:
                return
            finally:
                spent["hashing"] += time.perf_counter() - begin
            yield value
    return call
for module in (manifest, hashing):
    module.hash_files = watched_hashes(module.hash_files)
compare = watched("comparing", agreement.check_agreement, lambda *_: None)
for module in (check, ffn):
    module.check_agreement = compare
import transformers.models.llama.modeling_llama  # the comparison of logits, which is not counted, needs it too
from upcycle.cli import main
try:
    main()
finally:
    Path(out).write_text(json.dumps(spent))
"""


def run(command: str, run_folder: Path, work: Path, skip: bool) -> dict[str, float]:
    """Seconds of a whole command, and of what it spent on hashing and on comparing."""
    folders = [work / "base", *(work / f"checkpoint-{i + 1}" for i in range(job.NUM_CHECKPOINTS))]
    environment = os.environ | {"PYTHONHASHSEED": "0", CACHE: str(work / "cache")}
    spent = work / "spent.json"
    line = [sys.executable, "-c", COMMAND, json.dumps(skip), str(spent), command, "upit", "--run", str(run_folder)]
    begin = time.monotonic()
    with (work / "log.txt").open("ab") as log:
        done = subprocess.run([*line, *job.settings(folders)], stdout=log, stderr=log, env=environment)
    if done.returncode:
        raise SystemExit(f"upcycle {command} failed, see {work / 'log.txt'}")
    return {"wall": time.monotonic() - begin, **json.loads(spent.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and the run: 17 GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="as small as can be")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    job.CONFIG.update(job.TOY if arguments.toy else {})
    work.mkdir(parents=True, exist_ok=True)
    job.make_models(work)
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for _ in range(arguments.repeats):
        for skip in (False, True):
            folder = work / "run"
            for left in (folder, work / "cache"):
                shutil.rmtree(left, ignore_errors=True)
            for command in COMMANDS:
                found.setdefault((command, skip), []).append(run(command, folder, work, skip))
                say(f"{command}{' without' if skip else ''}: {found[command, skip][-1]}")
    shutil.rmtree(work / "run")
    report(found)


def report(found: dict[tuple[str, bool], list[dict[str, float]]]) -> None:
    def median(command: str, skip: bool, what: str) -> float:
        return statistics.median(cost[what] for cost in found[command, skip])

    columns = ((True, "wall"), (False, "wall"), (False, "hashing"), (False, "comparing"))
    rows = [(command, *(f"{median(command, *which):.2f}" for which in columns)) for command in COMMANDS]
    table("seconds", ("command", "without", "with", "of it hashing", "of it comparing"), rows)
    spent = median("assemble", False, "hashing") + median("prepare", False, "comparing")
    share = spent / median("assemble", False, "wall")
    say(f"hashing and comparing over `upcycle assemble`: {share:.3f}, to be under {MOST}")


if __name__ == "__main__":
    main()
