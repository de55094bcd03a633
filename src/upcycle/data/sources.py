"""Instruction rows from files, folders, the hub, or the generators in the package."""

import csv
import glob
import hashlib
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal, cast

from upcycle.data.formats import FORMATS, Row, UnusableError, format_of, renamed, to_row, without_nulls
from upcycle.data.packed import PACKERS, open_bytes
from upcycle.disk import digest, expanded, inside
from upcycle.errors import UpcycleError, counted, nearest
from upcycle.hashes import hash_file
from upcycle.reading import hub_problem, parse_json
from upcycle.settings import Source

BUILTIN = "builtin:"
HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[^\[\]]+)\])?")
"""owner/name:config[split]"""
SAVED = ("dataset_info.json", "dataset_dict.json")
"""One of them lies in a folder of `save_to_disk`."""
Decoded = Iterator[tuple[Any, str]]
"""Rows as they were read, each with its place."""


@dataclass
class Tally:
    """What was read, and what could not be used."""

    name: str
    rows: int = 0
    title: str = ""
    """Of the format, which all rows have alike."""
    domains: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    unusable: Counter[str] = field(default_factory=Counter)
    """By reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason to what was said of the first such row."""
    columns: dict[str, str] = field(default_factory=dict)
    """Of the source, after what they are here."""
    absent: dict[str, str] = field(default_factory=dict)
    """Those that no row has."""

    @property
    def num_unusable(self) -> int:
        return self.unusable.total()

    def __str__(self) -> str:
        domains = f", {len(self.domains)} domains" if len(self.domains) > 1 else ""
        return f"{self.name}: {counted(self.rows, 'row')} ({self.title} format){domains}"

    def lines(self) -> list[str]:
        """What to say of it."""
        builtin = self.name.startswith(BUILTIN)
        found = [] if builtin or not self.rows else [f"data: {self}"]
        found += [
            f"warning: {self.name}: no row has the column '{column}', which data.columns takes for '{ours}'"
            f"{nearest(column, self.unread)}"
            for ours, column in self.absent.items()
        ]
        found += [
            f"warning: {self.name}: data.columns takes '{column}' for '{ours}', which the {self.title} format has not"
            for ours, column in self.columns.items()
            if column in self.unread
        ]
        return [*found, f"warning: {self.name}: {self._left_out()}"] if self.num_unusable else found

    def check(self, max_bad: float) -> None:
        """Raises UpcycleError for more unusable rows than that share."""
        total = self.rows + self.num_unusable
        if self.num_unusable > max_bad * total:
            several = len(self.unusable) > 1 or max_bad > 0
            reasons = "; ".join(self._reasons()) if several else next(iter(self.first.values()))
            raise UpcycleError(f"{reasons}; {too_many(self.num_unusable, total, 'row', 'used', max_bad)}")

    def _left_out(self) -> str:
        total = self.rows + self.num_unusable
        rows = counted(total, "row")
        return f"left out {self.num_unusable:,} of {rows} that cannot be used: {'; '.join(self._reasons())}"

    def _reasons(self) -> list[str]:
        return [f"{count:,} {reason} (first: {self.first[reason]})" for reason, count in self.unusable.items()]


def share_of(count: int, total: int, noun: str) -> str:
    """`3 of 200 rows (1.5%)`."""
    return f"{count:,} of {counted(total, noun)} ({count / total:.1%})"


def too_many(count: int, total: int, noun: str, done: str, max_bad: float) -> str:
    """What is wrong where more than that share of the rows cannot be used or encoded, and what to do."""
    share = math.ceil(count / total * 1000) / 1000
    leave_out = f", or set data.max_bad={share:g} to leave them out" if count < total else ""
    return (
        f"{share_of(count, total, noun)} cannot be {done}, but data.max_bad={max_bad:g} allows {max_bad:.1%}; mend "
        f"them{leave_out}"
    )


