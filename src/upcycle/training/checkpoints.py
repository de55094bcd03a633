"""Trainer checkpoints on disk: the newest complete one, and what a finished one keeps."""

import shutil
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.reading import read_json
from upcycle.records.files import ROUTER_BIAS, TRAINER_STATE

RESUME_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "training_args.bin",
    "README.md",
    ROUTER_BIAS.name,
)


def last_checkpoint(out_dir: Path) -> Path | None:
    """The newest complete checkpoint-<step>; what a killed run left half-written is removed."""
    complete = []
    for folder in out_dir.glob("checkpoint-*"):
        if _is_complete(folder):
            complete.append(folder)
        else:
            shutil.rmtree(folder)
    return max(complete, key=step_of, default=None)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.rpartition("-")[2])


def strip_resume_files(folder: Path) -> None:
    """Leave only the model of a checkpoint: optimizer state and pickles go."""
    for pattern in RESUME_FILES:
        for path in folder.glob(pattern):
            path.unlink()


def finish(folder: Path) -> None:
    """Leave nothing of the Trainer's in a checkpoint of a finished training."""
    strip_resume_files(folder)
    TRAINER_STATE.of(folder).unlink(missing_ok=True)


def _is_complete(folder: Path) -> bool:
    try:
        read_json(TRAINER_STATE.of(folder), most_bytes=None)
    except UpcycleError:
        return False
    return True
