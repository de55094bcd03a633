"""What a training is asked to do."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from upcycle.settings import PosttrainSettings, TrainingSettings
from upcycle.training.moments import Moments


@dataclass(frozen=True)
class Training:
    """How a model is trained, and where its checkpoints go."""

    settings: TrainingSettings
    seed: int
    title: str
    """What progress is called."""
    out_dir: Path
    newest_alone: bool = False
    """Whether older checkpoints go, or stay without their optimizer state."""
    balance: PosttrainSettings | None = None
    """How a MoE's routers are balanced; None for a dense model."""
    span: tuple[float, float] = (0.0, 1.0)
    """From where to where on the learning-rate schedule, of which the whole is 1."""
    moments: Callable[[], Moments] | None = None
    """Makes the optimizer state to begin with; None: a fresh one."""
    moments_to: Path | None = None
    """Where the optimizer's moments at the end are kept."""
