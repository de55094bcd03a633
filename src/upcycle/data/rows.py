"""The chats of a recipe's sources as a table on disk, whatever format they had.

Legend: N rows.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from upcycle.console import say
from upcycle.data.cache import cached
from upcycle.data.formats import INSTRUCTS, SPELL, Row
from upcycle.data.overlap import as_seen
from upcycle.data.sources import Tally, hash_sources, usable_rows, weigh
from upcycle.disk import digest
from upcycle.errors import UpcycleError
from upcycle.settings import Source

FORMAT = 6
"""Of the table; another one is another table."""
TABLE, REPORT = "rows.arrow", "report.json"
ROWS_AT_ONCE = 4096
SCHEMA = pa.schema(
    {
        "question": pa.string(),
        "domain": pa.string(),
        "where": pa.string(),
        "messages": pa.string(),
        "tools": pa.string(),
        "answered": pa.bool_(),
        "copies": pa.int32(),
    }
)


@dataclass(frozen=True)
class Rows:
    """A table of chats, mapped into memory."""

    key: str
    """Of what it was made from."""
    table: pa.Table
    path: Path

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def questions(self) -> list[str]:
        """What must not be shared between training and held-out rows (N)."""
        return list(self.table["question"].to_pylist())

    @cached_property
    def seen(self) -> list[str]:
        """The same, equal where they look equal (N)."""
        return list(map(as_seen, self.questions))

    @property
    def has_system_messages(self) -> bool:
        """Whether a chat has a message that instructs."""
        found = [pc.match_substring(self.table["messages"], f'"role": "{role}"') for role in INSTRUCTS]
        return any(pc.any(matches).as_py() for matches in found)

    def take(self, numbers: Sequence[int]) -> Iterator[Row]:
        """Rows by their numbers, some at a time."""
        for begin in range(0, len(numbers), ROWS_AT_ONCE):
            part = self._part(numbers[begin : begin + ROWS_AT_ONCE])
            columns = (part[name].to_pylist() for name in ("messages", "domain", "where", "tools"))
            for messages, domain, where, tools in zip(*columns, strict=True):
                schemas = () if tools == "[]" else tuple(json.loads(tools))
                yield Row(tuple(json.loads(messages)), domain, where, schemas)

    def _part(self, numbers: Sequence[int]) -> pa.Table:
        """A slice where they follow each other, which copies nothing."""
        begin, end = numbers[0], numbers[-1] + 1
        if end - begin == len(numbers) and list(numbers) == list(range(begin, end)):
            return self.table.slice(begin, len(numbers))
        return self.table.take(pa.array(numbers, pa.int64()))


def open_rows(sources: Sequence[Source], max_bad: float = 0.0) -> Rows:
    """The rows of one or several sources, in order; says what was found.

    Raises:
        UpcycleError: a missing file, a damaged one, or more unusable rows than allowed (the first of each kind is named
            by file and line).
    """
    settings = [source.model_dump() for source in sources]
    key = digest([FORMAT, version("upcycle"), hash_sources(sources), settings, max_bad])[:32]
    folder = cached(key, lambda out: _write(sources, max_bad, out))
    for line in json.loads((folder / REPORT).read_text(encoding="utf-8")):
        say(line)
    return Rows(key, open_table(folder / TABLE), folder / TABLE)


def open_table(path: Path) -> pa.Table:
    """An Arrow stream, mapped into memory."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def _write(sources: Sequence[Source], max_bad: float, out: Path) -> None:
    lines: list[str] = []
    unread: set[str] = set()
    total, first = 0, ""
    with pa.OSFile(str(out / TABLE), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for source in sources:
            tally = Tally(source.path)
            for batch in _batches(usable_rows(source, tally), source.weight):
                writer.write_batch(batch)
            tally.check(max_bad)
            total += tally.rows
            first = first or next(iter(tally.first.values()), "")
            unread |= tally.unread
            lines += tally.lines()
    if not total:
        names = ", ".join(source.path for source in sources)
        none = f"no row can be used ({first})" if first else "no rows"
        raise UpcycleError(f"{names}: {none}; expected chats, such as a 'messages' list each")
    if unread:
        named = sorted(unread)
        lines.append(f"data: fields that Upcycle does not use: {', '.join(named[:8])}{' ...' * (len(named) > 8)}")
    (out / REPORT).write_text(json.dumps(lines), encoding="utf-8")


def _batches(rows: Iterator[Row], weight: float) -> Iterator[pa.RecordBatch]:
    while some := list(islice(rows, ROWS_AT_ONCE)):
        questions = [row.question for row in some]
        columns: list[list[Any]] = [
            questions,
            [row.domain for row in some],
            [row.where for row in some],
            [row.spelt for row in some],
            [SPELL(row.tools) if row.tools else "[]" for row in some],
            [row.has_answer for row in some],
            [weigh(question, weight) for question in questions],
        ]
        yield pa.RecordBatch.from_arrays(
            [pa.array(values, kind.type) for values, kind in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
        )
