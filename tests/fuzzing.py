"""Damaged inputs against whole commands: each is refused in a line, or accepted without harm.

    python tests/fuzzing.py --cases 1000 --seed 0        # `make torture`; ends in one line of figures

A case takes a good world (a base, checkpoints, adapters, rows, a recipe, a finished run with benchmark scores, a
comparison, a sweep, a mixture), damages one file of it or one word of a command, and runs the command in this process.
What must hold: exit 0, or exit 2 with a line that begins with `error: ` (or typer's own usage error); no traceback, no
question, no more than a few seconds and some memory; and a damaged file of a finished stage is refused by every verb
that reads the stage. Cases follow from seed and number alone.
"""

import argparse
import contextlib
import io
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from damaging import damage, odd_override, odd_words

SECONDS = 20.0
"""That a case may take."""
MOST_BYTES = 1 << 30
"""That a case may add to the process's memory."""
LONGEST = 4000
"""Characters of an error, besides the words that it may repeat."""
CONFIGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")
TEMPLATE = "chat_template.jinja"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
STAGES = {
    "prepare": ("checkpoints.json", "manifest.json"),
    "expand": ("plan.json", "manifest.json"),
    "assemble": ("config.json", "model.safetensors", "upcycle_plan.json", "manifest.json"),
    "route": ("report.json", "router.safetensors", "manifest.json"),
    "posttrain": ("log.json", "config.json", "model.safetensors", "manifest.json", "upcycle_plan.json"),
    "evaluate": ("scores.json", "routing.json", "manifest.json"),
}
READS = {
    "resume": set(STAGES),
    "report": set(STAGES),
    "inspect": {"expand", "posttrain", "evaluate"},
    "export": {"posttrain", "evaluate"},
    "benchmark run": {"prepare", "posttrain"},
}
"""Stages of a finished run whose files a command checks."""


def commands(world: Path) -> dict[str, list[str]]:
    """Good commands by name: each ends with exit 0 in a world that is not damaged."""
    place = {name: str(world / name) for name in ("base", "run", "new", "tasks", "mix", "comparison", "sweep")}
    recipe, picture = str(world / "recipe.yaml"), ["--figure", str(world / "x.png")]
    measured = ["--seeds", "1", "--no-keep-models", "--out"]
    asked = ["--task-folder", place["tasks"], "--limit", "2"]
    page, out = ["--out", str(world / "x.html")], ["--to", str(world / "out")]
    lora = [f"prepare.checkpoints=[{world}/a1, {world}/a2]", "prepare.train=lora"]
    return {
        "prepare": ["prepare", recipe, "--run", str(world / "fresh")],
        "adapters": ["prepare", recipe, "--run", str(world / "adapted"), *lora],
        "dry": ["run", recipe, "--run", place["new"], "--dry-run"],
        "check": ["check", place["base"]],
        "route": ["route", recipe, "--run", place["new"]],
        "resume": ["run", recipe, "--run", place["run"]],
        "status": ["run", recipe, "--run", place["run"], "--dry-run"],
        "inspect": ["inspect", place["run"], *picture],
        "inspect stage": ["inspect", f"{place['run']}/posttrain", *picture],
        "export": ["export", place["run"], *out],
        "fold": ["export", place["mix"], *out, "--fold", "--base", place["base"]],
        "report": ["report", place["run"], *page],
        "benchmark": ["benchmark", place["base"], *asked, "--out", str(world / "scores")],
        "benchmark mixture": ["benchmark", place["mix"], *asked, "--out", str(world / "scores")],
        "benchmark run": ["benchmark", place["run"], *asked],
        "compare": ["compare", *_variants(recipe), *measured, place["comparison"]],
        "report comparison": ["report", place["comparison"], *page],
        "inspect measured": ["inspect", f"{place['comparison']}/0-seed0", *picture],
        "sweep": ["sweep", recipe, "route.start=random,mean_hidden", *measured, place["sweep"]],
        "report sweep": ["report", place["sweep"], *page],
    }


def _variants(recipe: str) -> list[str]:
    return [f"{recipe} route.start=random", f"{recipe} route.start=mean_hidden"]


