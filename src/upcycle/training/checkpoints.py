"""Trainer checkpoints on disk: the newest complete one, and what a finished one keeps."""

import shutil
from contextlib import suppress
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path

from upcycle.distributed.shards import OPTIMIZER
from upcycle.records.files import ROUTER_BIAS, SIZES, TRAINER_STATE, is_whole

RESUME_FILES = (
    "optimizer.pt",
    f"{OPTIMIZER}/*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "training_args.bin",
    "README.md",
    ROUTER_BIAS.name,
)


def last_checkpoint(out_dir: Path) -> Path | None:
    """The newest checkpoint-<step> that training can go on from; what does not lead up to it is removed.

    A checkpoint counts once its sizes are noted. Where a file of one has another size now, it and those after it are
    made again.
    """
    folders = list(out_dir.glob("checkpoint-*"))
    noted = sorted((folder for folder in folders if (folder / SIZES.name).is_file()), key=step_of)
    kept = list(takewhile(lambda folder: is_whole(folder, _only_to_resume), noted))
    while kept and not is_whole(kept[-1]):
        kept.pop()
    for folder in folders:
        if folder not in kept:
            remove(folder)
    return kept[-1] if kept else None


def remove(folder: Path) -> None:
    """Remove a checkpoint; a kill in between leaves one that does not count."""
    (folder / SIZES.name).unlink(missing_ok=True)
    shutil.rmtree(folder)


def leave_newest(out_dir: Path) -> None:
    """Remove all checkpoints but the newest; a kill may have left one before it."""
    for folder in sorted(out_dir.glob("checkpoint-*"), key=step_of)[:-1]:
        remove(folder)


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.rpartition("-")[2])


def strip_resume_files(folder: Path) -> None:
    """Leave only the model of a checkpoint: optimizer state and pickles go."""
    for pattern in RESUME_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    with suppress(FileNotFoundError):
        (folder / OPTIMIZER).rmdir()


def finish(folder: Path) -> None:
    """Leave nothing of the Trainer's in a checkpoint of a finished training."""
    strip_resume_files(folder)
    for name in (TRAINER_STATE.name, SIZES.name):
        (folder / name).unlink(missing_ok=True)


def _only_to_resume(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in RESUME_FILES)
