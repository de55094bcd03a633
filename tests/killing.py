"""Runs the pipeline in a child process that kills itself (SIGKILL) at a chosen point."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
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


def _after_some_files(folder: Any, **_: Any) -> None:
    """Removes the weights of the Trainer's checkpoint, then dies: trainer_state.json is still there."""
    for weights in Path(folder).rglob("model.safetensors"):
        weights.unlink()
    _kill()


POINTS = (
    "prepare",
    "prepare tail",
    "expand",
    "assemble",
    "assemble seal",
    "route",
    "posttrain",
    "posttrain tail",
    "posttrain rmtree",
    "evaluate",
)
"""Where a run can be killed: in a stage's work, while it finishes its folders, while it is sealed."""


def arm(stage: str) -> None:
    """Patch the code of a stage so that it dies at one of `POINTS`."""
    import torch

    from upcycle.evaluation import evaluate
    from upcycle.experts import ffn
    from upcycle.pipeline import manifest
    from upcycle.stages.expert_expansion import expand
    from upcycle.stages.expert_preparation import prepare
    from upcycle.stages.model_upcycling import posttrain
    from upcycle.training.fine_tune import UpcyclingTrainer
    from upcycle.weights.safetensors_io import ModelWriter

    if stage in ("prepare", "posttrain"):
        UpcyclingTrainer.training_step = _after(13, UpcyclingTrainer.training_step)  # step 7: past a checkpoint
    elif stage == "prepare tail":
        prepare._finish = _after(1, prepare._finish)  # the first of two checkpoints is finished
    elif stage == "posttrain tail":
        ffn.copy_companions = _kill  # the weights are written, the folder is not finished
    elif stage == "posttrain rmtree":
        posttrain.shutil.rmtree = _after_some_files
    elif stage == "assemble seal":
        manifest.hash_file = _after(3, manifest.hash_file)
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
