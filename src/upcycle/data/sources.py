"""Instruction rows from JSONL files, the hub, or the generators in the package."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from upcycle.disk import digest, hash_file
from upcycle.errors import UpcycleError

BUILTIN = "builtin:"
ROLES = ("system", "user", "assistant", "tool")


Message = dict[str, str]
"""`role` and `content`."""


@dataclass(frozen=True)
class Row:
    """A chat: its messages, its domain label, and where it was read."""

    messages: tuple[Message, ...]
    domain: str
    where: str

    @property
    def question(self) -> str:
        """Everything before the first answer: what must not be shared between training and held-out rows."""
        before = []
        for message in self.messages:
            if message["role"] == "assistant":
                break
            before.append(message["content"])
        return "\n".join(before)

    @property
    def has_answer(self) -> bool:
        return any(message["role"] == "assistant" for message in self.messages)


def read_rows(sources: str | list[str]) -> list[Row]:
    """All rows of one or several sources, in order.

    Raises:
        UpcycleError: a missing file, or a malformed line (named by file and line number).
    """
    names = [sources] if isinstance(sources, str) else sources
    rows = [row for name in names for row in _read(name)]
    if not rows:
        raise UpcycleError(f"{', '.join(names)}: no rows; expected JSONL with a 'messages' list per line")
    return rows


def hash_sources(sources: str | list[str]) -> str:
    """A hash of the rows' content, the same wherever the files lie."""
    names = [sources] if isinstance(sources, str) else sources
    return digest([hash_file(Path(n)) if Path(n).is_file() else _hash_rows(_read(n)) for n in names])


def _hash_rows(rows: Iterable[Row]) -> str:
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps([row.messages, row.domain]).encode())
    return content.hexdigest()


def _read(name: str) -> Iterator[Row]:
    path = Path(name)
    if name.startswith(BUILTIN):
        return _read_builtin(name)
    if path.is_file():
        return _read_file(path)
    if path.suffix or path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UpcycleError(f"data file {name} does not exist (paths are relative to the current folder)")
    return _read_hub(name)


def _read_file(path: Path) -> Iterator[Row]:
    return (to_row(value, where) for value, where in read_jsonl(path))


def read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    """The decoded lines of a JSONL file, plain or .gz, each with its place; empty lines are passed over.

    Raises:
        UpcycleError: a line that is not JSON, or a file that is not UTF-8.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _decode(line, f"{path}:{number}"), f"{path}:{number}"
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise UpcycleError(f"{path} cannot be read as UTF-8 JSONL: {error}") from None


def _decode(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UpcycleError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None


def to_row(value: Any, where: str) -> Row:
    """Check one decoded row.

    Raises:
        UpcycleError: `messages` is missing or a message is not a role with text.
    """
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        found = f"fields {sorted(value)}" if isinstance(value, dict) else type(value).__name__
        raise UpcycleError(f"{where}: expected an object with a non-empty 'messages' list, found {found}")
    for i, message in enumerate(messages):
        if not (isinstance(message, dict) and message.get("role") in ROLES and isinstance(message.get("content"), str)):
            raise UpcycleError(
                f"{where}: messages[{i}] is {json.dumps(message)[:80]}, expected a 'role' "
                f"({', '.join(ROLES)}) and a text 'content'"
            )
    domain = value.get("domain")
    return Row(tuple(messages), domain if isinstance(domain, str) else "all", where)


def _read_builtin(name: str) -> Iterator[Row]:
    from upcycle.data.generators import quickstart_rows

    split = name.removeprefix(BUILTIN)
    if split not in ("train", "validation"):
        raise UpcycleError(f"'{name}': the built-in data are builtin:train and builtin:validation")
    rows = quickstart_rows(cast(Literal["train", "validation"], split))
    return (to_row(value, f"{name}:{i}") for i, value in enumerate(rows, start=1))


def _read_hub(name: str) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except Exception as error:
        raise UpcycleError(
            f"'{name}' is neither a local file nor a hub dataset that can be read here: {error}"
        ) from None
    return (to_row(value, f"{name}:{i}") for i, value in enumerate(rows, start=1))
