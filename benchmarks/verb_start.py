"""What it takes until a verb that only plans, copies or looks has done so: on the embedded model, as it is typed.

    python benchmarks/verb_start.py --work FOLDER --keep        # six minutes; puts the table into docs/benchmarks.md
    python benchmarks/verb_start.py --work FOLDER --toy

Each verb is a process of its own, all in turn, beside a bare Python and one that imports torch; wall and CPU seconds
are the median of the rounds. What is hashed and encoded is remembered from round to round, as a user's is. Which heavy
modules a verb has imported is asked in a run that is not timed. The verbs that train are left out.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from assembly_vs_mergekit import PAGE, commit, machine, today

from upcycle.console import say
from upcycle.disk import CACHE, write_json, write_text

KEPT = Path(__file__).parent / "results" / "verbs.json"
BLOCK = re.compile(r"(<!-- verbs -->\n).*?(<!-- end -->)", re.DOTALL)
HEAVY = ("torch", "transformers", "transformers.modeling_utils", "scipy", "matplotlib", "peft", "datasets", "trl")
SHORT = "data.fraction=0.05 data.max_validation=24 prepare.epochs=1 posttrain.epochs=1 route.min_samples_per_expert=3"
RUN = f"quickstart {SHORT} evaluate.models=ends evaluate.max_generated=4 --run run"
PLANNING = "upit base=builtin:tiny data.train=builtin:train prepare.checkpoints=run/prepare --run planning"
VERBS = {
    "--help": "--help",
    "recipes": "recipes",
    "settings": "settings",
    "families": "families",
    "run --dry-run": f"run {PLANNING.replace('planning', 'new')} --dry-run",
    "run, all complete": f"run {RUN}",
    "init": "init --base builtin:tiny --data builtin:train --out new.yaml",
    "data": "data builtin:train data.fraction=0.05 --base builtin:tiny",
    "check": "check builtin:tiny",
    "prepare, checkpoints given": f"prepare {PLANNING}",
    "expand": f"expand {PLANNING}",
    "assemble": f"assemble {PLANNING}",
    "inspect": "inspect run --figure similarity.png",
    "report": "report run --out report.html",
    "export": "export run --to exported",
}
"""In the order in which one makes what the next needs."""
TOY = ("--help", "prepare, checkpoints given", "inspect")
MADE = ("new", "new.yaml", "planning", "exported")
"""By the verbs, anew in each round."""
LOOK = """
import atexit, sys
heavy, out = sys.argv.pop(1).split(), sys.argv.pop(1)
atexit.register(lambda: open(out, "w").write(" ".join(name for name in heavy if name in sys.modules)))
from upcycle.__main__ import main
main()
"""


def commands() -> dict[str, list[str]]:
    """By the name in the table."""
    bare = {f'python -c "{code}"': ["-c", code] for code in ("pass", "import torch")}
    return bare | {f"upcycle {name}": ["-m", "upcycle", *shlex.split(words)] for name, words in VERBS.items()}


def timed(words: Sequence[str], work: Path) -> tuple[float, float]:
    """Wall and CPU seconds of Python with these words, in that folder."""
    begin = time.perf_counter()
    with (work / "log.txt").open("ab") as log:
        environment = {**os.environ, CACHE: str(work / "cache"), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, *words], cwd=work, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(words)} failed, see {work / 'log.txt'}")
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime


def clear(work: Path) -> None:
    for name in MADE:
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).unlink(missing_ok=True)


def measure(work: Path, rounds: int) -> list[dict[str, Any]]:
    """A row for each command."""
    modules = {}
    clear(work)
    for name, words in commands().items():
        if words[0] == "-m":
            timed(["-c", LOOK, " ".join(HEAVY), "modules.txt", *words[2:]], work)
            modules[name] = (work / "modules.txt").read_text().split()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands()}
    for number in range(rounds):
        clear(work)
        for name, words in commands().items():
            taken[name].append(timed(words, work))
        say(f"round {number + 1} of {rounds}")
    return [
        {"name": name, "wall_s": wall, "cpu_s": cpu, "modules": modules.get(name, [])}
        for name, costs in taken.items()
        for wall, cpu in [map(statistics.median, zip(*costs, strict=True))]
    ]


def markdown(found: Mapping[str, Any]) -> str:
    """A row for each command, with machine and commit."""
    title = f"{found['machine']}; commit {found['commit']}, {found['day']}; median of {found['rounds']} rounds."
    lines = [title, "", "| command | wall s | CPU s | imports |", "| --- | --: | --: | --- |"]
    for row in found["rows"]:
        heavy = ", ".join("transformers' models" if "modeling" in name else name for name in row["modules"])
        lines.append(f"| `{row['name']}` | {row['wall_s']:.2f} | {row['cpu_s']:.2f} | {heavy} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with the table made anew from what is kept."""
    made = markdown(json.loads(KEPT.read_text()))
    return BLOCK.sub(lambda block: f"{block[1]}{made}{block[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for a small run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", action="store_true", help=f"keep the figures, and put the table into {PAGE.name}")
    parser.add_argument("--toy", action="store_true", help="a round of some verbs")
    arguments = parser.parse_args()
    work, rounds = arguments.work.absolute(), 1 if arguments.toy else arguments.rounds
    for name in set(VERBS) - set(TOY if arguments.toy else VERBS):
        del VERBS[name]
    work.mkdir(parents=True, exist_ok=True)
    say("making the run that is looked at")
    timed(["-m", "upcycle", "run", *shlex.split(RUN)], work)
    rows = measure(work, rounds)
    found = {"machine": machine(), "commit": commit(), "day": today(), "rounds": rounds, "rows": rows}
    say(markdown(found))
    if arguments.keep:
        write_json(KEPT, found)
        write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
