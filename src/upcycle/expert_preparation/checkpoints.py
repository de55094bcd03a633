"""Checkpoints that exist already: any list of model folders, or a Trainer's output folder."""

import json
from pathlib import Path

from upcycle.artifacts import Checkpoint, write_json
from upcycle.console import say
from upcycle.errors import UpcycleError
from upcycle.models.adapters import is_adapter, read_adapter
from upcycle.models.families import computed_fields, family_of
from upcycle.models.folders import find_model, read_config
from upcycle.models.layouts import ffn_tensors
from upcycle.models.safetensors_io import ModelReader
from upcycle.training.checkpoints import step_of

RESERVED = ("base", "MoE", "MoE before post-training")
"""Names that the table of scores gives to other models."""


def adopt(base: Path, given: list[tuple[Path, str]], train: str, out_dir: Path) -> list[Checkpoint]:
    """Take the user's checkpoints as they are: nothing is trained or copied.

    Args:
        given: each folder, in the order of training, with the hash of its model.
        train: `lora` for adapters, anything else for whole models.

    Raises:
        UpcycleError: a checkpoint has another architecture or tokenizer than the base, or weights of a dtype in which
            the difference to the base would drown; an adapter is not one of the base's FFN weights.
    """
    folders = [folder for folder, _ in given]
    for folder in folders:
        check_kind(folder, train)
        check_same_tokenizer(base, folder)
        if train == "lora":
            read_adapter(folder, read_config(base))
        else:
            check_same_architecture(base, folder)
            check_precision(base, folders[0], folder)
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


def check_kind(folder: Path, train: str) -> None:
    """Raises UpcycleError if the folder holds a model where adapters are expected, or an adapter where models are."""
    if is_adapter(folder) and train != "lora":
        raise UpcycleError(f"{folder} is an adapter; set prepare.train=lora to make experts of adapters")
    if not is_adapter(folder) and train == "lora":
        raise UpcycleError(f"{folder} is not an adapter (no adapter_config.json), but prepare.train is lora")


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


def check_same_tokenizer(base: Path, checkpoint: Path) -> None:
    """Compare what the tokenizers make of a text: vocabulary, merges, added tokens.

    Raises:
        UpcycleError: they differ. A checkpoint without a tokenizer is taken to have the base's.
    """
    files = [folder / "tokenizer.json" for folder in (base, checkpoint)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    expected, found = (json.loads(file.read_text()) for file in files)
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer"):
        if expected.get(part) != found.get(part):
            raise UpcycleError(
                f"{files[1]}: its {part} is not that of the base's tokenizer, {files[0]}; the checkpoints of one run "
                "have the base's tokenizer, so take checkpoints and base that belong together"
            )


def check_precision(base: Path, first: Path, checkpoint: Path) -> None:
    """Compare the dtypes of the FFN weights.

    Raises:
        UpcycleError: they are less precise than the base's, or not those of the first checkpoint: the rounding would be
            taken for what training changed.
    """
    config = read_config(base)
    name = ffn_tensors(family_of(config, str(base)).layout, config)[0]
    dtypes = {folder: ModelReader(folder).spec(name).dtype for folder in (base, first, checkpoint)}
    for other, wrong in (
        (base, dtypes[checkpoint].itemsize < dtypes[base].itemsize),
        (first, dtypes[checkpoint] != dtypes[first]),
    ):
        if wrong:
            raise UpcycleError(
                f"{checkpoint}: its weights are {dtypes[checkpoint]}, those of {other} {dtypes[other]}; the rounding "
                f"would be taken for what training changed: convert {other} to {dtypes[checkpoint]}, or save "
                "checkpoints in its dtype"
            )


def write_checkpoints(out_dir: Path, checkpoints: list[Checkpoint]) -> None:
    """`checkpoints.json`: what the later stages read, in the order of training."""
    write_json(out_dir / "checkpoints.json", [vars(c) for c in checkpoints])


def _unique_name(folder: Path, folders: list[Path]) -> str:
    clear = folder.name not in RESERVED and [f.name for f in folders].count(folder.name) == 1
    return folder.name if clear else f"{folder.name}#{folders.index(folder) + 1}"
