"""The process's own memory while it trains on a CPU."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of malloc.h."""
KEEPING = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
"""No block has a mapping of its own, and none is given back."""
USUAL = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 << 10}


@contextmanager
def kept_heap() -> Iterator[None]:
    """Blocks that are freed stay with the process, to be used again in the next step, until `give_back`.

    glibc takes a block of more than 32 MB, such as the gradient of a layer's experts, from the kernel and gives it back
    when it is freed, and the kernel clears its pages each time: a tenth of a small MoE's step, for 2 to 6% more memory
    at the peak (docs/benchmarks.md). Nothing is done on an accelerator, without glibc, or where the user has set
    malloc's own variables.
    """
    if torch.accelerator.is_available() or not _has_glibc() or _is_set():
        yield
        return
    _set(KEEPING)
    try:
        yield
    finally:
        _set(USUAL)


def give_back() -> None:
    """Give all pages to the kernel that hold nothing any more."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_set() -> bool:
    variables = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    return "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in variables)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _set(options: dict[int, int]) -> None:
    for option, value in options.items():
        ctypes.CDLL(None).mallopt(option, value)
