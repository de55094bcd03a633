"""User-facing errors, as opposed to bugs, and how they word a count or a near name."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class UpcycleError(ValueError):
    """Bad input. The message names the file or field, what was found, what was expected and what to do."""


class NoTwinError(UpcycleError):
    """A dense model that has no exact plain MoE."""

    def __init__(self, message: str, reason: str, config: dict[str, Any]) -> None:
        """
        Args:
            reason: without the model's name and what would be supported.
            config: of the dense model.
        """
        super().__init__(message)
        self.reason = reason
        self.config = config


class RelayedError(UpcycleError):
    """An error that another process has said already."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` for the closest known name, or nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


def counted(number: int, noun: str) -> str:
    """`1 row`, `11,169 rows`, `2 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch", "x")) else "s"
    return f"{number:,} {noun}{ending}"
