"""What a stage costs."""

from pydantic import Field

from upcycle.records.record import Record


class Cost(Record):
    """Time and memory."""

    seconds: float = Field(ge=0)
    memory_gb: float = Field(0.0, ge=0)
    """Most resident, mapped files included."""
    gpu_gb: float | None = Field(None, ge=0, exclude_if=lambda value: value is None)
    """Most allocated on the first GPU."""

    def after(self, before: "Cost") -> "Cost":
        """With what an interrupted attempt had cost: all its time, the larger peaks."""
        peaks = [peak for peak in (self.gpu_gb, before.gpu_gb) if peak is not None]
        return Cost(
            seconds=round(self.seconds + before.seconds, 1),
            memory_gb=max(self.memory_gb, before.memory_gb),
            gpu_gb=max(peaks, default=None),
        )
