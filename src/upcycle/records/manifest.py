"""What made a stage's folder, and what is in it."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from upcycle.disk import digest
from upcycle.hashes import SHA256, XXH3
from upcycle.records.record import Count, Record, Sha256, Xxh3, optional

HASHED_WITH = {1: SHA256, 2: XXH3, 3: XXH3}
"""The hash of files, by the format of the manifest."""
FORMAT = 3
READING = 3
"""The format from which on questions leave system messages out, and models weights for other programs."""
ROWS = 4
"""Raised where the same rows are read or split in another way."""
LIBRARIES = ("upcycle", "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "numpy", "scipy")


class WrittenFile(Record):
    """A file as it was when its stage was sealed."""

    bytes: Count
    sha256: Sha256 | None = optional()
    """In manifests of format 1."""
    xxh3_128: Xxh3 | None = optional()

    @property
    def hash(self) -> str | None:
        return self.sha256 or self.xxh3_128


class Manifest(Record):
    """Written last into a stage's folder: its presence means complete."""

    stage: str
    inputs: dict[str, str]
    """Name of an input to the hash of its content (settings and seed included)."""
    settings: dict[str, Any]
    seed: Count
    versions: dict[str, str]
    files: dict[str, WrittenFile]
    """By path, relative to the folder."""
    format: int = FORMAT

    @property
    def algorithm(self) -> str:
        """What the files, and the models among the inputs, were hashed with."""
        return HASHED_WITH.get(self.format, XXH3)

    @property
    def content(self) -> str:
        """One hash over every file: what the next stage records as its input."""
        return digest({path: entry.hash for path, entry in self.files.items()})


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide a run's bytes."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
