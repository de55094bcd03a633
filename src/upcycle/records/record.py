"""The form of every record: strict, frozen, nothing unknown; and how a file of them is read."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from upcycle.disk import write_json
from upcycle.errors import UpcycleError, expected
from upcycle.reading import brief, read_bytes

T = TypeVar("T")

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Loss = float
"""nan where a training diverged."""


def _of_one_shape(shares: list[list[float]]) -> list[list[float]]:
    if len({len(layer) for layer in shares}) != 1 or not shares[0]:
        raise ValueError("layers have different numbers of experts, or none")
    return shares


Shares = Annotated[list[list[Share]], AfterValidator(_of_one_shape)]
"""Share of the routed slots per layer and expert: (layers, experts), rows sum to 1."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

ALL = "all"
"""The entry over all domains."""


def _has_all(values: dict[str, float]) -> dict[str, float]:
    if ALL not in values:
        raise ValueError(f"there is no `{ALL}` among {', '.join(list(values)[:8]) or 'nothing'}")
    return values


ByDomain = Annotated[dict[str, Loss], AfterValidator(_has_all)]
"""A value for each domain, and for `ALL` of them."""
ShareByDomain = Annotated[dict[str, Share], AfterValidator(_has_all)]


class Record(BaseModel):
    """What a part of the program writes, checked when another reads it."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="constants"
    )


def optional() -> Any:
    """A field that is not written where nothing is known."""
    return Field(None, exclude_if=lambda value: value is None)


def write_record(path: Path, value: Any) -> None:
    """A record, or a list or dictionary of records, as indented JSON; replaced atomically."""
    write_json(path, to_jsonable_python(value, inf_nan_mode="constants"))


def read_record(path: Path, kind: Any, remedy: str = "restore it, or rebuild it", most_bytes: int | None = None) -> Any:
    """The value of type `kind` in a file.

    Args:
        remedy: what to do if it is damaged.
        most_bytes: of a file that may be a stranger's; None: a run's own records may be of any size.

    Raises:
        UpcycleError: it is missing, not JSON, or not of that type; names the file and the first field that is wrong.
    """
    try:
        return TypeAdapter(kind).validate_json(read_bytes(path, most_bytes))
    except ValidationError as error:
        raise UpcycleError(f"{path} is damaged: {first_problem(error)}; {remedy}") from None


def first_problem(error: ValidationError) -> str:
    """Field, problem and what was found, of the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return str(first["msg"])
    field = ".".join(map(str, first["loc"])) or "the whole"
    return f"{field}: {expected(first)} (found {brief(first['input'])})"
