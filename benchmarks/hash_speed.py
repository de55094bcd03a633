"""How quick the hash of files is beside others: XXH3 (128 bits), SHA-256 and BLAKE3, which two find forgeries as well.

    python benchmarks/hash_speed.py --work FOLDER        # 2 GB of disk, two minutes; BLAKE3: `pip install blake3`

Random bytes in memory, and files in the page cache, read in the blocks of `upcycle.hashes`: one after the other in one
thread, and at once in as many threads as there are cores. Every hash in turn, the median of the rounds; a table.
"""

import argparse
import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash
from assembly_vs_mergekit import machine

from upcycle.hashes import BLOCK

THREADS = os.cpu_count() or 1


def hashes() -> dict[str, Callable[[], Any] | None]:
    """By name; None: not installed."""
    found: dict[str, Callable[[], Any] | None] = {"XXH3-128": xxhash.xxh3_128, "SHA-256": hashlib.sha256}
    if find_spec("blake3") is None:
        return {**found, "BLAKE3": None, "BLAKE3, its own threads": None}
    from blake3 import blake3

    return {**found, "BLAKE3": blake3, "BLAKE3, its own threads": partial(blake3, max_threads=blake3.AUTO)}


def blocks(path: Path) -> Iterator[memoryview]:
    """Of a file, each in the same memory."""
    memory = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(memory):
            yield memory[:count]


def of_file(make: Callable[[], Any], path: Path) -> str:
    state = make()
    if hasattr(state, "update_mmap") and make.__class__ is partial:  # its threads want more than a block
        return str(state.update_mmap(path).hexdigest())
    for block in blocks(path):
        state.update(block)
    return str(state.hexdigest())


def of_memory(make: Callable[[], Any], data: memoryview) -> str:
    state = make()
    step = len(data) if make.__class__ is partial else BLOCK
    for begin in range(0, len(data), step):
        state.update(data[begin : begin + step])
    return str(state.hexdigest())


def ways(data: memoryview, files: list[Path]) -> dict[str, Callable[[Callable[[], Any]], list[str]]]:
    """What is measured, by name: each takes a hash and gives what it found."""

    def at_once(make: Callable[[], Any]) -> list[str]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(partial(of_file, make), files))

    return {
        "memory, one thread": lambda make: [of_memory(make, data)],
        "files, one thread": lambda make: [of_file(make, path) for path in files],
        f"files, {THREADS} at once": at_once,
    }


def measure(data: memoryview, files: list[Path], rounds: int) -> list[tuple[str, ...]]:
    """GB a second of each hash, a row for each way."""
    rows, size = [], sum(path.stat().st_size for path in files)
    for name, run in ways(data, files).items():
        seconds: dict[str, list[float]] = {}
        for _ in range(rounds):
            for hash_name, make in hashes().items():
                begin = time.perf_counter()
                if make is not None:
                    run(make)
                    seconds.setdefault(hash_name, []).append(time.perf_counter() - begin)
        amount = (len(data) if "memory" in name else size) / 1e9
        found = {hash_name: f"{amount / statistics.median(taken):.1f}" for hash_name, taken in seconds.items()}
        rows.append((name, *(found.get(hash_name, "not installed") for hash_name in hashes())))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the files")
    parser.add_argument("--megabytes", type=int, default=2048, help="of all files together; memory: a quarter")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = memoryview(os.urandom((arguments.megabytes << 20) // 4))
    files = [arguments.work / f"part-{number}" for number in range(max(4, THREADS))]
    for path in files:
        path.write_bytes(data[: (arguments.megabytes << 20) // len(files)])
    rows = measure(data, files, arguments.rounds)
    for path in files:
        path.unlink()
    print(f"GB a second, median of {arguments.rounds} rounds in turn; {machine()}.\n")
    for row in (("", *hashes()), ("---", *("--:" for _ in hashes())), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
