"""User-facing errors, as opposed to bugs, and how they word a count or a near name."""

import shlex
from collections.abc import Iterable, Mapping
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


def command_line(*words: object) -> str:
    """A command of ours as it is to be typed, whatever spaces its paths have."""
    return shlex.join(["upcycle", *map(str, words)])


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` for the closest known name, or nothing."""
    close = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean '{close[0]}'?" if close else ""


def counted(number: int, noun: str) -> str:
    """`1 row`, `11,169 rows`, `2 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch", "x")) else "s"
    return f"{number:,} {noun}{ending}"


EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string_type": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "fields with values, {{name: value}}",
    "model": "fields with values, {{name: value}}",
    "finite": "a finite number",
    "literal": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "string_too_short": "text of {min_length} or more characters",
    "too_short": "{min_length} or more entries",
    "too_long": "{max_length} or fewer entries",
    "missing": "this field",
    "extra_forbidden": "no such field",
}
"""Begin of a kind of pydantic's errors to what is expected instead; the longest begin counts."""


def expected(error: Mapping[str, Any]) -> str:
    """`expected a number`, of an entry of pydantic's `ValidationError.errors()`; what our validators say, as it is."""
    kind, said = error["type"], str(error["msg"])
    begins = [begin for begin in EXPECTED if f"{kind}_".startswith(f"{begin}_")]
    if not begins:
        return said.removeprefix("Value error, ")
    bounds = {name: f"{v:.12g}" if isinstance(v, float) else v for name, v in error.get("ctx", {}).items()}
    return "expected " + EXPECTED[max(begins, key=len)].format(**bounds)
