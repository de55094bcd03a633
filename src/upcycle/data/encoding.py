"""Chats encoded once, in several processes, into tables on disk.

python -m upcycle.data.encoding FOLDER PART      # one of the processes
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from upcycle.console import Progress
from upcycle.data.cache import cached
from upcycle.data.chat import Sample, Turns, check_fast, encode_rows
from upcycle.data.formats import Row
from upcycle.data.rows import Rows, open_table
from upcycle.disk import digest
from upcycle.errors import UpcycleError
from upcycle.types import Tokenizer
from upcycle.weights.base import load_tokenizer

FORMAT = 3
"""Of the tables; another one is another table."""
ROWS_AT_ONCE = 1024
ALONE = 20_000
"""Rows that one process has encoded before others have started."""
JOB, TOKENIZER, REFUSED = "job.json", "tokenizer", "refused.txt"
NOTHING = Sample([], [], "", "", "", 0, "")
"""In place of a row that is refused."""
NUMBERS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "input_ids": NUMBERS,
        "labels": NUMBERS,
        "answer": pa.string(),
        "answer_start": pa.int32(),
        "num_answer_tokens": pa.int32(),
        "dropped": pa.int32(),
        "ignored": pa.string(),
        "refused": pa.string(),
    }
)


@dataclass(frozen=True)
class Job:
    """What the processes are told."""

    rows: str
    """The table of chats."""
    key: str
    turns: Turns
    most: int | None
    """Tokens that a chat is cut to, from the left."""
    parts: list[list[int]]
    """Numbers of the rows of each process."""


def encoded(
    rows: Rows, numbers: Sequence[int] | None, tokenizer: Tokenizer, turns: Turns, most: int | None
) -> list[Path]:
    """Tables of the encoded chats, in order: there already, or made now.

    Args:
        numbers: which rows; None: all that have an answer.
        most: cut longer chats to so many tokens, from the left; None: leave them.

    A row whose answer cannot be found in the rendered chat, or that is not rendered, has no tokens, and says why.

    Raises:
        UpcycleError: that is so for all that one process has.
    """
    tokens = _tokenizer_key(tokenizer)
    versions = [version(name) for name in ("upcycle", "transformers", "tokenizers")]
    key = digest([FORMAT, rows.key, tokens, turns, most, versions, None if numbers is None else digest(list(numbers))])
    folder = cached(key[:32], lambda out: _encode(rows, numbers, tokenizer, turns, most, out))
    return sorted(folder.glob("tokens-*.arrow"))


def _tokenizer_key(tokenizer: Tokenizer) -> str:
    check_fast(tokenizer)
    return digest([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map])


def _encode(
    rows: Rows, numbers: Sequence[int] | None, tokenizer: Tokenizer, turns: Turns, most: int | None, out: Path
) -> None:
    if numbers is None:
        numbers = [n for n, answered in enumerate(rows.table["answered"].to_pylist()) if answered]
    with Progress("encoding", len(numbers), "rows") as bar:
        processes = min(_cores(), 1 + len(numbers) // ALONE)
        if processes == 1:
            for done in _write(rows, numbers, tokenizer, turns, most, out / "tokens-000.arrow"):
                bar.advance(done)
            return
        size = -(-len(numbers) // processes)
        parts = [list(numbers[begin : begin + size]) for begin in range(0, len(numbers), size)]
        tokenizer.save_pretrained(out / TOKENIZER)
        job = Job(str(rows.path), _tokenizer_key(tokenizer), turns, most, parts)
        (out / JOB).write_text(json.dumps(asdict(job)), encoding="utf-8")
        _in_processes(out, len(parts), bar)
        (out / JOB).unlink()
        shutil.rmtree(out / TOKENIZER)


def _in_processes(out: Path, count: int, bar: Progress) -> None:
    """One for each part; all end where one fails."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "upcycle.data.encoding", str(out)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def follow(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            bar.advance(int(line))
        return process.stderr.read() if process.wait() else ""

    with ExitStack() as stack:
        parts = [[*command, str(part)] for part in range(count)]
        started = [stack.enter_context(subprocess.Popen(words, env=environment, **pipes)) for words in parts]
        try:
            with ThreadPoolExecutor(count) as pool:
                errors = [error for error in pool.map(follow, started) if error]
        finally:
            for process in started:
                process.kill()
    if (out / REFUSED).is_file():
        raise UpcycleError((out / REFUSED).read_text(encoding="utf-8"))
    if errors:
        raise RuntimeError(f"encoding failed in a process of its own:\n{errors[0]}")


def _write(
    rows: Rows, numbers: Sequence[int], tokenizer: Tokenizer, turns: Turns, most: int | None, path: Path
) -> Iterator[int]:
    """Encode rows into a table; gives the number of rows that are done, from time to time."""
    errors: list[UpcycleError] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for begin in range(0, len(numbers), ROWS_AT_ONCE):
            part = numbers[begin : begin + ROWS_AT_ONCE]
            found = _encoded_or_refused(list(rows.take(part)), tokenizer, turns)
            errors += [one for one in found if isinstance(one, UpcycleError)]
            writer.write_batch(_batch(part, found, most))
            yield len(part)
    if errors and len(errors) == len(numbers):
        raise errors[0]


def _encoded_or_refused(rows: Sequence[Row], tokenizer: Tokenizer, turns: Turns) -> list[Sample | UpcycleError]:
    """The samples; where one cannot be made, the error that says why."""
    try:
        return list(encode_rows(rows, tokenizer, turns))
    except UpcycleError as error:
        if len(rows) == 1:
            return [error]
    half = len(rows) // 2
    return [one for some in (rows[:half], rows[half:]) for one in _encoded_or_refused(some, tokenizer, turns)]


def cut(sample: Sample, most: int | None) -> Sample:
    """The last tokens of a sample that has more."""
    over = 0 if most is None else max(0, len(sample.input_ids) - most)
    if not over:
        return sample
    start = max(0, sample.answer_start - over)
    return replace(sample, input_ids=sample.input_ids[over:], labels=sample.labels[over:], answer_start=start)


def _batch(numbers: Sequence[int], found: Sequence[Sample | UpcycleError], most: int | None) -> pa.RecordBatch:
    samples = [NOTHING if isinstance(one, UpcycleError) else cut(one, most) for one in found]
    names = [name for name in SCHEMA.names if name not in ("row", "refused")]
    columns: dict[str, Any] = {name: [getattr(sample, name) for sample in samples] for name in names}
    columns["refused"] = [str(one) if isinstance(one, UpcycleError) else None for one in found]
    return pa.RecordBatch.from_pydict({"row": list(numbers), **columns}, SCHEMA)


def _cores() -> int:
    """Those that this process may use; fewer if OMP_NUM_THREADS says so."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(there, int(asked)) if asked.isdecimal() and int(asked) else there


def main() -> None:
    """One part of a job."""
    out, part = Path(sys.argv[1]), int(sys.argv[2])
    job = Job(**json.loads((out / JOB).read_text(encoding="utf-8")))
    tokenizer = load_tokenizer(out / TOKENIZER, None)
    if _tokenizer_key(tokenizer) != job.key:
        raise RuntimeError("the tokenizer is another one once it is saved and loaded")
    path = Path(job.rows)
    try:
        rows = Rows("", open_table(path), path)
        for done in _write(rows, job.parts[part], tokenizer, job.turns, job.most, out / f"tokens-{part:03}.arrow"):
            print(done, flush=True)
    except UpcycleError as error:
        (out / REFUSED).write_text(str(error), encoding="utf-8")
        sys.exit(1)


if __name__ == "__main__":
    main()
