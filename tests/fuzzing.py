"""Damaged inputs against whole commands: each is refused in a line, or accepted without harm.

    python tests/fuzzing.py --cases 1000 --seed 0        # `make torture`; ends in one line of figures

A case takes a good world (a base, checkpoints, adapters, rows, a recipe, a finished run), damages one file of it, and
runs one command on it in this process. What must hold: exit 0, or exit 2 with a line that begins with `error: ` (or
typer's own usage error); no traceback, no more than a few seconds. Cases follow from seed and number alone.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

SECONDS = 20.0
"""That a case may take."""
WEIRD: list[Any] = [
    *(None, True, -1, 0, 10**12, 10**400, 1e308),
    *("", "x", "\ud800", "../../etc/passwd"),
    *([], [[]], {}, {"a": {}}),
]


def damage_bytes(path: Path, draw: random.Random) -> None:
    """Cut, flip, insert, empty."""
    content = bytearray(path.read_bytes())
    kind = draw.choice(("cut", "flip", "insert", "empty", "garbage", "head"))
    if kind == "cut":
        content = content[: draw.randrange(len(content) + 1)]
    elif kind == "flip" and content:
        for _ in range(draw.choice((1, 8))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "insert":
        place = draw.randrange(len(content) + 1)
        content[place:place] = draw.randbytes(draw.choice((1, 40)))
    elif kind == "head":
        content[:8] = draw.randbytes(8)
    else:
        content = bytearray() if kind == "empty" else bytearray(draw.randbytes(200))
    path.write_bytes(content)


def damage_place(path: Path, draw: random.Random) -> None:
    """Something else in the file's place, or nothing."""
    path.unlink()
    kind = draw.choice(("nothing", "folder", "pipe", "dangling", "loop", "zero"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("gone"))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")


def damage_text(path: Path, draw: random.Random) -> None:
    """What no decoder likes."""
    text = path.read_text(errors="replace")
    odd = draw.choice(
        ("[" * 60_000, "9" * 5000, "\ufeff" + text, "null", "[1]", "NaN", '{"a": 1, "a": 2}', "!!int x", text * 2)
    )
    path.write_text(odd)


def damage_field(path: Path, draw: random.Random) -> None:
    """A value somewhere in a JSON or YAML file becomes another, is lost, or gets a neighbour."""
    is_json = path.suffix != ".yaml"
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    number = draw.randrange(len(lines))
    try:
        value = json.loads(lines[number]) if is_json else yaml.safe_load(lines[number])
    except (ValueError, yaml.YAMLError):
        return
    spots: list[tuple[Any, Any]] = []

    def collect(inner: Any, depth: int = 0) -> None:
        entries = inner.items() if isinstance(inner, dict) else enumerate(inner) if isinstance(inner, list) else ()
        for key, below in list(entries)[:40]:
            spots.append((inner, key))
            if depth < 4:
                collect(below, depth + 1)

    collect(value)
    if not spots:
        return
    holder, key = draw.choice(spots)
    action = draw.choice(("set", "set", "set", "drop", "add"))
    if action == "set":
        holder[key] = draw.choice(WEIRD)
    elif action == "drop":
        del holder[key]
    elif isinstance(holder, dict):
        holder["surprise"] = draw.choice(WEIRD)
    try:
        written = json.dumps(value) if is_json else yaml.safe_dump(value, allow_unicode=False)
    except (ValueError, UnicodeError, yaml.YAMLError):
        return
    lines[number] = written
    path.write_text("\n".join(lines) + "\n")


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    damage_field,
    damage_field,
    damage_bytes,
    damage_text,
    damage_place,
)
CONFIGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
STAGES = {
    "prepare": ("checkpoints.json", "manifest.json"),
    "expand": ("plan.json", "manifest.json"),
    "assemble": ("config.json", "model.safetensors", "upcycle_plan.json", "manifest.json"),
    "route": ("report.json", "router.safetensors", "manifest.json"),
    "posttrain": ("log.json", "config.json", "model.safetensors", "manifest.json", "upcycle_plan.json"),
    "evaluate": ("scores.json", "routing.json", "manifest.json"),
}


