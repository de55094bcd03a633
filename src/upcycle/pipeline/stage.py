"""The form of a row of `stages.STAGES`: everything that is known of a stage."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.recipe import Recipe

if TYPE_CHECKING:  # what imports torch; the annotations are whole names, which the checks of the tests can follow
    import upcycle.experts.active
    from upcycle.pipeline.run import Run

Sections = dict[str, Any]
"""Settings by section."""


@dataclass(frozen=True)
class Stage:
    """One row of the flow."""

    name: str
    help: str
    needs: tuple[str, ...]
    """Earlier stages whose artifact it reads."""
    run: Callable[["Run", Path], None]
    """Makes the artifact in a folder."""
    settings: Callable[[Recipe], Sections]
    """The settings that decide it, but for those of the data."""
    by_all: bool = False
    """Whether all processes make it, if there are several, or the first alone."""
    reads_data: Callable[[Recipe], bool] = lambda _: False
    """Whether a change of the rows concerns it."""
    held_out: Callable[[Recipe], bool] = lambda _: False
    """Whether the choice of the seed data decides which rows it reads."""
    reads_validation: bool = False
    """Whether it reads the held-out rows too."""
    reads_template: bool = False
    """Whether the chat template ends up in what it makes though it reads no data."""
    more_inputs: Callable[["Run"], dict[str, str]] = lambda _: {}
    """Hashes of what else it reads."""
    less_memory: str = "use a device with more"
    """What to do where a device has too little."""
    tokens: Callable[[Path], int] | None = None
    """Training tokens that the artifact in a folder took; None: it trains nothing."""
    flops: Callable[["upcycle.experts.active.Active", Path], int] = lambda _, __: 0
    """What making it took in floating-point operations, of a stage that trains."""
