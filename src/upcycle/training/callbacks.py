"""Trainer callbacks: when to save, what to show, how the routers are loaded."""

import math
from collections import deque
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from upcycle.console import Progress, warn
from upcycle.errors import UpcycleError, counted
from upcycle.routing.load import DEAD, OVERLOADED, shares
from upcycle.training.checkpoints import remove, step_of, strip_resume_files
from upcycle.training.loss_free import LossFreeBias

WINDOW = 20
"""Steps over which an expert's load is judged."""


def checkpoint_steps(max_steps: int, epochs: float, checkpoint_every: float, to_resume: bool = False) -> list[int]:
    """The step nearest to each multiple of `checkpoint_every` epochs, and the last one.

    Args:
        to_resume: they become no experts, so that several may fall on one step.

    Raises:
        UpcycleError: two of them fall on the same step.
    """
    count = math.floor(epochs / checkpoint_every + 1e-9)
    steps = [round(max_steps * i * checkpoint_every / epochs) for i in range(1, count + 1)]
    if to_resume:
        return sorted({*(max(1, step) for step in steps), max_steps})
    if len(set(steps)) < len(steps) or (steps and steps[0] == 0):
        raise UpcycleError(
            f"prepare.checkpoint_every={checkpoint_every} of an epoch is less than one step apart "
            f"({counted(max_steps, 'step')} for epochs={epochs:g}); raise checkpoint_every, lower batch_size, or give "
            "more data"
        )
    return sorted({*steps, max_steps})


class CheckpointSchedule(TrainerCallback):  # type: ignore[misc]
    """Saves at equal distances in epochs, without the drift of a whole number of steps."""

    def __init__(self, epochs: float, checkpoint_every: float, to_resume: bool) -> None:
        self._to_resume = to_resume
        self._epochs = epochs
        self._every = checkpoint_every
        self._steps: list[int] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._steps = checkpoint_steps(state.max_steps, self._epochs, self._every, self._to_resume)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step in self._steps:
            control.should_save = True


class ShowProgress(TrainerCallback):  # type: ignore[misc]
    """A bar over the steps, with the loss."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Progress | None = None
        self._loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._bar = Progress(self._description, state.max_steps, "steps", state.global_step).__enter__()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self._bar:
            self._bar.advance(note=self._loss)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.log_history and "loss" in state.log_history[-1]:
            self._loss = f"(loss {state.log_history[-1]['loss']:.3f})"

    def close(self) -> None:
        """Also when training ends in an error, so that the terminal is left in order."""
        if self._bar:
            self._bar.__exit__()


class StepBias(TrainerCallback):  # type: ignore[misc]
    """Moves the balancing bias after each optimizer step."""

    def __init__(self, bias: LossFreeBias) -> None:
        self._bias = bias

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._bias.step(state.global_step / state.max_steps)


class StripOlder(TrainerCallback):  # type: ignore[misc]
    """Only the newest checkpoint keeps what a resume needs, or the newest alone is kept."""

    def __init__(self, newest_alone: bool) -> None:
        self._clear = remove if newest_alone else strip_resume_files

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not state.is_world_process_zero:
            return
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            if step_of(folder) < state.global_step:
                self._clear(folder)


class LoadMonitor:
    """Load (share of the routed slots over the mean share) per layer and expert while training.

    Warns once about each expert that is dead or overloaded over the last `WINDOW` steps.
    """

    def __init__(self) -> None:
        self.load: list[list[float]] = []
        """(layers, experts) as of the last `take`, in thousandths."""
        self._step: list[Float[Tensor, "L E"]] = []
        self._recent: deque[Float[Tensor, "L E"]] = deque(maxlen=WINDOW)
        self._warned: set[tuple[str, int, int]] = set()

    def add(self, counts: Float[Tensor, "L E"]) -> None:
        """Add the slots that each expert got in one forward pass of all processes."""
        self._step.append(counts)

    def take(self) -> dict[str, float]:
        """Figures since the last call; load is 1 for each expert when balanced."""
        if not self._step:
            return {}
        load = shares(torch.stack(self._step).sum(dim=0)).cpu() * self._step[0].shape[1]
        self._step.clear()
        self.load = [[round(value, 3) for value in layer] for layer in load.tolist()]
        self._recent.append(load)
        if len(self._recent) == WINDOW:
            recent = torch.stack(list(self._recent)).mean(dim=0)
            self._warn("dead", recent < DEAD, recent)
            self._warn("overloaded", recent > OVERLOADED, recent)
        return {
            "max_load": load.max().item(),
            "min_load": load.min().item(),
            "dead_experts": float((load < DEAD).sum()),
            "overloaded_experts": float((load > OVERLOADED).sum()),
            **{f"load/expert_{e}": value for e, value in enumerate(load.mean(dim=0).tolist())},
        }

    def _warn(self, what: str, where: Tensor, load: Tensor) -> None:
        new = [(what, *place) for place in where.nonzero().tolist() if (what, *place) not in self._warned]
        self._warned.update(new)
        if new:
            named = ", ".join(f"layer {la} expert {ex} ({load[la, ex]:.2f})" for _, la, ex in new[:4])
            more = f" and {len(new) - 4} more" if len(new) > 4 else ""
            warn(f"post-training: {what} over the last {WINDOW} steps (load, 1 is balanced): {named}{more}")
