"""Manifests: how files are hashed, also in folders that an earlier version began."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from upcycle.disk import digest
from upcycle.errors import UpcycleError
from upcycle.pipeline.manifest import open_partial, read_manifest, seal, verified
from upcycle.pipeline.run import Run
from upcycle.recipe import Recipe
from upcycle.records.files import MANIFEST
from upcycle.records.manifest import FORMAT
from upcycle.weights.hashing import hash_model

CONTENT = bytes(range(256)) * 10_000  # more than one block


def sealed(folder: Path, **options: int) -> Path:
    partial = open_partial(folder, {}, update=False)
    (partial / "weights").write_bytes(CONTENT)
    seal(partial, folder, {}, {}, 0, **options)
    return folder


def test_whoever_may_read_a_stage_may_read_its_weights(tmp_path: Path) -> None:
    partial = open_partial(tmp_path / "prepare", {}, update=False)
    save_file({"a": torch.zeros(3)}, partial / "model.safetensors")
    (partial / "model.safetensors").chmod(0o600)
    seal(partial, tmp_path / "prepare", {}, {}, 0)
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "prepare").iterdir()}
    assert len(modes) > 1
    assert len(set(modes.values())) == 1


@pytest.mark.parametrize(
    ("format", "field", "expected"),
    [
        (1, "sha256", hashlib.sha256(CONTENT).hexdigest()),
        (FORMAT, "xxh3_128", xxhash.xxh3_128(CONTENT).hexdigest()),
    ],
)
def test_files_are_hashed_as_the_format_says(format: int, field: str, expected: str, tmp_path: Path) -> None:
    folder = sealed(tmp_path / "prepare", format=format)
    written = json.loads((folder / MANIFEST.name).read_text())
    assert written["format"] == format
    assert written["files"] == {"weights": {"bytes": len(CONTENT), field: expected}}
    assert verified(folder) is not None
    flipped = bytearray(CONTENT)
    flipped[-1] ^= 1
    (folder / "weights").write_bytes(flipped)
    with pytest.raises(UpcycleError, match="weights has other content than when it was written"):
        verified(folder)


def test_a_run_goes_on_with_the_hashes_that_it_began_with(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    new, old = Run(recipe, tmp_path / "new"), Run(recipe, tmp_path / "old")
    old.folder.mkdir()
    sealed(old.folder / "prepare", format=1)
    assert (new.format, old.format) == (FORMAT, 1)
    names = sorted(p.name for p in base.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    expected = digest({name: hashlib.sha256((base / name).read_bytes()).hexdigest() for name in names})
    assert old.base_hash == expected
    assert new.base_hash == hash_model(base) != expected
    (old.folder / "prepare" / MANIFEST.name).write_text("{")
    assert Run(recipe, old.folder).format == FORMAT  # it is made anew with --update


def test_weights_for_other_programs_decide_nothing_but_in_earlier_formats(base: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(base, tmp_path / "both"))
    (both / "consolidated.safetensors").write_bytes(b"x")
    assert hash_model(both) == hash_model(base)
    assert hash_model(both, 2) != hash_model(base, 2) == hash_model(base)


def test_another_format_is_named(tmp_path: Path) -> None:
    folder = sealed(tmp_path / "prepare")
    values = json.loads((folder / MANIFEST.name).read_text())
    (folder / MANIFEST.name).write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(UpcycleError, match=r"has format 99, this version reads 1 to 3: use a new --run"):
        read_manifest(folder)
