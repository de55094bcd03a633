"""What made a stage's folder, and what is in it."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from upcycle.disk import digest
from upcycle.records.record import Count, Record, Sha256

FORMAT = 1
LIBRARIES = ("upcycle", "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "numpy", "scipy")


class WrittenFile(Record):
    """A file as it was when its stage was sealed."""

    bytes: Count
    sha256: Sha256


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
    def content(self) -> str:
        """One hash over every file: what the next stage records as its input."""
        return digest({path: entry.sha256 for path, entry in self.files.items()})


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide a run's bytes."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
