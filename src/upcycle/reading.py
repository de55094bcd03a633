"""The one reader of files that cannot be trusted: text, JSON and YAML, refused by name before they can do harm."""

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

import yaml

from upcycle.errors import UpcycleError

MAX_BYTES = 64 << 20
"""A user's file of text, JSON or YAML that is larger is none."""
MAX_NODES = 10_000
"""Of a recipe, with every alias written out."""
UNREADABLE = (ValueError, RecursionError, OverflowError, TypeError, KeyError, AttributeError)
"""What decoders raise for what nobody writes: numbers of thousands of digits, a thousand brackets, odd tags."""


def read_text(path: Path, most_bytes: int | None = MAX_BYTES) -> str:
    """A text file, UTF-8 with or without a byte order mark.

    Raises:
        UpcycleError: it is missing, not a regular file, not UTF-8, or larger than any text of ours.
    """
    return decoded(read_bytes(path, most_bytes), str(path))


def read_bytes(path: Path, most_bytes: int | None = MAX_BYTES) -> bytes:
    """A regular file's content.

    Args:
        most_bytes: refuse more; None: what we or the Trainer wrote may be of any size.

    Raises:
        UpcycleError: it is missing, a folder, a pipe or a device, or too large.
    """
    try:
        # opened without waiting: a pipe in a file's place would never answer
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UpcycleError(f"{path} is {_kind(found.st_mode)}, expected a file")
            if most_bytes is not None and found.st_size > most_bytes:
                size, most = found.st_size / 1e6, most_bytes / 1e6
                raise UpcycleError(f"{path} has {size:,.0f} MB, expected at most {most:,.0f} MB of text")
            return file.read()
    except IsADirectoryError:
        raise UpcycleError(f"{path} is a folder, expected a file") from None
    except OSError as error:
        raise UpcycleError(f"{path} cannot be read: {error.strerror}") from None


def decoded(content: bytes, where: str) -> str:
    """UTF-8 with or without a byte order mark.

    Raises:
        UpcycleError: it is not; says at which byte.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{where} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from None


def read_json(path: Path, most_bytes: int | None = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UpcycleError: see `read_text`; or it is not JSON, holds something else, or has a key twice.
    """
    value = parse_json(read_text(path, most_bytes), str(path))
    if not isinstance(value, dict):
        raise UpcycleError(f"{path} holds {type(value).__name__}, expected an object")
    return value


def parse_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        UpcycleError: not JSON, with line and column; or an object has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UpcycleError(f"{where}: the key {brief(twice)} occurs twice; keep one")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UpcycleError(f"{where}: not JSON ({error.msg}, line {error.lineno}, column {error.colno})") from None
    except UpcycleError:
        raise
    except UNREADABLE as error:
        raise UpcycleError(f"{where}: not readable JSON ({brief(str(error))})") from None


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain values: no key twice, no tag that makes anything."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """A YAML value.

    Raises:
        UpcycleError: not YAML, with line and column; a key twice; or aliases that stand for too much.
    """
    try:
        loader = _PlainLoader(text)  # refuses control characters
        node = loader.get_single_node()
        if node is None:
            return None
        if (size := _expanded(node, {}, set())) > MAX_NODES:
            raise UpcycleError(f"{where}: its aliases stand for {size:.0e} values, expected at most {MAX_NODES}")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UpcycleError(f"{where} is not YAML ({error.problem or error.context}{place})") from None
    except yaml.YAMLError as error:
        raise UpcycleError(f"{where} is not YAML ({brief(str(error))})") from None
    except UpcycleError:
        raise
    except UNREADABLE as error:
        raise UpcycleError(f"{where} is not readable YAML ({brief(str(error))})") from None


def _expanded(node: yaml.Node, known: dict[int, float], above: set[int]) -> float:
    """Values that a node stands for with every alias written out; infinite if it holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        return float("inf")
    if id(node) not in known:
        inner = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_expanded(n, known, above | {id(node)}) for n in inner)
    return known[id(node)]


HUB_ERRORS = {
    "GatedRepoError": "accept its licence on its page of the hub, and log in with `hf auth login`",
    "RepositoryNotFoundError": "the hub has none of that name, or it is private; check the spelling, or log in with "
    "`hf auth login`",
    "DatasetNotFoundError": "the hub has none of that name that may be read; check the spelling, or log in with "
    "`hf auth login`",
    "OfflineModeIsEnabled": "{offline}",
    "LocalEntryNotFoundError": "{offline}",
    "ConnectionError": "{offline}",
}
"""Name of an exception of the hub's clients, or of what it is derived from, to what to do."""


def hub_problem(error: Exception) -> str:
    """Why the hub did not give what has no local place, and what to do, in a line."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = next((said for name, said in HUB_ERRORS.items() if name in kinds), None)
    if said is None:
        return (str(error) or type(error).__name__).splitlines()[0]
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    return said.format(offline=f"{why}, and there is no copy in the cache; check the path, or go online once")


def brief(value: object) -> str:
    """A value as an error shows it: at most some 80 characters, however large it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlevel, short.maxdict, short.maxlist = 3, 4, 4
    text = short.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
