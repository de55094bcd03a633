"""Hashes of files: several at once, and a file's own remembered until the file system says that it has changed.

A large file is read once. Its hash is kept in the user's cache by device and inode, which stay when a finished stage's
folder is renamed, and holds while size, time of writing and time of change (ctime, which no program can set back) are
what they were. What a disk changes of itself moves no time: `verify_in_full` has every file read again.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import xxhash

from upcycle.disk import SCRATCH, cache_folder, digest
from upcycle.errors import UpcycleError

SHA256, XXH3 = "sha256", "xxh3_128"
BLOCK = 1 << 20
"""Bytes that are read and hashed at once: they stay in a core's cache."""
HASHED_AT_ONCE = 4
"""Files; more would not be quicker than the memory."""
REMEMBERED_FROM = 1 << 20
"""Bytes: a smaller file is as quick to read as to look up."""
SETTLED_NS = 2 * 10**9
"""A file changed so recently may change again under the same time: clocks of file systems tick in up to two seconds."""
VERIFY = "UPCYCLE_VERIFY"
"""Set, but not to 0: no hash is remembered, every file is read."""

State = tuple[int, int, int, int, int]
"""What the file system says of a file: device, inode, bytes, nanoseconds of its writing and of its change."""


def verify_in_full() -> None:
    """From here on this process, and those that it starts, read every file whose hash they need."""
    os.environ[VERIFY] = "1"


@contextmanager
def every_file_read() -> Iterator[None]:
    """Inside, no hash is remembered."""
    before = os.environ.get(VERIFY, "0")
    verify_in_full()
    try:
        yield
    finally:
        os.environ[VERIFY] = before


def hash_files(paths: Sequence[Path], algorithm: str = SHA256) -> Iterator[str]:
    """The hash of each of the files, in order; several are read at once, which is quicker.

    Raises:
        UpcycleError: see `hash_file`.
    """
    pool = ThreadPoolExecutor(HASHED_AT_ONCE)
    try:
        yield from pool.map(lambda path: hash_file(path, algorithm), paths)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # one that is left early may be closed in a thread of the pool


def hash_file(path: Path, algorithm: str = SHA256) -> str:
    """The hash of a file's bytes, in hexadecimal; of a file that is as it was when it was last hashed, from the cache.

    Args:
        algorithm: SHA256, or XXH3: 128 bits against damage, several times as fast.

    Raises:
        UpcycleError: there is no regular file; a pipe or a device would never end.
    """
    if not path.is_file():
        raise UpcycleError(f"{path} is not a readable file")
    with path.open("rb", buffering=0) as file:
        state, begin = _state(file), time.time_ns()
        if (known := _recall(state, algorithm)) is not None:
            return known
        found = _read(file, algorithm)
        if _state(file) == state and begin - state[-1] > SETTLED_NS:
            _remember(state, algorithm, found)
    return found


def _read(file: FileIO, algorithm: str) -> str:
    content = hashlib.sha256() if algorithm == SHA256 else xxhash.xxh3_128()
    buffer = bytearray(BLOCK)
    while count := file.readinto(buffer):
        content.update(memoryview(buffer)[:count])
    return content.hexdigest()


def _state(file: FileIO) -> State:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _recall(state: State, algorithm: str) -> str | None:
    """What was remembered of a file in this state; whatever is wrong with the cache, nothing was."""
    if state[2] < REMEMBERED_FROM or os.environ.get(VERIFY, "0") not in ("", "0"):
        return None
    with suppress(OSError, RuntimeError, ValueError):
        found, check = _place(state, algorithm).read_text().split()
        if check == digest([*state, algorithm, found]):  # of this state, and undamaged
            return found
    return None


def _remember(state: State, algorithm: str, found: str) -> None:
    """Keep a hash where the cache can be written; it appears whole, whoever else writes it."""
    if state[2] < REMEMBERED_FROM:
        return
    with suppress(OSError, RuntimeError):
        place = _place(state, algorithm)
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.with_name(f".{place.name}.{os.getpid()}-{threading.get_ident()}{SCRATCH}")
        try:
            scratch.write_text(f"{found} {digest([*state, algorithm, found])}\n")
            scratch.replace(place)
        finally:
            scratch.unlink(missing_ok=True)


def _place(state: State, algorithm: str) -> Path:
    """One place for a file, whatever becomes of it: the cache grows with the files that there are."""
    return cache_folder() / "hashes" / f"{state[0]:x}-{state[1]:x}-{algorithm}"