def cases(world: Path) -> list[tuple[Path, list[list[str]]]]:
    """(file to damage, commands of which one is run)"""
    given = f"prepare.checkpoints=[{world}/c1, {world}/c2]"
    common = [str(world / "recipe.yaml"), "--run", str(world / "new")]
    make = [["prepare", *common, given], ["check", str(world / "base")], ["run", *common, given, "--dry-run"]]
    lora = ["prepare", *common, f"prepare.checkpoints=[{world}/a1, {world}/a2]", "prepare.train=lora"]
    run = str(world / "run")
    verbs = [
        ["inspect", run, "--figure", str(world / "x.png")],
        ["export", run, "--to", str(world / "out")],
        ["run", str(world / "recipe.yaml"), "--run", run, given],
        ["run", str(world / "recipe.yaml"), "--run", run, given, "--dry-run"],
        ["inspect", f"{run}/posttrain", "--figure", str(world / "x.png")],
    ]
    found: list[tuple[Path, list[list[str]]]] = [(world / "recipe.yaml", [make[2], make[0]])] * 4
    found += [(world / "rows.jsonl", [["route", *common, given]])] * 3
    found += [(world / "base" / name, make[:2]) for name in CONFIGS if (world / "base" / name).exists()]
    found += [(world / "c1" / name, make[:1]) for name in ("config.json", "model.safetensors")]
    found += [(world / "a1" / name, [lora]) for name in ADAPTER] * 2
    found += [(world / "run" / stage / name, verbs) for stage, names in STAGES.items() for name in names]
    found += [(world / "run" / name, verbs) for name in ("recipe.yaml", "costs.json")] * 2
    return found


def make_world(folder: Path) -> Path:
    """Everything good: a base, checkpoints, adapters, rows, a recipe and a finished run."""
    from conftest import make_dense, perturbed, write_rows
    from upcycle.pipeline.resume import run_stages
    from upcycle.pipeline.run import Run
    from upcycle.recipe import dump_recipe, parse_recipe
    from worlds import make_adapter

    base = make_dense(folder / "base")
    checkpoints = [perturbed(base, folder / f"c{i}", i) for i in (1, 2)]
    for i in (1, 2):
        make_adapter(base, folder / f"a{i}", i)
    write_rows(folder / "rows.jsonl", 60)
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
    common = Run(recipe, folder / "new")
    run_stages(common, ("prepare", "expand", "assemble"))
    return folder


class TooLongError(BaseException):
    """No `except` of a library may take it for its own."""


def _too_long(*_: object) -> None:
    raise TooLongError


def outcome(words: list[str]) -> str | None:
    """What a command did wrong; None if nothing."""
    from upcycle import cli

    said, begin = io.StringIO(), time.monotonic()
    before, sys.argv = sys.argv, ["upcycle", *words]
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(int(SECONDS))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            cli.main()
        code: Any = 0
    except SystemExit as end:
        code = end.code
    except BaseException:  # whatever it is: that is what is looked for
        return f"traceback: {traceback.format_exc()[-1500:]}"
    finally:
        signal.alarm(0)
        sys.argv = before
    if (seconds := time.monotonic() - begin) > SECONDS:
        return f"took {seconds:.0f} s"
    if code in (0, None) or (code == 2 and ("error: " in said.getvalue() or "Usage" in said.getvalue())):
        return None
    return f"exit {code}: {said.getvalue()[-300:]}"


def one_case(number: int, seed: int, world: Path, scratch: Path) -> str | None:
    """Run a case; what went wrong, with how to see it again."""
    draw = random.Random(f"{seed}/{number}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(world, scratch, copy_function=shutil.copyfile)
    for path in [
        scratch / "recipe.yaml",
        *scratch.glob("*/recipe.yaml"),
        scratch / "run" / "prepare" / "checkpoints.json",
    ]:
        path.write_text(path.read_text().replace(str(world), str(scratch)))
    target, commands = draw.choice(cases(scratch))
    how = draw.choice(DAMAGES)
    try:
        how(target, draw)
    except (UnicodeDecodeError, ValueError):
        damage_bytes(target, draw)
    words = draw.choice(commands)
    wrong = outcome(words)
    where = target.relative_to(scratch)
    return wrong and f"case {number} of seed {seed}: {where} ({how.__name__}), upcycle {words[0]}: {wrong}"


def run_cases(count: int, seed: int, first: int = 0) -> list[str]:
    """The cases that do not hold."""
    found: list[str] = []
    with TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world")
        for number in range(first, first + count):
            if wrong := one_case(number, seed, world, Path(folder) / "case"):
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
    wrong = run_cases(arguments.cases, arguments.seed, arguments.first)
    held = arguments.cases - len(wrong)
    print(f"fuzz: {held} of {arguments.cases} cases hold (seed {arguments.seed}, {time.monotonic() - begin:.0f} s)")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
