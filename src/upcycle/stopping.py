"""Ctrl-C and `kill`: one line, and the end, at any instant.

What a run leaves can be resumed from anywhere, so nothing is unwound. An exception would be: libraries take it for an
error of their own, drop it in a destructor, or die of it in C++.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SHOW_CURSOR = "\033[?25h"
"""Progress bars hide it."""

_last_words: list[Callable[[], None]] = []


def stop_on_signals() -> None:
    """From now on; a second signal ends the process without a word."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


@contextmanager
def before_stopping(action: Callable[[], None]) -> Iterator[None]:
    """Have something quick done should the process be stopped while this is open."""
    _last_words.append(action)
    try:
        yield
    finally:
        _last_words.remove(action)


def _stop(number: int, _: FrameType | None) -> None:
    for either in (signal.SIGINT, signal.SIGTERM):
        signal.signal(either, signal.SIG_DFL)
    for action in _last_words:
        with suppress(Exception):
            action()
    with suppress(Exception):  # it may have been writing just now
        sys.stdout.write(SHOW_CURSOR if sys.stdout.isatty() else "")
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, ("\n" * os.isatty(2) + _farewell(number)).encode(errors="replace"))
    os._exit(128 + number)


def _farewell(number: int) -> str:
    """Of several processes the first says it; a launcher that ends them all has its reason, which is said elsewhere."""
    import shlex  # not before: a signal should find this installed as early as can be

    if "RANK" not in os.environ:
        return f"stopped; continue with: {shlex.join(['upcycle', *sys.argv[1:]])}\n"
    speaks = os.environ["RANK"] == "0" and number == signal.SIGINT
    return "stopped; continue with the same command\n" if speaks else ""
