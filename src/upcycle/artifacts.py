"""What stages hand over, and how it is kept safe.

A stage writes into `<stage>.partial/`. When it is done, `manifest.json` (settings, seed, versions, hashes of the
inputs and of every file) is written last and the folder is renamed to `<stage>/`: its presence means complete.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from upcycle.console import say, track
from upcycle.errors import UpcycleError

MANIFEST = "manifest.json"
FORMAT = 1
LIBRARIES = ("upcycle", "torch", "transformers", "trl", "peft", "accelerate", "safetensors", "numpy", "scipy")
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
NOT_MODEL = ("trainer_state.json", MANIFEST)
INPUTS = "inputs.json"
"""Marks a working folder with the inputs of the run that left it."""


@dataclass(frozen=True)
class Manifest:
    """What made a stage folder, and what is in it."""

    stage: str
    inputs: dict[str, str]
    """Name of an input to the hash of its content (settings and seed included)."""
    settings: dict[str, Any]
    seed: int
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    """Relative path to `bytes` and `sha256`."""
    format: int = FORMAT

    @property
    def content(self) -> str:
        """One hash over every file: what the next stage records as its input."""
        return digest({path: entry["sha256"] for path, entry in self.files.items()})


@dataclass(frozen=True)
class Checkpoint:
    """A dense snapshot that becomes an expert."""

    name: str
    path: str
    """A folder: relative to the manifest's for our own, absolute for the user's."""
    epoch: float | None = None
    sha256: str | None = None
    """Hash of a checkpoint of the user's, so that what is built from it notices when it changes in place."""


@dataclass(frozen=True)
class Expert:
    """One row of the expansion plan: a checkpoint, the base itself, or a child of two earlier experts."""

    name: str
    kind: Literal["checkpoint", "base", "child"]
    checkpoint: int | None = None
    """Which of the prepared checkpoints it is."""
    parents: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    similarity: float | None = None
    """How alike the parents were when they were chosen."""


@dataclass(frozen=True)
class ExpansionPlan:
    """How m experts come from n checkpoints; those come first, in order, then the base if it is kept, then children.

    `gram[i][j]` is the inner product of the FFN task vectors of experts i and j (for children: measured, or the
    expectation over DARE's masks, see `expert_expansion.plan`).
    """

    experts: tuple[Expert, ...]
    merge: str
    drop_rate: float
    seed: int
    similarity: str
    gram: tuple[tuple[float, ...], ...]
    adapters: Literal["average", "apart", "product"] | None = None
    """How LoRA experts are merged; None: experts are whole FFNs."""
    perturb: str = "none"
    """How copies are made different (`merging.perturb`), at assembly; `gram` is from before."""
    perturb_rate: float = 0.0
    noise_std: float = 0.0

    @property
    def children(self) -> tuple[Expert, ...]:
        return tuple(expert for expert in self.experts if expert.kind == "child")

    @property
    def sources(self) -> tuple[Expert, ...]:
        """The experts that exist as dense models."""
        return self.experts[: len(self.experts) - len(self.children)]

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "ExpansionPlan":
        values = json.loads(path.read_text())
        experts = tuple(
            Expert(**{**e, "parents": tuple(e["parents"]), "weights": tuple(e["weights"])})
            for e in values.pop("experts")
        )
        return cls(experts=experts, gram=tuple(map(tuple, values.pop("gram"))), **values)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_model(folder: Path) -> str:
    """One hash over the files of a model folder that decide what it computes."""
    names = sorted(p.name for p in folder.iterdir() if p.suffix in MODEL_SUFFIXES and p.name not in NOT_MODEL)
    return digest({name: hash_file(folder / name) for name in track(names, f"hashing {folder.name}")})


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


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a complete stage folder, None if the stage has not been completed.

    Raises:
        UpcycleError: the manifest is there but not readable, or of another format.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise UpcycleError(f"{path} is damaged ({error}); rerun with --update to rebuild the stage") from None
    if manifest.format != FORMAT:
        raise UpcycleError(f"{path} has format {manifest.format}, this version reads {FORMAT}: use a new --run")
    return manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest.

    Raises:
        UpcycleError: names the first file that is missing or differs.
    """
    for name, entry in track(list(manifest.files.items()), f"checking {folder.name}"):
        path = inside(folder, name)
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != entry["bytes"]:
            problem = f"has {path.stat().st_size} bytes, expected {entry['bytes']}"
        elif hash_file(path) != entry["sha256"]:
            problem = "has other content than when it was written"
        else:
            continue
        raise UpcycleError(f"{path} {problem}; restore it, or rerun with --update to rebuild the stage")


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused if the name leads out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UpcycleError(f"'{name}' leads out of {folder}")
    return path


def open_partial(folder: Path, inputs: Mapping[str, str], update: bool) -> Path:
    """The working folder of a stage; what an interrupted run left in it is kept if it had the same inputs.

    Raises:
        UpcycleError: it was left by a run with other inputs. With `update` it is set aside instead.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    stamp = partial / INPUTS
    left = json.loads(stamp.read_text()) if stamp.exists() else {}
    if partial.exists() and left != dict(inputs):
        if not update:
            raise UpcycleError(
                f"{partial} was left by a run with other inputs ({changed_inputs(left, inputs)} changed); rerun with "
                "--update to set it aside and start this stage anew, or go back to those inputs to resume it"
            )
        aside = _unused(partial)
        partial.rename(aside)
        say(f"{partial} was left by a run with other inputs: set aside as {aside.name}")
    partial.mkdir(parents=True, exist_ok=True)
    write_json(stamp, dict(inputs))
    return partial


def seal(partial: Path, folder: Path, inputs: Mapping[str, str], settings: Mapping[str, Any], seed: int) -> Manifest:
    """Write the manifest and rename the working folder to the stage's, replacing an outdated one."""
    files = {str(p.relative_to(partial)): _describe(p) for p in track(_files(partial), f"sealing {folder.name}")}
    manifest = Manifest(folder.name, dict(inputs), dict(settings), seed, library_versions(), files)
    write_json(partial / MANIFEST, asdict(manifest))
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    (folder / INPUTS).unlink()  # until here a killed process leaves a folder that can be resumed
    _sync_folder(folder.parent)
    return manifest


def changed_inputs(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """The names of the inputs that differ."""
    return ", ".join(sorted(name for name in {*old, *new} if old.get(name) != new.get(name))) or "nothing"


def _unused(partial: Path) -> Path:
    numbers = (n for n in range(1, 10**6) if not partial.with_name(f"{partial.name}.old-{n}").exists())
    return partial.with_name(f"{partial.name}.old-{next(numbers)}")


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide a run's bytes."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _files(folder: Path) -> list[Path]:
    own = (folder / MANIFEST, folder / INPUTS)
    return sorted(p for p in folder.rglob("*") if p.is_file() and p not in own)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": hash_file(path)}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
