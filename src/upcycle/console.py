"""What the user sees: one console, progress bars with the time left, tables."""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import product
from typing import Literal, TypeVar

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0
"""Off a terminal: how often a long piece of work says how far it is."""
WIDTH = 140
"""Columns when the output is not a terminal."""

QUIET = os.environ.get("RANK", "0") != "0"
"""Of several processes the first speaks."""

console = Console(highlight=False, emoji=False, quiet=QUIET)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console = Console(highlight=False, emoji=False, width=WIDTH, quiet=QUIET)


_progress_shown = True


def hide_progress() -> None:
    """From now on show only results, warnings and errors (`upcycle --quiet`)."""
    global _progress_shown
    _progress_shown = False


def is_progress_shown() -> bool:
    """For bars of libraries."""
    return _progress_shown


CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    """Without control characters, which would be commands to a terminal: they are written out."""
    return text.translate(CONTROL)


def say(message: str) -> None:
    """One line of progress for the user."""
    if _progress_shown:
        tell(message)


def tell(message: str) -> None:
    """One line of a verb's result."""
    console.print(visible(message), markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Something the user should know but that does not stop the run."""
    console.print(visible(f"warning: {message}"), style="yellow", markup=False, soft_wrap=True)


class Progress:
    """One bar with elapsed and remaining time; off a terminal, a line now and then instead.

    Use as a context manager.
    """

    def __init__(self, description: str, total: int, unit: str, done: int = 0) -> None:
        """
        Args:
            unit: what is counted, in the plural.
        """
        self._total = total
        self._done = done
        self._spoken = done
        self._begin = self._last = time.monotonic()
        self._skipped = done
        self._bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal or QUIET or not _progress_shown,
        )
        self._description, self._unit = description, unit
        self._task = self._bar.add_task(description, total=total, completed=done)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, steps: int = 1, note: str = "") -> None:
        """`steps` more are done; `note` stands behind the description."""
        self._done += steps
        text = f"{self._description} {note}".rstrip()
        self._bar.update(self._task, completed=self._done, description=text)
        if not console.is_terminal and time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._speak(text)

    def _speak(self, text: str) -> None:
        self._last = time.monotonic()
        pace = (self._last - self._begin) / max(1, self._done - self._skipped)
        left = timedelta(seconds=round(pace * (self._total - self._done)))
        say(f"{text}: {self._done:,} of {self._total:,} {self._unit}, {left} left")


def track(items: Sequence[T], description: str, unit: str) -> Iterator[T]:
    """The items, with a progress bar that counts them by their `unit`, in the plural."""
    with Progress(description, len(items), unit) as bar:
        for item in items:
            yield item
            bar.advance()


WORDY = 40
"""Characters from which on a first column is wrapped before figures are."""
GAP, EDGES = 3, 2
"""Characters between columns, and around them."""


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False, note: str = ""
) -> None:
    """Print a table under its title: first column left, the others right, unless they are `words`; a note below.

    Where it is too wide, cells are wrapped between words, last those of the first column unless they are long. Columns
    that do not fit even so follow below, the first one again beside them.
    """
    cells = [[visible(cell) for cell in row] for row in (columns, *rows)]
    by_column = list(zip(*cells, strict=True))
    wordy = any(len(row[0]) > WORDY for row in cells[1:])
    least = _that_fit([_least_width(column, whole=i == 0 and not wordy) for i, column in enumerate(by_column)])
    order = sorted(range(len(columns)), key=lambda i: (i == 0) != wordy, reverse=True)
    wishes = [
        [_least_width(column[first:], whole=True) for column in by_column] for first in (1, 0)
    ]  # rows, then heads
    console.print(visible(f"\n{title}"), style="bold", markup=False, soft_wrap=True)
    for block in _blocks(least):
        grid = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
        widths = _widened({i: least[i] for i in order if i in block}, wishes)
        for i in block:
            side: Literal["left", "right"] = "left" if words or i == 0 else "right"
            grid.add_column(Text(cells[0][i]), justify=side, width=widths[i], overflow="fold")
        for row in cells[1:]:
            grid.add_row(*(Text(row[i]) for i in block))  # not as markup: a setting may have brackets
        console.print(grid)
    if note:
        tell(note)


def _least_width(cells: Sequence[str], whole: bool) -> int:
    """Of a column: its longest cell, or the longest word in it."""
    return max((cell_len(part) for cell in cells for part in ([cell] if whole else cell.split())), default=0)


def _that_fit(least: Sequence[int]) -> list[int]:
    """With the first column so narrow that every other one fits beside it; of a narrow line both are."""
    room = max(2, console.width - EDGES - GAP)
    first = min(least[0], max(room // 2, room - max(least[1:], default=0)))
    return [first, *(min(width, room - first) for width in least[1:])]


def _widened(widths: dict[int, int], wishes: Sequence[Sequence[int]]) -> dict[int, int]:
    """Columns' widths with what is left of the line given to those that wish more, in order."""
    for wish, i in product(wishes, widths):
        spare = console.width - EDGES + GAP - sum(width + GAP for width in widths.values())
        widths[i] += max(0, min(spare, wish[i] - widths[i]))
    return widths


def _blocks(widths: Sequence[int]) -> list[list[int]]:
    """Columns by number that fit beside each other, with the first in every block."""
    blocks, used = [[0]], widths[0] + GAP + EDGES
    for number, width in enumerate(widths[1:], start=1):
        if used + width > console.width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = widths[0] + GAP + EDGES
        blocks[-1].append(number)
        used += width + GAP
    return blocks
