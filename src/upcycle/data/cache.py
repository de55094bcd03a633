"""What is made of data once, and read again by every stage, run and comparison of the same data."""

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from upcycle.console import warn
from upcycle.disk import CACHE, cache_folder, scratch_folder


def cached(key: str, make: Callable[[Path], None]) -> Path:
    """The folder of that key: there already, or filled by `make`. It appears whole or not at all.

    Where the cache cannot be written, a folder that this process alone has.
    """
    folder = cache_folder() / "data" / key
    if folder.is_dir():
        with suppress(OSError):
            os.utime(folder)  # so that what is long unused can be told and deleted
        return folder
    try:
        scratch = scratch_folder(folder)
    except OSError as error:
        why = f"cannot be written ({error.strerror}), so data are encoded again"
        warn(f"{cache_folder()} {why}; ${CACHE} names another folder")
        scratch = Path(tempfile.mkdtemp(prefix="upcycle-"))
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        with _heap_at_rest():
            make(scratch)
        return scratch
    try:
        with _heap_at_rest():
            make(scratch)
        with suppress(OSError):  # another process has been quicker
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def _heap_at_rest() -> Iterator[None]:
    """The collector passes over what is there already, a million objects of libraries, while rows come and go."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