def targets(world: Path) -> list[tuple[int, list[Path], tuple[str, ...]]]:
    """(weight, files of which one is damaged, commands of which one is run)"""
    run, cells = world / "run", [world / "comparison" / f"{number}-seed0" for number in (0, 1)]
    verbs = ("resume", "status", "inspect", "inspect stage", "export", "report", "benchmark run")
    measured = [cells[0] / name for name in ("measures.json", "measures.json", "recipe.yaml", "costs.json")]
    measured += [cells[0] / "evaluate" / "scores.json", cells[0] / "posttrain" / "manifest.json"]
    asked = sorted((run / "benchmark").glob("cache/*.json"))
    return [
        (8, [world / "recipe.yaml"], ("dry", "prepare")),
        (5, [world / "rows.jsonl"], ("route",)),
        (9, [world / "base" / name for name in (*CONFIGS, TEMPLATE)], ("prepare", "check", "benchmark", "route")),
        (4, [world / "c1" / name for name in ("config.json", "model.safetensors")], ("prepare",)),
        (7, [world / "a1" / name for name in ADAPTER], ("adapters",)),
        (24, [run / stage / name for stage, names in STAGES.items() for name in names], verbs),
        (6, [run / name for name in ("recipe.yaml", "costs.json")], verbs),
        (
            5,
            [run / "benchmark" / name for name in ("benchmark.json", "of.json")],
            ("report", "export", "benchmark run"),
        ),
        (2, asked, ("benchmark run",)),
        (5, [world / "comparison" / "comparison.json"], ("report comparison", "compare")),
        (3, [world / "comparison.json"], ("report",)),
        (5, measured, ("compare", "report comparison", "inspect measured")),
        (4, [world / "sweep" / name for name in ("sweep.json", "0-seed0/measures.json")], ("sweep", "report sweep")),
        (8, sorted((world / "tasks").iterdir()), ("benchmark",)),
        (6, [world / "mix" / name for name in (*ADAPTER, "upcycle_plan.json")], ("fold", "benchmark mixture")),
    ]


OF_WORDS = 18
"""The weight of cases that damage no file but an override or another word of the command."""


def make_world(folder: Path) -> None:
    """Everything good; where it lies is written into many of its files."""
    from conftest import make_dense, perturbed, write_rows
    from upcycle.pipeline.resume import run_stages
    from upcycle.pipeline.run import Run
    from upcycle.recipe import dump_recipe, parse_recipe
    from worlds import make_adapter, mixture

    base = make_dense(folder / "base")
    checkpoints = [perturbed(base, folder / f"c{i}", i) for i in (1, 2)]
    mixture(base, [make_adapter(base, folder / f"a{i}", i) for i in (1, 2)], folder / "mix")
    write_rows(folder / "rows.jsonl", 60)
    write_tasks(folder / "tasks")
    training = {"epochs": 1, "checkpoint_every": 1, "batch_size": 16, "micro_batch_size": 16}
    values = {
        "base": str(base),
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 64},
        "prepare": {**training, "checkpoints": [str(c) for c in checkpoints]},
        "expand": {"num_experts": 3},
        "route": {"min_samples_per_expert": 3, "epochs": 1, "start": "random"},
        "posttrain": training,
        "evaluate": {"models": "ends", "exact_match": False},
    }
    recipe = parse_recipe(values, "fuzz")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    run_stages(Run(recipe, folder / "run"))
    run_stages(Run(recipe, folder / "new"), ("prepare", "expand", "assemble"), donors=[folder / "run"])
    (folder / "here").mkdir()
    good = commands(folder)
    for name in ("benchmark run", "compare"):
        must_hold(name, good[name])
    shutil.copytree(folder / "comparison", folder / "sweep", ignore=lambda *_: ["comparison.json"])
    must_hold("sweep", good["sweep"])
    shutil.copy(folder / "comparison" / "comparison.json", folder)  # of which the run is a cell, then


def write_tasks(folder: Path) -> None:
    """A file of each kind of row."""
    import json

    rows = {
        "choose": [{"question": f"spell {w}", "choices": ["abc", "x"], "answer": 0, "context": "c"} for w in "ab"],
        "say": [{"prompt": f"copy {w}", "answer": [w, w * 2]} for w in "ab"],
        "program": [{"prompt": "add", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""}],
    }
    folder.mkdir()
    for name, entries in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")


class TooLongError(BaseException):
    """No `except` of a library may take it for its own."""


class AskedError(BaseException):
    """Somebody reads what is typed."""


class Nobody(io.TextIOBase):
    """A terminal at which nobody sits."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: object) -> str:  # type: ignore[override]
        raise AskedError

    read = readline


def _too_long(*_: object) -> None:
    raise TooLongError


@contextlib.contextmanager
def watched(words: list[str], said: io.StringIO) -> Iterator[None]:
    """The command's own world: its words, nobody to answer, a clock, a limit on what it can allocate."""
    before = sys.argv, sys.stdin, resource.getrlimit(resource.RLIMIT_AS)
    sys.argv, sys.stdin = ["upcycle", *words], Nobody()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_BYTES, before[2][1]))
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(int(SECONDS))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, before[2])
        sys.argv, sys.stdin = before[:2]


