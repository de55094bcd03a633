"""Checkpoints that exist already: any list of model folders, or a Trainer's output folder."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from upcycle.console import say, warn
from upcycle.disk import check_name, expanded
from upcycle.errors import UpcycleError, counted
from upcycle.experts.kind import Kind
from upcycle.reading import read_json
from upcycle.records.files import CHECKPOINTS
from upcycle.records.plan import Checkpoint
from upcycle.records.scores import RESERVED
from upcycle.training.checkpoints import step_of
from upcycle.weights.base import Base
from upcycle.weights.folders import TOKENIZER_FILES, find_model, read_config
from upcycle.weights.tokenizers import has_tokenizer, other_ids, other_words, read_tokenizer

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
        check_same_tokenizer(base, folder)
        kind.check_checkpoint(base, folders[0], folder)
    say_what_differs(base, folders[-1])
    checkpoints = [
        Checkpoint(name=_unique_name(folder, folders), path=str(folder.resolve()), sha256=sha256)
        for folder, sha256 in given
    ]
    say(f"prepare: {counted(len(checkpoints), 'checkpoint')} taken from {folders[0].parent} and used where they are")
    say("prepare: they are read as transformers (adapters: PEFT) reads them")
    CHECKPOINTS.write(out_dir, checkpoints)
    return checkpoints


def say_what_differs(base: Base, last: Path) -> None:
    """What the last checkpoint has otherwise than the base beside its weights, and which of the two the MoE gets."""
    found = [*_other_words(base, last), *_other_ids(base, last)]
    if found and base.last is not None:
        say(f"prepare: the MoE gets from {last.name}, which differs from the base in them: {'; '.join(found)}")
    elif found:
        warn(
            f"{last} differs from the base in: {'; '.join(found)}; the MoE gets the base's (the checkpoint's with "
            "assemble.shared=last)"
        )


def _other_words(base: Base, last: Path) -> list[str]:
    if _same_files(base.folder, last):
        return []
    tokenizers = [read_tokenizer(folder) for folder in (base.folder, last)]
    for tokenizer in tokenizers:
        tokenizer.chat_template = base.chat_template or tokenizer.chat_template
    return list(other_words(*tokenizers))


def _other_ids(base: Base, last: Path) -> Iterator[str]:
    for name in ("config.json", "generation_config.json"):
        ids = [_end(folder / name) for folder in (base.folder, last)]
        if ids[1] is not None and ids[0] != ids[1]:
            yield f"{EOS} {ids[1]} of {name} ({ids[0]} in the base)"


def _end(path: Path) -> Any:
    if not path.is_file():
        return None
    return (read_config(path.parent) if path.name == "config.json" else read_json(path)).get(EOS)


def checkpoint_folders(given: str | list[str] | None) -> list[Path]:
    """The folders of existing checkpoints, in the order of training (by step, for a Trainer folder).

    Raises:
        UpcycleError: a folder is missing, or a Trainer folder has fewer than two checkpoints.
    """
    if given is None:
        return []
    if isinstance(given, list):
        return [find_model(name) for name in given]
    parent = check_name(expanded(given))
    if not parent.is_dir():
        raise UpcycleError(f"prepare.checkpoints: {parent} is not a folder")
    numbered = (p for p in parent.iterdir() if p.is_dir() and NUMBERED.fullmatch(p.name))
    folders = sorted(numbered, key=step_of)
    if len(folders) < 2:
        raise UpcycleError(
            f"prepare.checkpoints: {parent} holds {counted(len(folders), 'folder')} named checkpoint-<step> or <step>, "
            "expected 2 or more; to name model folders yourself give a list"
        )
    return folders


def check_same_tokenizer(base: Base, checkpoint: Path) -> None:
    """Compare what the tokenizers make of texts.

    Raises:
        UpcycleError: they differ, or the checkpoint's has added a token that the model does not know. A checkpoint
            without a tokenizer is taken to have the base's.
    """
    if _same_files(base.folder, checkpoint):
        return
    expected, found = read_tokenizer(base.folder), read_tokenizer(checkpoint)
    if difference := other_ids(expected, found):
        raise UpcycleError(
            f"{checkpoint}: its tokenizer is not that of the base {base.folder}: {difference}; the checkpoints of one "
            "run have the base's tokenizer, so use checkpoints and a base that belong together"
        )
    known, added = base.config["vocab_size"], found.get_added_vocab()
    for token in sorted(added.keys() - expected.get_added_vocab().keys()):
        if added[token] >= known:
            raise UpcycleError(
                f"{checkpoint}: its tokenizer has added {token!r} with the id {added[token]}, but the model knows "
                f"{known} tokens (vocab_size); resize the embeddings of base and checkpoints, or remove the token"
            )


def _same_files(base: Path, checkpoint: Path) -> bool:
    """Whether the tokenizers need not be compared: the files are equal, or the checkpoint has none."""
    files = [(base / name, checkpoint / name) for name in TOKENIZER_FILES]
    return not has_tokenizer(checkpoint) or all(_content(one) == _content(other) for one, other in files)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _unique_name(folder: Path, folders: Sequence[Path]) -> str:
    clear = folder.name not in RESERVED and [f.name for f in folders].count(folder.name) == 1
    return folder.name if clear else f"{folder.name}#{list(folders).index(folder) + 1}"
