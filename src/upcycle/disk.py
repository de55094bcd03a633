"""Files on disk: hashes of content, atomic writing, paths that stay in their folder."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, replaced atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, replaced atomically."""
    scratch = path.with_name(f".{path.name}.tmp")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def inside(folder: Path, name: str) -> Path:
    """`folder / name`.

    Raises:
        UpcycleError: the name leads out of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UpcycleError(f"'{name}' leads out of {folder}")
    return path