def usable_rows(source: Source, tally: Tally) -> Iterator[Row]:
    """The chats of a source; those that cannot be used are counted. All have the format of the first."""
    by_file = _is_by_file(source)
    tally.columns, tally.absent = dict(source.columns), dict(source.columns)
    for value, where in decoded_rows(source.path):
        if tally.absent and isinstance(value, dict):
            tally.absent = {ours: column for ours, column in tally.absent.items() if column not in value}
        try:
            if source.format == "auto" and isinstance(value, dict):
                source = source.model_copy(update={"format": format_of(renamed(value, source), where, source)})
            row = to_row(value, where, source)
        except UnusableError as error:
            tally.unusable[error.reason] += 1
            tally.first.setdefault(error.reason, str(error))
            continue
        if by_file:
            row = replace(row, domain=row.domain.replace("{file}", _stem(Path(where.rpartition(":")[0]))))
        tally.rows += 1
        tally.title = FORMATS[source.format].title
        tally.domains.add(row.domain)
        tally.unread |= row.unread
        yield row


def weigh(question: str, weight: float) -> int:
    """How often a row counts: a weight's whole part, and once more if the hash of its question is below the rest."""
    if weight == int(weight):
        return int(weight)
    place = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest()) / 2**64
    return int(weight) + (place < weight % 1)


def hash_sources(sources: Sequence[Source]) -> str:
    """A hash of the rows' content and of how they are read, the same wherever the files lie."""
    return digest([_hash_source(source) for source in sources])


def _hash_source(source: Source) -> str:
    content, settings = _hash_content(source), source.model_dump(exclude={"path"}, exclude_defaults=True)
    if _is_by_file(source):
        settings["files"] = [_stem(path) for path in files_of(source.path)]
    return digest([content, settings]) if settings else content


def _is_by_file(source: Source) -> bool:
    """Whether the names of its files are domains."""
    return source.domain is not None and "{file}" in source.domain


def _stem(path: Path) -> str:
    suffixes = [*PACKERS, *READERS]
    while path.suffix.lower() in suffixes:
        path = path.with_suffix("")
    return path.name


