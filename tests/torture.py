"""Whole commands killed at any instant: resumed, each ends in the same bytes as one that was left alone.

    python tests/torture.py --kills 200 --seed 0      # `make torture`; ends in one line of figures

Half of the kills come before a chosen change of the file system, half at a random time; some while everything is
imported, and many of a command that is itself a resume. SIGTERM and SIGINT must end in one line and 143 or 130. Then
files that are cut, full disks, two processes at once, a folder that nobody may write to, another order of sets. What
is drawn follows from seed and number alone.
"""

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}

from jobs import JOBS, KINDS, RUNS, SHORT, Job, contents, differences, make_world, preload
from killing import Ended, Instant, Started, can_mount, forked, fresh, mounted

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STOPPED = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
STAGES = ("prepare", "expand", "assemble", "route", "posttrain", "evaluate")
STAGE = re.compile(rf"/\.?({'|'.join(STAGES)})\b")
OURS = re.compile(r"src/upcycle/(?!__init__|__main__|stopping)")
SEALED = re.compile(r"os\.(rename|remove) \S+?/\w+(\.partial \S+|/inputs\.json)")


def seconds_to_begin() -> float:
    """Until when a new interpreter may not have come to our first line: with room, as other programs run too."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "import upcycle.stopping"], check=True)
    return 2 * (time.monotonic() - begin)


@dataclass
class Reference:
    """What a command does that is left alone."""

    ended: Ended
    contents: dict[str, bytes]
    start: Path | None
    """A folder to begin from."""


@dataclass
class Torture:
    """A world, the references, what was found."""

    root: Path
    seed: int
    jobs: tuple[Job, ...] = JOBS
    tried: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    """What was being done when a kill came."""
    resumes: int = 0
    """Kills of a command that went on after one."""
    refused: Counter[str] = field(default_factory=Counter)
    """Cases in which a command refuses in a line; in the others it goes on without harm."""
    beginning: float = field(default_factory=seconds_to_begin)
    notes: list[str] = field(default_factory=list)
    _references: dict[str, Reference] = field(default_factory=dict)

    @property
    def kinds(self) -> list[Job]:
        """The jobs that make runs of different kinds of experts."""
        return [job for job in self.jobs if job in KINDS]

    @property
    def world(self) -> Path:
        return self.root / "world"

    @property
    def case(self) -> Path:
        """Always the same, so that no path differs."""
        return self.root / "case"

    def words(self, job: Job) -> list[str]:
        return [word.format(case=self.case, world=self.world) for word in job.words]

    def run(self, job: Job, at: Instant | None = None) -> Ended:
        return forked(self.words(job), self.root, at)

    def begin(self, job: Job) -> None:
        """An empty case, or a copy of what the job starts from."""
        start = self.reference(job).start
        self._empty()
        if start:
            shutil.copytree(start, self.case, dirs_exist_ok=True)

    def _empty(self) -> None:
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()

    def reference(self, job: Job) -> Reference:
        if job.name not in self._references:
            start = None
            self._empty()
            if job.before:
                self._left_alone(Job(f"before {job.name}", job.before))
                start = Path(shutil.copytree(self.case, self.root / "starts" / job.name))
            ended = self._left_alone(job)
            self._references[job.name] = Reference(ended, contents(self.case), start)
        return self._references[job.name]

    def _left_alone(self, job: Job) -> Ended:
        ended = self.run(job)
        if ended.status:
            raise SystemExit(f"{job.name}: exit {ended.status} without a kill: {ended.said[-2000:]}")
        return ended

    def resumed(self, job: Job) -> str:
        """What is wrong once the same command was left alone."""
        ended = self.run(job)
        done = job.done and ended.status == 2 and job.done in ended.said
        if ended.status and not done:
            return f"the resume: exit {ended.status}: {ended.said[-600:]}"
        return self.changed(job)

    def changed(self, job: Job) -> str:
        """How the case differs from the reference."""
        return differences(self.reference(job).contents, contents(self.case))

    def count(self, what: str, case: str, wrong: str, times: int = 1) -> None:
        """A case that was tried; what is wrong with it is told."""
        self.tried[what] += times
        if wrong:
            print(f"{what} of seed {self.seed}, {case}: {wrong}", flush=True)
        else:
            self.held[what] += times


def wrong_end(ended: Ended, at: Instant, begun: bool) -> str:
    """What is wrong with how a command ended that got a signal.

    Args:
        begun: whether the program had begun; until then the interpreter answers a signal in its own way.
    """
    lines = ended.said.strip().splitlines()
    said = at.number == signal.SIGKILL or (lines and lines[-1].startswith("stopped; continue with: upcycle "))
    clean = "Traceback" not in ended.said and "Exception ignored" not in ended.said
    if ended.status == STOPPED[at.number] and said and clean:
        return ""
    if not begun and not OURS.search(ended.said):
        return ""
    return f"exit {ended.status}: {ended.said[-900:]}"


def is_sealing(change: str) -> bool:
    """Whether a change belongs to the sealing of a stage."""
    return "/manifest.json" in change or "/.manifest.json" in change or SEALED.fullmatch(change) is not None


def where(job: Job, ended: Ended) -> str:
    """What a command was at when it was killed, as far as its last changes say."""
    for change in reversed(ended.changes):
        if is_sealing(change):
            return "sealing"
        if found := STAGE.search(change):
            return found[1]
    return f"beginning {job.words[0]}" if job in RUNS else job.words[0]


def instant(draw: random.Random, reference: Ended, again: bool) -> Instant:
    """Before a change (some of them while a stage is sealed), or at a time; sooner for a resume, which is shorter."""
    share, number = draw.random() * (0.6 if again else 1.0), draw.choice(SIGNALS)
    how = draw.random()
    if how > 0.5:
        return Instant(number, seconds=0.01 + share * reference.seconds)
    sealing = [i for i, change in enumerate(reference.changes, 1) if is_sealing(change)]
    if how < 0.15 and sealing and not again:
        return Instant(number, change=draw.choice(sealing))
    return Instant(number, change=1 + int(share * len(reference.changes)))


def kill(torture: Torture, number: int) -> int:
    """A case: a command killed once or more, then left alone; how many kills it took."""
    draw = random.Random(f"{torture.seed}/kill {number}")
    job = torture.jobs[number % len(torture.jobs)] if draw.random() < 0.7 else draw.choice(torture.kinds)
    reference = torture.reference(job).ended
    torture.begin(job)
    wrong, kills, told = "", 0, []
    for again in range(draw.choice((1, 1, 2, 4))):
        at = instant(draw, reference, again > 0)
        ended = torture.run(job, at)
        told.append(str(at))
        if ended.status == 0 or (job.done and job.done in ended.said):
            continue  # it was quicker
        kills += 1
        torture.signals[at.number.name] += 1
        torture.places[where(job, ended)] += 1
        torture.resumes += again > 0
        wrong = wrong or wrong_end(ended, at, begun=bool(ended.changes))
    wrong = torture.resumed(job) or wrong
    torture.count("kills", f"case {number}, {job.name}, {'; '.join(told)}", wrong, kills)
    return kills


def kill_fresh(torture: Torture, number: int, until: float) -> int:
    """A command in a new interpreter, killed at some time up to `until` seconds, most of which are imports."""
    draw = random.Random(f"{torture.seed}/fresh {number}")
    job, at = draw.choice(torture.jobs), Instant(draw.choice(SIGNALS), seconds=0.02 + draw.random() * until)
    torture.reference(job)
    torture.begin(job)
    ended = fresh(torture.words(job), at)
    if ended.status == 0:
        return 0
    begun = at.seconds > torture.beginning
    wrong, place = wrong_end(ended, at, begun), "import" if begun else "the interpreter's start"
    if wrong and not ended.said and not torture.changed(job):  # all was done; the handlers were taken down already
        wrong, place = "", "the interpreter's end"
    torture.signals[at.number.name] += 1
    torture.places[place] += 1
    wrong = torture.resumed(job) or wrong
    torture.count("kills", f"fresh case {number}, {job.name}, {at}", wrong)
    return 1


def cut(torture: Torture, number: int) -> None:
    """A kill, then files of working folders cut at any length: the same bytes in the end, or one line."""
    draw = random.Random(f"{torture.seed}/cut {number}")
    job = draw.choice(torture.kinds)
    changes = len(torture.reference(job).ended.changes)
    torture.begin(job)
    torture.run(job, Instant(change=1 + draw.randrange(changes)))
    files = [p for p in sorted(torture.case.rglob("*")) if p.is_file() and (".partial" in str(p) or p.suffix == ".tmp")]
    chosen = draw.sample(files, min(len(files), draw.choice((1, 1, 2, 20))))
    for path in chosen:
        with path.open("r+b") as file:
            file.truncate(draw.randrange(path.stat().st_size + 1))
    ended = torture.run(job)
    torture.refused["cut files"] += ended.status == 2
    wrong = not_a_line(torture, ended) if ended.status else torture.changed(job)
    names = [str(path.relative_to(torture.case)) for path in chosen]
    torture.count("cut files", f"case {number}, {job.name}, {names}", wrong)


def not_a_line(torture: Torture, ended: Ended) -> str:
    """What is wrong with how a command refuses: it should be one line that names a file of the case."""
    said = ended.said.strip().splitlines()
    line = ended.status == 2 and said and said[-1].startswith("error: ") and str(torture.case) in said[-1]
    return "" if line and "Traceback" not in ended.said else f"exit {ended.status}: {ended.said[-1500:]}"


def cut_sealed(torture: Torture, number: int) -> None:
    """A file of a sealed stage is cut: every verb names it."""
    draw = random.Random(f"{torture.seed}/sealed {number}")
    job = draw.choice(torture.kinds)
    torture.reference(job)
    torture.begin(job)
    torture.run(job)
    below = (p for s in STAGES for p in sorted((torture.case / "run" / s).rglob("*")))
    path = draw.choice([p for p in below if p.is_file() and p.stat().st_size])
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))
    ended = torture.run(job)
    wrong = not_a_line(torture, ended) or ("" if path.name in ended.said else f"not named: {ended.said}")
    torture.count("cut sealed files", f"case {number}, {job.name}, {path}", wrong)


def full_disk(torture: Torture, number: int) -> None:
    """A disk that is too small, one line; with more room the same bytes."""
    draw = random.Random(f"{torture.seed}/disk {number}")
    job = torture.jobs[number % len(torture.jobs)]
    reference = torture.reference(job)
    start = sum(p.stat().st_size for p in reference.start.rglob("*") if p.is_file()) if reference.start else 0
    written = sum(map(len, reference.contents.values())) - start
    shutil.rmtree(torture.case, ignore_errors=True)
    with mounted(torture.case, "size=1g"):
        if reference.start:
            shutil.copytree(reference.start, torture.case, dirs_exist_ok=True)
        used = shutil.disk_usage(torture.case).used
        size = used + 4096 + int(draw.random() * written)
        subprocess.run(["mount", "-o", f"remount,size={size}", str(torture.case)], check=True)
        ended = torture.run(job)
        subprocess.run(["mount", "-o", "remount,size=1g", str(torture.case)], check=True)
        wrong = not_a_line(torture, ended) if ended.status else ""
        wrong = torture.resumed(job) or wrong
        torture.refused["small disks"] += ended.status == 2
    torture.count("small disks", f"case {number}, {job.name}, {size} bytes", wrong)


def two_at_once(torture: Torture, number: int) -> None:
    """Two processes in one folder, started within milliseconds or later: one works, the other says so or follows."""
    draw = random.Random(f"{torture.seed}/two {number}")
    job = torture.jobs[number % len(torture.jobs)]
    reference = torture.reference(job)
    torture.begin(job)
    first = Started(torture.words(job), torture.root)
    time.sleep(draw.choice((0.0, 0.0, 0.005, draw.random() * reference.ended.seconds)))
    both = [Started(torture.words(job), torture.root).wait(), first.wait()]
    refused = [ended for ended in both if ended.status]
    wrong = "; ".join(filter(None, (not_a_line(torture, ended) for ended in refused)))
    torture.refused["two at once"] += len(refused) == 1
    if len(refused) == 2:
        wrong = f"both gave up: {[ended.said for ended in refused]}"
    torture.count("two at once", f"case {number}, {job.name}", wrong or torture.changed(job))


def read_only(torture: Torture, number: int) -> None:
    """Nobody may write: one line that names a file, and nothing lost."""
    draw = random.Random(f"{torture.seed}/read-only {number}")
    job = torture.jobs[number % len(torture.jobs)]
    reference = torture.reference(job)
    torture.begin(job)
    torture.run(job, Instant(change=1 + draw.randrange(len(reference.ended.changes))))
    before = contents(torture.case)
    subprocess.run(["mount", "--bind", str(torture.case), str(torture.case)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(torture.case)], check=True)
        ended = torture.run(job)
    finally:
        subprocess.run(["umount", str(torture.case)], check=True)
    wrong = differences(before, contents(torture.case)) or not_a_line(torture, ended) or torture.resumed(job)
    torture.count("read-only", f"case {number}, {job.name}", wrong)


def other_hashes(torture: Torture, number: int) -> None:
    """Another PYTHONHASHSEED, in an interpreter of its own: the same bytes."""
    job = torture.kinds[number % len(torture.kinds)]
    torture.reference(job)
    torture.begin(job)
    ended = fresh(torture.words(job), more={"PYTHONHASHSEED": str(number + 1)})
    wrong = f"exit {ended.status}: {ended.said[-900:]}" if ended.status else ""
    torture.count("hash seeds", f"PYTHONHASHSEED={number + 1}, {job.name}", wrong or torture.changed(job))


PARTS: tuple[tuple[str, Callable[[Torture, int], None], int, bool], ...] = (
    ("cut files", cut, 3, False),
    ("cut sealed files", cut_sealed, 10, False),
    ("small disks", full_disk, 5, True),
    ("two at once", two_at_once, 8, False),
    ("read-only", read_only, 10, True),
    ("hash seeds", other_hashes, 40, False),
)
"""What else is tried: its name, a case, for how many kills there is one, whether it mounts a disk of its own."""


def torment(torture: Torture, kills: int, first: int = 0) -> str:
    """Everything, in proportion to the number of kills; the line of figures."""
    done = sum(kill_fresh(torture, number, until=4.0) for number in range(first, first + kills // 6))
    for number in itertools.count(first):
        if done >= kills:
            break
        done += kill(torture, number)
        if number % 20 == 0:
            print(f"... {done} of {kills} kills", flush=True)
    mounts = can_mount(torture.root / "mounts")
    for name, part, every, mounting in PARTS:
        if mounting and not mounts:
            torture.notes.append(f"{name} not tried: this user may not mount")
            continue
        print(f"... {name}", flush=True)
        for number in range(first, first + kills // every):
            part(torture, number)
    return figures(torture)


def figures(torture: Torture) -> str:
    """One line."""
    signals = ", ".join(f"{name} {torture.signals[name]}" for name in (s.name for s in SIGNALS))
    places = ", ".join(f"{place} {count}" for place, count in torture.places.most_common())
    how = {"kills": f" held ({signals}; {torture.resumes} of a resume; {places})"}
    how |= {name: f" ({count} refused in a line)" for name, count in torture.refused.items()}
    parts = (f"{name}: {torture.held[name]} of {torture.tried[name]}{how.get(name, '')}" for name in torture.tried)
    return "; ".join([*parts, *torture.notes])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--short", action="store_true", help="not every kind of command")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        torture = Torture(Path(folder), arguments.seed, SHORT if arguments.short else JOBS)
        preload(torture.jobs)
        make_world(torture.world)
        line = torment(torture, arguments.kills, arguments.first)
    print(line)
    raise SystemExit(torture.held != torture.tried)


if __name__ == "__main__":
    main()
