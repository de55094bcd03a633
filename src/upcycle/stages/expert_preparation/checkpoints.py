"""Checkpoints that exist already: any list of model folders, or a Trainer's output folder."""

import re
from collections.abc import Sequence
from pathlib import Path

from upcycle.console import say, warn
from upcycle.disk import check_name
from upcycle.errors import UpcycleError
from upcycle.experts.kind import Kind
from upcycle.reading import read_json, read_text
from upcycle.records.files import CHECKPOINTS
from upcycle.records.plan import Checkpoint
from upcycle.records.scores import RESERVED
from upcycle.training.checkpoints import step_of
from upcycle.weights.base import Base
from upcycle.weights.folders import TEMPLATE, find_model

NUMBERED = re.compile(r"(checkpoint-)?[0-9]+")
EOS = "eos_token_id"


def adopt(kind: Kind, base: Base, given: Sequence[tuple[Path, str]], out_dir: Path) -> list[Checkpoint]:
    """Take the user's checkpoints as they are: nothing is trained or copied.

    Args:
        given: each folder, in the order of training, with the hash of its model.

    Raises:
        UpcycleError: a checkpoint has another architecture or tokenizer than the base, or weights of a dtype in which
            the difference to the base would drown; an adapter is not one of the base's FFN weights.
    """
    folders, hashes = [folder for folder, _ in given], [sha256 for _, sha256 in given]
    for place, sha256 in enumerate(hashes):
        if sha256 in hashes[:place]:
            first = folders[hashes.index(sha256)]
            raise UpcycleError(f"prepare.checkpoints: {folders[place]} and {first} are the same model; leave one out")
    for folder in folders:
        check_same_tokenizer(base.folder, folder)
        kind.check_checkpoint(base, folders[0], folder)
    say_what_differs(base, folders[-1])
    checkpoints = [
        Checkpoint(name=_unique_name(folder, folders), path=str(folder.resolve()), sha256=sha256)
        for folder, sha256 in given
    ]
    say(f"prepare: {len(checkpoints)} checkpoints taken from {folders[0].parent} and used where they are")
    CHECKPOINTS.write(out_dir, checkpoints)
    return checkpoints


def say_what_differs(base: Base, last: Path) -> None:
    """Warn of what the MoE will have from the base though the last checkpoint has it otherwise."""
    template, own = last / TEMPLATE, base.folder / TEMPLATE
    if (
        base.chat_template is None
        and template.is_file()
        and read_text(template) != (read_text(own) if own.is_file() else "")
    ):
        warn(f"{last} has a chat template of its own; the MoE gets the base's, unless data.chat_template={template}")
    for name in ("config.json", "generation_config.json"):
        ids = [read_json(f / name).get(EOS) if (f / name).is_file() else None for f in (base.folder, last)]
        if ids[1] is not None and ids[0] != ids[1]:
            warn(f"{last / name}: {EOS} is {ids[1]}; the MoE gets the base's, {ids[0]}")


def checkpoint_folders(given: str | list[str] | None) -> list[Path]:
    """The folders of existing checkpoints, in the order of training (by step, for a Trainer folder).

    Raises:
        UpcycleError: a folder is missing, or a Trainer folder has fewer than two checkpoints.
    """
    if given is None:
        return []
    if isinstance(given, list):
        return [find_model(name) for name in given]
    parent = check_name(Path(given).expanduser())
    if not parent.is_dir():
        raise UpcycleError(f"prepare.checkpoints: {parent} is not a folder")
    numbered = (p for p in parent.iterdir() if p.is_dir() and NUMBERED.fullmatch(p.name))
    folders = sorted(numbered, key=step_of)
    if len(folders) < 2:
        raise UpcycleError(
            f"prepare.checkpoints: {parent} holds {len(folders)} folders named checkpoint-<step> or <step>, expected "
            "2 or more; to name model folders yourself give a list"
        )
    return folders


def check_same_tokenizer(base: Path, checkpoint: Path) -> None:
    """Compare what the tokenizers make of a text: vocabulary, merges, added tokens.

    Raises:
        UpcycleError: they differ. A checkpoint without a tokenizer is taken to have the base's.
    """
    files = [folder / "tokenizer.json" for folder in (base, checkpoint)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    expected, found = (read_json(file) for file in files)
    for part in ("model", "added_tokens", "normalizer", "pre_tokenizer"):
        if expected.get(part) != found.get(part):
            raise UpcycleError(
                f"{files[1]}: its {part} is not that of the base's tokenizer, {files[0]}; the checkpoints of one run "
                "have the base's tokenizer, so take checkpoints and base that belong together"
            )


def _unique_name(folder: Path, folders: Sequence[Path]) -> str:
    clear = folder.name not in RESERVED and [f.name for f in folders].count(folder.name) == 1
    return folder.name if clear else f"{folder.name}#{list(folders).index(folder) + 1}"
