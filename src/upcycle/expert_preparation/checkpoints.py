"""Checkpoints that exist already: any list of model folders, or a Trainer's output folder."""

from pathlib import Path

from upcycle.artifacts import Checkpoint, write_json
from upcycle.console import say
from upcycle.errors import UpcycleError
from upcycle.models.families import computed_fields
from upcycle.models.folders import find_model, read_config
from upcycle.training.checkpoints import step_of

RESERVED = ("base", "MoE", "MoE before post-training")
"""Names that the table of scores gives to other models."""


def adopt(base: Path, given: list[tuple[Path, str]], out_dir: Path) -> list[Checkpoint]:
    """Take the user's checkpoints as they are: nothing is trained or copied.

    Args:
        given: each folder, in the order of training, with the hash of its model.

    Raises:
        UpcycleError: a checkpoint is of another architecture than the base.
    """
    folders = [folder for folder, _ in given]
    for folder in folders:
        check_same_architecture(base, folder)
    checkpoints = [Checkpoint(_unique_name(f, folders), str(f.resolve()), sha256=sha256) for f, sha256 in given]
    say(f"prepare: {len(checkpoints)} checkpoints taken from {folders[0].parent} and used where they are")
    write_checkpoints(out_dir, checkpoints)
    return checkpoints


def checkpoint_folders(given: str | list[str] | None) -> list[Path]:
    """The folders of existing checkpoints, in the order of training (by step, for a Trainer folder).

    Raises:
        UpcycleError: a folder is missing, or a Trainer folder has fewer than two checkpoints.
    """
    if given is None:
        return []
    if isinstance(given, list):
        return [find_model(name) for name in given]
    parent = Path(given)
    if not parent.is_dir():
        raise UpcycleError(f"prepare.checkpoints: {parent} is not a folder")
    numbered = (p for p in parent.glob("checkpoint-*") if p.is_dir() and p.name.partition("-")[2].isdigit())
    folders = sorted(numbered, key=step_of)
    if len(folders) < 2:
        raise UpcycleError(
            f"prepare.checkpoints: {parent} holds {len(folders)} folders named checkpoint-<step>, expected 2 or "
            "more; to name model folders yourself give a list"
        )
    return folders


def check_same_architecture(base: Path, checkpoint: Path) -> None:
    """Compare the fields that decide what the weights compute.

    Raises:
        UpcycleError: names the first field that differs.
    """
    expected, found = computed_fields(read_config(base)), computed_fields(read_config(checkpoint))
    for field in expected:
        if expected[field] != found.get(field):
            raise UpcycleError(
                f"{checkpoint}: {field} is {found.get(field)!r}, but the base {base} has {expected.get(field)!r}; "
                "the checkpoints of one run have the base's architecture"
            )


def write_checkpoints(out_dir: Path, checkpoints: list[Checkpoint]) -> None:
    """`checkpoints.json`: what the later stages read, in the order of training."""
    write_json(out_dir / "checkpoints.json", [vars(c) for c in checkpoints])


def _unique_name(folder: Path, folders: list[Path]) -> str:
    clear = folder.name not in RESERVED and [f.name for f in folders].count(folder.name) == 1
    return folder.name if clear else f"{folder.name}#{folders.index(folder) + 1}"
