"""What each stage costs, in `costs.json` beside the artifacts, which are the same from run to run."""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from upcycle.artifacts import write_json

COSTS = "costs.json"
Costs = dict[str, float]
"""`seconds`; `memory_gb`, most resident, mapped files included; `gpu_gb`, most allocated on the first GPU."""


def read_costs(run: Path) -> dict[str, Costs]:
    """Stage name to what it cost; a stage that was taken from another run has none."""
    path = run / COSTS
    return json.loads(path.read_text()) if path.exists() else {}


@contextmanager
def measured(run: Path, stage: str, resumed: bool) -> Iterator[None]:
    """Record the cost of what runs inside; of a resumed stage, with what had been recorded when it was interrupted.

    A process that is killed records nothing.
    """
    _reset_peaks()
    begin = time.monotonic()
    try:
        yield
    finally:
        costs = read_costs(run)
        before = costs.pop(stage, {}) if resumed else {}
        found = {name: max(value, before.get(name, 0.0)) for name, value in _peaks().items()}
        seconds = round(before.get("seconds", 0.0) + time.monotonic() - begin, 1)
        write_json(run / COSTS, {**costs, stage: {"seconds": seconds, **found}})


def _reset_peaks() -> None:
    with suppress(OSError):  # Linux alone can; elsewhere the peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()


def _peaks() -> Costs:
    found = {"memory_gb": round(_resident_peak() / 1e9, 2)}
    if (cuda := _cuda()) is not None:
        found["gpu_gb"] = round(cuda.max_memory_allocated() / 1e9, 2)
    return found


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
