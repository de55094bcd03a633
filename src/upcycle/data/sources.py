"""Instruction rows from JSONL files, the hub, or the generators in the package."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from upcycle.console import say
from upcycle.disk import digest, hash_file
from upcycle.errors import UpcycleError
from upcycle.reading import brief, parse_json

BUILTIN = "builtin:"
ROLES = ("system", "user", "assistant", "tool")


READ = {"messages", "domain", "tools"}
"""Fields of a row that mean something here."""


Message = dict[str, Any]
"""`role` and `content`; of an answer perhaps `weight` or `train`, which say whether it is learned."""


@dataclass(frozen=True)
class Row:
    """A chat: its messages, its domain label, and where it was read."""

    messages: tuple[Message, ...]
    domain: str
    where: str
    tools: tuple[Any, ...] = ()
    """Schemas that the chat template shows to the model."""
    unread: frozenset[str] = frozenset()
    """Further fields, which mean nothing here."""

    @property
    def question(self) -> str:
        """Everything before the first answer to a user: what training and held-out rows must not share."""
        before, asked = [], False
        for message in self.messages:
            if message["role"] == "assistant" and asked:
                break
            asked = asked or message["role"] == "user"
            before.append(str(message["content"]))
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
    if unread := sorted({field for row in rows for field in row.unread}):
        say(f"data: fields of rows that are not read: {', '.join(unread[:8])}{' ...' * (len(unread) > 8)}")
    return rows


def hash_sources(sources: str | list[str]) -> str:
    """A hash of the rows' content, the same wherever the files lie."""
    names = [sources] if isinstance(sources, str) else sources
    places = [(name, Path(name).expanduser()) for name in names]
    return digest([hash_file(path) if path.is_file() else _hash_rows(_read(name)) for name, path in places])


def _hash_rows(rows: Iterable[Row]) -> str:
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps([row.messages, row.domain]).encode())
    return content.hexdigest()


def _read(name: str) -> Iterator[Row]:
    path = Path(name).expanduser()
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
        UpcycleError: no such file, a line that is not JSON, or a file that is not UTF-8.
    """
    if not path.is_file():  # a pipe or a device would never end
        raise UpcycleError(f"{path} is not a file that can be read")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_json(line, f"{path}:{number}"), f"{path}:{number}"
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as error:  # a damaged .gz raises any of them
        raise UpcycleError(f"{path} cannot be read as UTF-8 JSONL: {error}") from None


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
                f"{where}: messages[{i}] is {brief(message)}, expected a 'role' "
                f"({', '.join(ROLES)}) and a text 'content'"
            )
    tools = value.get("tools") or ()
    if not isinstance(tools, (list, tuple)):
        raise UpcycleError(f"{where}: 'tools' is {brief(tools)}, expected a list of schemas")
    check_encodable([messages, value.get("domain"), tools], where)
    unread = frozenset(map(str, value)) - READ
    return Row(tuple(messages), _domain(value.get("domain"), where), where, tuple(tools), unread)


def _domain(label: object, where: str) -> str:
    """A label as text; `all` for a row that has none."""
    if label is None:
        return "all"
    if not isinstance(label, (str, int, float)):
        raise UpcycleError(f"{where}: 'domain' is {brief(label)}, expected a text or a number")
    return str(label)


def check_encodable(value: Any, where: str) -> None:
    """Raises UpcycleError for half of a surrogate pair, which JSON may spell and no text can hold."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UpcycleError(f"{where}: holds {half}, half of a surrogate pair: no character; repair the row") from None


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
