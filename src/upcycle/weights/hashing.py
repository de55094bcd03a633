"""The hash of a model folder."""

from collections.abc import Sequence
from pathlib import Path

from upcycle.console import track
from upcycle.disk import digest
from upcycle.hashes import hash_files
from upcycle.records.files import MANIFEST, TRAINER_STATE
from upcycle.records.manifest import FORMAT, HASHED_WITH, READING

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
NOT_MODEL = (TRAINER_STATE.name, MANIFEST.name)


def hash_model(folder: Path, format: int = FORMAT) -> str:
    """One hash over the files of a model folder that decide what it computes, as manifests of a format have it."""
    return hash_models([folder], format)[0]


def hash_models(folders: Sequence[Path], format: int = FORMAT) -> list[str]:
    """That of each of several folders, in one go."""
    files = [path for folder in folders for path in sorted(folder.iterdir()) if _decides(path, format)]
    title = f"hashing {', '.join(folder.name for folder in folders[:2])}{' ...' * (len(folders) > 2)}"
    found = dict(zip(track(files, title, "files"), hash_files(files, HASHED_WITH[format]), strict=True))
    return [digest({path.name: found[path] for path in files if path.parent == folder}) for folder in folders]


def _decides(path: Path, format: int) -> bool:
    named = path.suffix in MODEL_SUFFIXES and path.name not in NOT_MODEL
    return named and (format < READING or not path.name.startswith("consolidated"))
