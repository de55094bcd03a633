"""How a stage's folder is kept safe.

A stage writes into `<stage>.partial/`. When it is done, the manifest (settings, seed, versions, hashes of the inputs
and of every file) is written last and the folder is renamed to `<stage>/`: its presence means complete.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from upcycle.console import say, track
from upcycle.disk import SCRATCH, inside, is_scratch, sync_files, sync_folder
from upcycle.errors import UpcycleError
from upcycle.hashes import hash_files
from upcycle.records.files import INPUTS, MANIFEST, SIZES
from upcycle.records.manifest import FORMAT, HASHED_WITH, Manifest, WrittenFile, library_versions

Inputs = Mapping[str, str]
"""Name of an input to the hash of its content."""


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a complete stage folder, None if the stage has not been completed.

    Raises:
        UpcycleError: the manifest is there but damaged, or of another format.
    """
    manifest = MANIFEST.known(folder)
    if manifest is not None and manifest.format not in HASHED_WITH:
        place = folder / MANIFEST.name
        raise UpcycleError(
            f"{place} has format {manifest.format}, this version reads {min(HASHED_WITH)} to {FORMAT}: use a new --run"
        )
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest.

    Raises:
        UpcycleError: names the first file that is missing or differs.
    """
    entries = {inside(folder, name): entry for name, entry in manifest.files.items()}
    for path, entry in entries.items():
        if not path.is_file():
            raise _damaged(path, "is missing")
        if (found := path.stat().st_size) != entry.bytes:
            raise _damaged(path, f"has {found} bytes, expected {entry.bytes}")
    paths = list(entries)
    hashes = hash_files(paths, manifest.algorithm)
    for path, found_hash in zip(track(paths, f"checking {folder.name}", "files"), hashes, strict=True):
        if found_hash != entries[path].hash:
            raise _damaged(path, "has other content than when it was written")


def _damaged(path: Path, problem: str) -> UpcycleError:
    return UpcycleError(f"{path} {problem}; restore it, or rerun with --update to rebuild the stage")


def verified(folder: Path) -> Manifest | None:
    """The manifest of a complete stage folder whose files are as they were written; None if it is not complete.

    Raises:
        UpcycleError: see `read_manifest` and `verify`.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        verify(folder, manifest)
    return manifest


def open_partial(folder: Path, inputs: Inputs, update: bool) -> Path:
    """The working folder of a stage; what an interrupted run left in it is kept if it had the same inputs.

    Raises:
        UpcycleError: it was left by a run with different inputs. With `update` it is set aside instead.
    """
    partial = partial_of(folder)
    left = _left_inputs(partial, inputs) if partial.exists() else dict(inputs)
    if left != dict(inputs):
        if not update:
            raise UpcycleError(
                f"{partial} was left by a run with different inputs ({changed_inputs(left, inputs)} changed); rerun "
                "with --update to set it aside and start this stage again, or restore those inputs to resume it"
            )
        set_aside(folder)
    partial.mkdir(parents=True, exist_ok=True)
    INPUTS.write(partial, dict(inputs))
    return partial


def set_aside(folder: Path) -> None:
    """Rename the working folder that a run with different inputs left of a stage, if there is one."""
    partial = partial_of(folder)
    if made_in(partial):
        aside = _unused(partial)
        partial.rename(aside)
        say(f"{partial} was left by a run with different inputs: set aside as {aside.name}")
    elif partial.exists():
        shutil.rmtree(partial)


def _left_inputs(partial: Path, inputs: Inputs) -> dict[str, str]:
    """Of which inputs a working folder is; one in which nothing was made, is of any."""
    if not made_in(partial):
        return dict(inputs)
    try:
        return INPUTS.known(partial) or {}
    except UpcycleError:
        return {}  # cut short: nobody knows of which


def made_in(folder: Path) -> bool:
    """Whether a stage's folder, a working one too, holds more than the mark that it was begun."""
    return folder.is_dir() and any(p.name != INPUTS.name and not is_scratch(p) for p in folder.iterdir())


def partial_of(folder: Path) -> Path:
    """Where a stage works before its folder is complete."""
    return folder.with_name(f"{folder.name}.partial")


def seal(
    partial: Path, folder: Path, inputs: Inputs, settings: Mapping[str, Any], seed: int, format: int = FORMAT
) -> Manifest:
    """Write the manifest and rename the working folder to the stage's, replacing an outdated one."""
    for path in [p for p in partial.rglob("*") if is_scratch(p)]:  # of a process that was killed while it wrote
        path.unlink()
    paths, algorithm = _files(partial), HASHED_WITH[format]
    for path in paths:  # safetensors are written for their owner alone
        path.chmod((partial / INPUTS.name).stat().st_mode)
    with ThreadPoolExecutor(1) as apart:  # the disk writes while the processor hashes
        synced = apart.submit(sync_files, partial)
        hashes = hash_files(paths, algorithm)
        files = {
            str(path.relative_to(partial)): WrittenFile(bytes=path.stat().st_size, **{algorithm: found})
            for path, found in zip(track(paths, f"sealing {folder.name}", "files"), hashes, strict=True)
        }
        synced.result()
    manifest = Manifest(
        stage=folder.name,
        inputs=dict(inputs),
        settings=dict(settings),
        seed=seed,
        versions=library_versions(),
        files=files,
        format=format,
    )
    MANIFEST.write(partial, manifest)
    sync_folder(partial)
    if folder.exists():  # moved, as a folder that is half removed is nobody's
        clear_up(folder)
        folder.rename(_old(folder))
    partial.rename(folder)
    sync_folder(folder.parent)
    clear_up(folder)
    return manifest


def clear_up(folder: Path) -> None:
    """Remove what sealing a stage leaves when it is killed: the marks of a working folder, the folder before this."""
    for path in (folder / INPUTS.name, *folder.rglob(SIZES.name)):
        path.unlink(missing_ok=True)
    if _old(folder).exists():
        shutil.rmtree(_old(folder))


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old{SCRATCH}")


def changed_inputs(old: Inputs, new: Inputs) -> str:
    """The names of the inputs that differ."""
    return ", ".join(sorted(name for name in {*old, *new} if old.get(name) != new.get(name))) or "nothing"


def _unused(partial: Path) -> Path:
    numbers = (n for n in range(1, 10**6) if not partial.with_name(f"{partial.name}.old-{n}").exists())
    return partial.with_name(f"{partial.name}.old-{next(numbers)}")


def _files(folder: Path) -> list[Path]:
    own = (folder / MANIFEST.name, folder / INPUTS.name)
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != SIZES.name and not is_scratch(p))
    return sorted(p for p in files if p not in own)
