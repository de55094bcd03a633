"""Files on disk: atomic writing, paths that stay in their folder."""

import glob
import hashlib
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError

CACHE = "UPCYCLE_CACHE"
"""Names another folder for what is kept."""
SCRATCH = ".tmp"
"""Ending of a hidden file that is being written, and that a kill may leave."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def expanded(name: str | Path) -> Path:
    """With `~` replaced.

    Raises:
        UpcycleError: there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UpcycleError(f"{name}: no home folder is known for that user; write the path without ~") from None


def cache_folder() -> Path:
    """Where what can be made again is kept: `$UPCYCLE_CACHE`, or `upcycle` in the user's folder of caches."""
    given = os.environ.get(CACHE)
    return expanded(given) if given else expanded(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "upcycle"


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, replaced atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, replaced atomically.

    Raises:
        UpcycleError: there is no such folder.
        OSError: with the name of the file, which an error of a full disk does not have of itself.
    """
    check_writable(path)
    scratch = path.with_name(f".{path.name}{SCRATCH}")
    try:
        with scratch.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: Path) -> None:
    """Before any work whose result goes there.

    Raises:
        UpcycleError: there is no such folder, or a folder, a pipe or a device lies where the file would.
    """
    if not path.parent.is_dir():
        raise UpcycleError(f"{path} cannot be written: {path.parent} is not a folder")
    if not os.access(path.parent, os.W_OK):
        raise UpcycleError(f"{path} cannot be written: the folder {path.parent} may not be written to")
    if path.is_dir():
        raise UpcycleError(f"{path} cannot be written: it is a folder; name a file")
    if path.exists() and not path.is_file():  # replacing it would take a device from everybody
        raise UpcycleError(f"{path} cannot be written: it is a pipe or a device; name a file")


def check_folder(folder: Path, option: str) -> None:
    """Raises UpcycleError if a folder cannot be made there, because a file lies on the way."""
    if (there := next((path for path in (folder, *folder.parents) if path.exists()), None)) and not there.is_dir():
        raise UpcycleError(f"{option} {folder} cannot be made: {there} is a file; name a folder")


def check_new(folder: Path, option: str) -> None:
    """Before any work whose result goes there.

    Raises:
        UpcycleError: it holds something already, is a file, or a folder that no other one can take the place of.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UpcycleError(f"{folder} is {'not empty' if folder.is_dir() else 'a file'}; give {option} a new folder")
    if fixed := _fixed(folder):
        raise UpcycleError(f"{folder} is {fixed}, which cannot be replaced; give {option} a new folder within it")
    check_folder(folder, option)


def _fixed(folder: Path) -> str | None:
    """What an empty folder is that no other one can take the place of."""
    if folder.is_symlink():
        return "a link"
    if folder.is_dir() and folder.samefile(Path()):
        return "the current folder"
    return "a mount" if folder.resolve().is_mount() else None


def check_name(path: Path) -> Path:
    """The path, if its whole name is text: it goes into records, which are UTF-8.

    Raises:
        UpcycleError: it is not UTF-8.
    """
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError:
        raise UpcycleError(f"{str(path.resolve())!r} is not UTF-8; rename the file or folder") from None
    return path


def is_scratch(path: Path) -> bool:
    """Whether a file is one that was being written."""
    return path.name.startswith(".") and path.name.endswith(SCRATCH)


def scratch_folder(target: Path) -> Path:
    """A new hidden folder beside `target`, of this process alone; what killed ones of this machine left is removed."""
    target, machine = target.absolute(), platform.node()
    made = target.with_name(f".{target.name}.{machine}-{os.getpid()}{SCRATCH}")
    for left in target.parent.glob(f".{glob.escape(target.name)}.{glob.escape(machine)}-*{SCRATCH}"):
        process = left.name.removesuffix(SCRATCH).rpartition("-")[2]
        if left == made or (process.isdecimal() and not _is_running(int(process))):
            _remove_folder(left)
    made.mkdir(parents=True)
    return made


def _remove_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # names what it found in there, without the folder
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def sync_files(folder: Path) -> None:
    """Have everything in a folder on the disk, whatever happens next: what is written later may say that it is."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folders(folder)


def sizes(folder: Path) -> dict[str, int]:
    """The bytes of every file in a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def sync_folders(folder: Path) -> None:
    """Have the names in a folder and those in it on the disk."""
    for path in (*folder.rglob("*/"), folder):
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def inside(folder: Path, name: str) -> Path:
    """`folder / name`.

    Raises:
        UpcycleError: the name, or a link that it names, leads out of the folder.
    """
    path = named_inside(folder, name)
    try:
        leads = path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        raise UpcycleError(f"{path} is a broken link") from None
    if not leads.is_relative_to(folder.resolve()):
        raise UpcycleError(f"'{name}' leads out of {folder}")
    return path


def named_inside(folder: Path, name: str) -> Path:
    """`folder / name`; a link there is followed wherever it leads, as those of the hub's cache lead to its blobs.

    Raises:
        UpcycleError: the name leads out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UpcycleError(f"'{name}' leads out of {folder}")
    return folder / name