def _hash_content(source: Source) -> str:
    files = files_of(source.path)
    hashes = [_hash_file(path, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    if hashes:
        return hashes[0] if len(hashes) == 1 else digest(hashes)
    if not source.path.startswith(BUILTIN):
        return str(_hub(source.path)._fingerprint)
    content = hashlib.sha256()
    for value, _ in _read_builtin(source.path):
        content.update(json.dumps(list(value.values())).encode())
    return content.hexdigest()


@lru_cache
def _hash_file(path: Path, size: int, changed: int) -> str:
    """Of a file as it is now: several ask for it."""
    return hash_file(path)


def files_of(name: str) -> list[Path]:
    """The local files that a name means, in order; none for built-in data and for the hub.

    Raises:
        UpcycleError: there is no such file, or none in the folder or for the pattern.
    """
    if name.startswith(BUILTIN):
        return []
    path = expanded(name)
    if path.is_file():
        return [path]
    if saved := _saved(name):
        if not (tables := sorted(saved.rglob("*.arrow"))):
            raise UpcycleError(f"{saved} is a saved dataset without its *.arrow files; copy the whole folder")
        return tables
    if path.is_dir():
        return _readable(sorted(path.iterdir()), f"in the folder {name}")
    if glob.has_magic(name) and not HUB.fullmatch(name):
        base, inner = (Path(path.anchor), path.relative_to(path.anchor)) if path.is_absolute() else (Path(), path)
        return _readable(sorted(base.glob(str(inner))), f"for the pattern {name}")
    if HUB.fullmatch(name) and _kind(path) not in READERS and not name.startswith("."):
        return []
    if "://" in name:
        raise UpcycleError(f"data {name} is an address; download the file, or name a hub dataset as owner/name")
    raise UpcycleError(f"data file {name} does not exist (paths are relative to the current folder)")


def _readable(paths: list[Path], where: str) -> list[Path]:
    """Files whose suffix is known; not hidden ones, which a shell's pattern does not mean either."""
    found = [path for path in paths if _kind(path) in READERS and path.is_file() and not _is_aside(path)]
    if not found:
        others = ", ".join(f"{path.name}/" if path.is_dir() else path.name for path in paths[:5])
        there = f" (found {others}{' ...' * (len(paths) > 5)})" if paths else ""
        deeper = ", or a pattern of them such as 'FOLDER/**/*.jsonl'" if any(path.is_dir() for path in paths) else ""
        raise UpcycleError(
            f"no readable file {where}{there}; expected {', '.join(READERS)}, plain or compressed{deeper}"
        )
    return found


def _is_aside(path: Path) -> bool:
    """Hidden (macOS puts a `._rows.jsonl` beside `rows.jsonl`), or what `datasets` writes about a folder."""
    return path.name.startswith(".") or path.name in (*SAVED, "dataset_infos.json")


def _kind(path: Path) -> str:
    """The suffix that says how a file is read, packed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def decoded_rows(name: str) -> Decoded:
    """The rows that a name means, as they are, each with its place."""
    if name.startswith(BUILTIN):
        yield from _read_builtin(name)
    elif saved := _saved(name):
        yield from _read_saved(saved)
    elif files := files_of(name):
        for path in files:
            yield from READERS.get(_kind(path), _read_json)(path)
    else:
        yield from _read_hub(name)


def read_jsonl(path: Path) -> Decoded:
    """The decoded lines of a JSONL file, plain or compressed, each with its place; empty lines are passed over.

    Raises:
        UpcycleError: no such file, a line that is not JSON, or a file that is not UTF-8.
    """
    for value, where in _read_lines(path):
        if isinstance(value, UnusableError):
            raise value
        yield value, where


def _read_lines(path: Path) -> Decoded:
    """A line that is not JSON is the error that says so, for one to be counted among others."""
    name = str(path)
    with _opened(path, "JSONL") as file:
        for number, line in enumerate(file, start=1):
            where = f"{name}:{number}"
            if not line.isspace():
                try:
                    yield parse_json(line, where), where
                except UpcycleError as error:
                    yield UnusableError(where, "is not JSON", str(error).removeprefix(f"{where}: ")), where


def _read_json(path: Path) -> Decoded:
    """A row a line, or one list of rows, whatever the suffix promises; or one row over several lines."""
    with _opened(path, "JSON") as file:
        lines = (line for line in file if not line.isspace())
        first, goes_on = next(lines, ""), next(lines, None) is not None
    if not _spans_lines(first.strip(), goes_on):
        yield from _read_lines(path)
        return
    with _opened(path, "JSON") as file:
        values = _one_value(file.read(), path)
    rows = values if isinstance(values, list) else [values]
    yield from ((value, f"{path}:{number}") for number, value in enumerate(rows, start=1))


def _one_value(text: str, path: Path) -> Any:
    try:
        return parse_json(text, str(path))
    except UpcycleError as error:
        several = "; write one row a line, as `jq -c` does" if "Extra data" in str(error) else ""
        raise UpcycleError(f"{error}{several}") from None


def _spans_lines(first: str, goes_on: bool) -> bool:
    """Whether a file is one JSON value, by its first line and whether there is a further one."""
    return first == "{" or (first.startswith("[") and not (goes_on and first.endswith("]")))


def _read_csv(path: Path) -> Decoded:
    """Cells are text; empty ones are none."""
    csv.field_size_limit(sys.maxsize)
    with _opened(path, "CSV") as file:
        delimiter = _delimiter(path, file.readline())
    with _opened(path, "CSV") as file:
        # strict: a quote that is never closed would swallow the rows behind it without a word
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]:
                raise UpcycleError(f"{path} has two columns '{twice[0]}'; rename or remove one")
            for number, row in enumerate(reader, start=1):
                if None in row:
                    more = "has more cells than the first line has columns"
                    yield UnusableError(f"{path}:{number}", more, more), f"{path}:{number}"
                    continue
                yield {name: cell or None for name, cell in row.items()}, f"{path}:{number}"
        except csv.Error as error:
            where = f"the record that begins in line {reader.line_num + 1}"
            raise UpcycleError(f"{path} cannot be read as CSV: {error}, in {where}; is a quote not closed?") from None


def _delimiter(path: Path, header: str) -> str:
    """What a suffix promises, unless the first line has another one instead (Excel writes `;` in half of Europe)."""
    usual = "\t" if _kind(path) == ".tsv" else ","
    return usual if usual in header else next((sign for sign in ",;\t" if sign in header), usual)


def _numbered(name: str | Path, rows: Iterable[dict[str, Any]]) -> Decoded:
    """Rows of a table, without the nulls that its columns of objects are filled up with."""
    for number, row in enumerate(rows, start=1):
        yield {column: without_nulls(value) for column, value in row.items()}, f"{name}:{number}"


def _read_table(path: Path) -> Decoded:
    """Parquet or Arrow, a batch at a time."""
    from datasets import load_dataset, logging
    from pyarrow.parquet import read_metadata

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs what it raises, too
    try:
        kind = "parquet" if _kind(path) == ".parquet" else "arrow"
        if kind == "parquet" and not read_metadata(path).num_rows:
            return  # an empty batch is an error to it
        rows = iter(load_dataset(kind, data_files=str(path), split="train", streaming=True))
        yield from _numbered(path, rows)
    except Exception as error:  # of pyarrow, of datasets, of the system
        raise UpcycleError(f"{path} cannot be read as {kind}: {_first_line(error)}") from None
    finally:
        logging.set_verbosity(before)


READERS: dict[str, Callable[[Path], Decoded]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_table,
    ".arrow": _read_table,
}
"""By suffix; a single file with another one is read as JSONL."""


@contextmanager
def _opened(path: Path, what: str) -> Iterator[IO[str]]:
    """A text file, packed or not."""
    if not path.is_file():  # a pipe or a device would never end
        raise UpcycleError(f"{path} is not a readable file")
    try:
        with io.TextIOWrapper(cast(IO[bytes], open_bytes(path)), encoding="utf-8-sig", newline="") as file:
            yield file
    except UpcycleError:
        raise
    except Exception as error:  # a damaged file raises any of its codec's errors
        raise UpcycleError(f"{path} cannot be read as UTF-8 {what}: {_first_line(error)}{_remedy(path)}") from None


MAGIC = {
    b"\x1f\x8b": "it is gzip; let its name end in .gz",
    b"PK\x03\x04": "it is a zip archive; unpack it",
    b"PAR1": "it is Parquet; let its name end in .parquet",
    b"(\xb5/\xfd": "it is zstd; let its name end in .zst",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
}
"""What a file begins with, to what it is and what to do."""


def _remedy(path: Path) -> str:
    if path.suffix.lower() in PACKERS:
        return "; is it a whole file, packed as its name says?"
    with path.open("rb") as file:
        begin = file.read(4)
    return "; " + next((said for magic, said in MAGIC.items() if begin.startswith(magic)), "save it as UTF-8")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _saved(name: str) -> Path | None:
    """A folder of `save_to_disk`, perhaps with the split in brackets.

    Raises:
        UpcycleError: it has no such split.
    """
    found = re.fullmatch(r"(.+?)(?:\[([^\[\]]+)\])?", name)
    folder = expanded(found[1]) if found else Path(name)
    if found is None or not any((folder / file).is_file() for file in SAVED):
        return None
    if not (split := found[2]):
        return folder
    if not (chosen := inside(folder, split)).is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        has = f"it has {', '.join(there)}" if there else "it is one table; leave the brackets out"
        raise UpcycleError(f"{folder} has no split {split}; {has}")
    return chosen


def _read_saved(folder: Path) -> Decoded:
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(str(folder))
    except Exception as error:
        raise UpcycleError(f"{folder} cannot be read as a saved dataset: {_first_line(error)}") from None
    if isinstance(rows, DatasetDict):
        if "train" not in rows and len(rows) > 1:
            raise UpcycleError(f"{folder} has the splits {', '.join(rows)}; name one: {folder}[{next(iter(rows))}]")
        rows = rows.get("train") or next(iter(rows.values()))
    yield from _numbered(folder, rows)


def _read_builtin(name: str) -> Decoded:
    from upcycle.data.generators import quickstart_rows

    split = name.removeprefix(BUILTIN)
    if split not in ("train", "validation"):
        raise UpcycleError(f"'{name}': the built-in data are builtin:train and builtin:validation")
    rows = quickstart_rows(cast(Literal["train", "validation"], split))
    yield from ((value, f"{name}:{i}") for i, value in enumerate(rows, start=1))


def _read_hub(name: str) -> Decoded:
    yield from _numbered(name, _hub(name))


def _hub(name: str) -> Any:
    from datasets import load_dataset

    found = HUB.fullmatch(name)
    assert found is not None  # `files_of` has seen to it
    try:
        return load_dataset(found["name"], found["config"], split=found["split"] or "train")
    except Exception as error:
        raise UpcycleError(
            f"data '{name}': no such file or folder here, and not from the hub (owner/name:config[split]): "
            f"{hub_problem(error)}"
        ) from None
