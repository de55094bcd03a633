"""Work on many tensors, a few threads at a time, with progress and results in order."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from upcycle.console import track

Item = TypeVar("Item")
Result = TypeVar("Result")
PIECE = 1 << 18
"""Elements that are read and written at once."""
BLOCK = 1 << 15
"""Elements that are computed with at once: those of all experts, with masks, stay in a core's second-level cache."""
MAX_WORKERS = 8
"""More would only take memory: the disk, or the page cache, is the limit. Hyperthreads gain nothing either."""


def usable_processors() -> int:
    """Logical processors that this process may use; all of the machine's where the system does not say (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_tensors(work: Callable[[Item], Result], items: Sequence[Item], title: str) -> list[Result]:
    """`work` on every item, in threads that each run torch on one core; the results in the order of the items."""
    workers = max(1, min(MAX_WORKERS, usable_processors() // 2))
    with _one_torch_thread(), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in track(futures, title, "tensors")]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
