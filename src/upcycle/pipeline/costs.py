"""What each stage costs, beside the artifacts, which are the same from run to run."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from upcycle.console import warn
from upcycle.errors import UpcycleError
from upcycle.records.cost import Cost
from upcycle.records.files import COSTS
from upcycle.stopping import before_stopping


def read_costs(run: Path) -> dict[str, Cost]:
    """Stage name to what it cost; a stage that was taken from another run has none."""
    return COSTS.known_of(run) or {}


@contextmanager
def measured(run: Path, stage: str, resumed: bool) -> Iterator[None]:
    """Record the cost of what runs inside; of a resumed stage, with what had been recorded when it was interrupted.

    A process that is killed records nothing; one that is asked to stop does.
    """
    _reset_peaks()
    begin = time.monotonic()

    def record() -> None:
        costs = _known_costs(run)
        before = costs.pop(stage, None)
        spent = time.monotonic() - begin
        cost = Cost(seconds=round(spent, 1), memory_gb=round(_resident_peak() / 1e9, 2), gpu_gb=_gpu_peak_gb())
        COSTS.write(run, {**costs, stage: cost.after(before) if before and resumed else cost})

    try:
        with before_stopping(record):
            yield
    finally:
        record()


def _known_costs(run: Path) -> dict[str, Cost]:
    """What is recorded; nothing if that is damaged: it must not cost the stage that has just been made."""
    try:
        return read_costs(run)
    except UpcycleError as error:
        warn(f"{error}: starting a new record of costs")
        return {}


def _reset_peaks() -> None:
    with suppress(OSError):  # Linux alone can; elsewhere the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()


def _gpu_peak_gb() -> float | None:
    cuda = _cuda()
    return round(cuda.max_memory_allocated() / 1e9, 2) if cuda is not None else None


def _resident_peak() -> int:
    """Bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cuda() -> ModuleType | None:
    """torch.cuda, if torch is imported already and has a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None