def outcome(words: list[str]) -> tuple[int, str | None]:
    """Exit status of a command, and what it did wrong; None if nothing."""
    from upcycle import cli

    said, begin = io.StringIO(), time.monotonic()
    try:
        with watched(words, said):
            cli.main()
        code: Any = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # whatever it is: that is what is looked for
        return 1, f"traceback: {traceback.format_exc()[-1500:]}"
    text = said.getvalue()
    if (seconds := time.monotonic() - begin) > SECONDS:
        return code, f"took {seconds:.0f} s"
    if code == 0 or (code == 2 and ("Usage" in text or "─ Error ─" in text)):
        return code, None
    if code == 2 and "error: " in text:
        too_long = len(text) > LONGEST + 2 * sum(map(len, words))
        return code, f"an error of {len(text)} characters: {text[:300]}" if too_long else None
    return code, f"exit {code}: {text[-300:]}"


def must_hold(name: str, words: list[str]) -> None:
    """Raises AssertionError if a good command fails in a good world."""
    code, wrong = outcome(words)
    assert (code, wrong) == (0, None), f"{name}: exit {code}, {wrong}"


def content(path: Path) -> bytes | None:
    """What lies there; None if no file does."""
    return path.read_bytes() if path.is_file() else None


def one_case(number: int, seed: int, world: Path) -> str | None:
    """Damage, run, judge; what went wrong, with how to see it again."""
    draw, good = random.Random(f"{seed}/{number}"), commands(world)
    found = [*targets(world), (OF_WORDS, [], ())]
    _, files, verbs = draw.choices(found, [weight for weight, _, _ in found])[0]
    if not files:
        words = _odd_command(good, draw, world)
        what, (code, wrong) = repr(words)[:300], outcome(words)
    else:
        target, name = draw.choice(files), draw.choice(verbs)
        before, how = content(target), damage(target, draw)
        changed = content(target) != before
        what = f"{target.relative_to(world)} ({how}), {name}"
        code, wrong = outcome(good[name])
        if code == 0 and changed and _is_sealed(target.relative_to(world), name):
            wrong = "damage went unnoticed"
    return wrong and f"case {number} of seed {seed}: {what}: {wrong}"


def _is_sealed(path: Path, name: str) -> bool:
    """Whether a file is one of a finished stage that the command checks."""
    return path.parts[0] == "run" and path.parts[1] in READS.get(name, ()) and path.name != "manifest.json"


def _odd_command(good: dict[str, list[str]], draw: random.Random, world: Path) -> list[str]:
    """A command with an override, or another word, that nobody writes."""
    if draw.random() < 0.5:
        return odd_words(draw.choice(list(good.values())), draw, [world / "rows.jsonl", world / "base", world / "here"])
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    sections = {name: value for name, value in recipe.items() if isinstance(value, dict)}
    settings = ["base", "seed", *(f"{name}.{field}" for name, fields in sections.items() for field in fields)]
    if draw.random() < 0.7:
        return [*good["dry"], *(odd_override(draw, settings) for _ in range(draw.choice((1, 1, 2))))]
    words = list(good[draw.choice(("compare", "sweep"))])
    override = odd_override(draw, ("route.start", "expand.merge", "data.train", "base"))  # none that trains for days
    words[2] = f"{words[1]} {override}" if words[0] == "compare" else override
    return words


def run_cases(count: int, seed: int, first: int = 0, whole: bool = False) -> list[str]:
    """The cases that do not hold.

    Args:
        whole: first see that every good command holds in a good world.
    """
    found: list[str] = []
    with TemporaryDirectory() as folder:
        world, kept = Path(folder) / "world", Path(folder) / "kept"
        make_world(world)
        world.rename(kept)
        here = Path.cwd()
        for name, words in commands(world).items() if whole else ():
            shutil.rmtree(world, ignore_errors=True)
            shutil.copytree(kept, world)
            must_hold(name, words)
        for number in range(first, first + count):
            shutil.rmtree(world, ignore_errors=True)
            shutil.copytree(kept, world)
            os.chdir(world / "here")  # a relative path leads nowhere else
            try:
                wrong = one_case(number, seed, world)
            finally:
                os.chdir(here)
            if wrong:
                print(wrong, flush=True)
                found.append(wrong)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    arguments = parser.parse_args()
    begin = time.monotonic()
    wrong = run_cases(arguments.cases, arguments.seed, arguments.first, whole=True)
    held = arguments.cases - len(wrong)
    print(f"fuzz: {held} of {arguments.cases} cases hold (seed {arguments.seed}, {time.monotonic() - begin:.0f} s)")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
