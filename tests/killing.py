"""Runs the pipeline in a child process that kills itself (SIGKILL) at a chosen point."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upcycle.pipeline import Run, run_stages
from upcycle.recipe import parse_recipe


def _kill(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but the process is killed at the given call."""
    left = [calls]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        return function(*args, **kwargs) if left[0] >= 0 else _kill()

    return wrapped


def arm(stage: str) -> None:
    """Patch the code of a stage so that it dies in the middle of its work."""
    import torch

    from upcycle.evaluation import evaluate
    from upcycle.expert_expansion import expand
    from upcycle.models.safetensors_io import ModelWriter
    from upcycle.training.fine_tune import UpcyclingTrainer

    if stage in ("prepare", "posttrain"):
        UpcyclingTrainer.training_step = _after(13, UpcyclingTrainer.training_step)  # step 7: past a checkpoint
    elif stage == "expand":
        expand.show_plan = _kill  # after plan.json is written, before the manifest
    elif stage == "assemble":
        ModelWriter.write = _after(20, ModelWriter.write)
    elif stage == "route":
        torch.optim.AdamW.step = _after(2, torch.optim.AdamW.step)
    elif stage == "evaluate":
        evaluate._score = _after(2, evaluate._score)


def run(values: dict[str, Any], folder: str, killed_in: str | None) -> None:
    """All stages of a recipe in `folder`; dies in `killed_in`."""
    import torch

    torch.set_num_threads(1)
    if killed_in:
        arm(killed_in)
    run_stages(Run(parse_recipe(values, "test"), Path(folder)))
