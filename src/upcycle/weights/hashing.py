"""The hash of a model folder."""

from collections.abc import Sequence
from pathlib import Path

from upcycle.console import track
from upcycle.disk import digest
from upcycle.hashes import XXH3, hash_files
from upcycle.records.files import MANIFEST, TRAINER_STATE

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
NOT_MODEL = (TRAINER_STATE.name, MANIFEST.name)


def hash_model(folder: Path, algorithm: str = XXH3) -> str:
    """One hash over the files of a model folder that decide what it computes."""
    return hash_models([folder], algorithm)[0]


def hash_models(folders: Sequence[Path], algorithm: str = XXH3, others: bool = False) -> list[str]:
    """That of each of several folders, in one go.

    Args:
        others: count weights for other programs too, as manifests of formats 1 and 2 do.
    """
    files = [path for folder in folders for path in sorted(folder.iterdir()) if _decides(path, others)]
    title = f"hashing {', '.join(folder.name for folder in folders[:2])}{' ...' * (len(folders) > 2)}"
    found = dict(zip(track(files, title, "files"), hash_files(files, algorithm), strict=True))
    return [digest({path.name: found[path] for path in files if path.parent == folder}) for folder in folders]


def _decides(path: Path, others: bool) -> bool:
    named = path.suffix in MODEL_SUFFIXES and path.name not in NOT_MODEL
    return named and (others or not path.name.startswith("consolidated"))
