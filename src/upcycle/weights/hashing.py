"""The hash of a model folder."""

from pathlib import Path

from upcycle.console import track
from upcycle.disk import XXH3, digest, hash_file
from upcycle.records.files import MANIFEST, TRAINER_STATE

MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
NOT_MODEL = (TRAINER_STATE.name, MANIFEST.name)


def hash_model(folder: Path, algorithm: str = XXH3) -> str:
    """One hash over the files of a model folder that decide what it computes."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in MODEL_SUFFIXES and p.name not in NOT_MODEL)
    return digest({name: hash_file(folder / name, algorithm) for name in track(names, f"hashing {folder.name}")})
