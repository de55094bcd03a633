"""Ways to damage a file or a command line; each draws from the generator that it is given, and from nothing else."""

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

WEIRD: list[Any] = [
    *(None, True, -1, 0, 10**12, 10**400, 1e308, float("nan")),
    *("", "x", "\ud800", "a\0b", "../../etc/passwd"),
    *([], [[]], {}, {"a": {}}),
]
VALUES = (
    *(
        "",
        "x",
        "null",
        "true",
        "-1",
        "0",
        "1",
        "1e400",
        ".inf",
        ".nan",
        "1e12",
        "9" * 5000,
        "0x10",
        "2e-5",
        "2001-01-01",
    ),
    *("[", "{", "[[]]", "[1, x]", "{a: 1}", "'", "a: b: c", "|", "- a", "? x", "@", "\t", "\x07", "[" * 5000),
    *("!!int x", "!!python/name:os.system", "*a", "&a [*a]", "&a [1, *a, *a]", '"\\ud800"', '"\\0"', "\udcff"),
    *("~", "~nobody/x", "/dev/zero", "builtin:", "owner/name", "[bold]"),
)
"""Texts behind the `=` of an override."""
KEYS = ("", ".", "..", "a", "a.b.c.d", "data", "expand", "seed.x", "expand.", ".num_experts", "expand.\udcff", "base.x")
WORDS = (
    *("", "-", "--", "x", "x" * 5000, "\udcff", "a\nb", "\x1b[31m", "[bold]", "{}", "=", "0", "-1", "1e9", ".."),
    *("/dev/null/x", "builtin:", "builtin:x", "builtin:tiny", "~nobody", "owner/name"),
)
"""Words of a command line."""


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
    spots = _spots(value)
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
        lines[number] = json.dumps(value) if is_json else yaml.safe_dump(value, allow_unicode=False)
    except (ValueError, UnicodeError, yaml.YAMLError):
        return
    path.write_text("\n".join(lines) + "\n")


def _spots(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    """(holder, key) of every value in a decoded file, down to the fifth level."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: list[tuple[Any, Any]] = []
    for key, below in list(entries)[:40]:
        found += [(value, key), *(_spots(below, depth + 1) if depth < 4 else ())]
    return found


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    damage_field,
    damage_field,
    damage_bytes,
    damage_text,
    damage_place,
)


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file in one of the ways; says which."""
    how = draw.choice(DAMAGES)
    try:
        how(path, draw)
    except (UnicodeDecodeError, ValueError):
        damage_bytes(path, draw)
    return how.__name__


def odd_override(draw: random.Random, settings: Sequence[str]) -> str:
    """`section.field=value` with a value, or now and then a name, that nobody writes."""
    key = draw.choice(KEYS) if draw.random() < 0.2 else draw.choice(settings)
    return key if draw.random() < 0.05 else f"{key}={draw.choice(VALUES)}"


def odd_words(words: Sequence[str], draw: random.Random, places: Sequence[Path]) -> list[str]:
    """A command with a word changed, lost, doubled or added; `places` are files and folders of the wrong kind."""
    changed, place = list(words), draw.randrange(1, len(words))
    odd = draw.choice((*WORDS, *map(str, places)))
    action = draw.choice(("set", "set", "set", "drop", "double", "add"))
    if action == "set":
        changed[place] = odd
    elif action == "drop":
        del changed[place]
    else:
        changed.insert(place, words[place] if action == "double" else odd)
    return changed
