"""The run-time comparison with transformers: a reader that misreads is found, whatever the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import make_dense
from upcycle.architectures.agreement import RUN, RUNS, check_agreement, sample
from upcycle.architectures.check import check
from upcycle.architectures.mapping import with_own_head
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import KINDS
from upcycle.weights import safetensors_io
from upcycle.weights.folders import read_config
from upcycle.weights.safetensors_io import INDEX, SINGLE, ModelReader
from worlds import as_base

LAYER = "model.layers.1."
Misread = Callable[[Callable[[str], Tensor], str], Tensor]
"""(the right reader, a name): a tensor."""


def instead(wrong: dict[str, str]) -> Misread:
    return lambda read, name: read(wrong.get(name, name))


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Misread:
    return lambda read, found: change(read(found)) if found == name else read(found)


GATE, UP = f"{LAYER}mlp.gate_proj.weight", f"{LAYER}mlp.up_proj.weight"
MISREADINGS: dict[str, tuple[Misread, str]] = {
    "gate and up swapped": (instead({GATE: UP, UP: GATE}), "mlp.(gate|up)_proj"),
    "layers swapped": (instead({GATE: GATE.replace("1", "0"), UP: UP.replace("1", "0")}), "mlp.(gate|up)_proj"),
    "transposed": (changed(f"{LAYER}self_attn.q_proj.weight", lambda t: t.T.contiguous()), "q_proj"),
    "rotary halves": (
        changed(f"{LAYER}self_attn.k_proj.weight", lambda t: t.view(2, 2, 4, 32).transpose(1, 2).reshape(16, 32)),
        "k_proj",
    ),
    "rounded": (changed(f"{LAYER}self_attn.v_proj.weight", lambda t: t.bfloat16().float()), "v_proj"),
    "norm plus one": (changed("model.norm.weight", lambda t: t + 1), "norm"),
    "one row late": (changed("model.embed_tokens.weight", lambda t: t.roll(1, 0)), "embed_tokens"),
}


def compare(folder: Path) -> None:
    reader = ModelReader(folder)
    check_agreement(reader, with_own_head(reader, read_config(folder)))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UpcycleError, match=f"{folder.name}: transformers reads {message}"):
        compare(folder)


@pytest.fixture
def dense(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "dense"))


@pytest.mark.parametrize(("misread", "name"), MISREADINGS.values(), ids=MISREADINGS)
def test_a_reader_that_misreads_is_found(
    misread: Misread, name: str, base: Path, checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(base)
    right = ModelReader.elements

    def elements(self: ModelReader, name: str, begin: int = 0, count: int | None = None) -> Tensor:
        whole = misread(lambda n: right(self, n).view(self.spec(n).shape), name).reshape(-1)
        return whole[begin:][:count]

    monkeypatch.setattr(ModelReader, "elements", elements)
    refused(base, rf".*{name}.* as .* at one place, upcycle as .*; the folder would be misread, so it is refused")
    with pytest.raises(UpcycleError, match="transformers reads"):
        check(str(base), 4, 2, "source")
    with pytest.raises(UpcycleError, match="transformers reads"):
        KINDS["ffn"].check_checkpoint(as_base(base), checkpoints[0], checkpoints[0])


def shard(folder: Path, weight_map: Callable[[str], str]) -> dict[str, Tensor]:
    """Replace the single file by shards, one for each name that `weight_map` gives."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = {name: weight_map(name) for name in tensors}
    for file in set(files.values()):
        part = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return tensors


def test_an_older_index_that_is_taken_before_the_file_is_found(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = shard(dense, lambda _: "model-00001-of-00001.safetensors")
    save_file({n: t + 0.1 for n, t in tensors.items()}, dense / SINGLE, metadata={"format": "pt"})
    compare(dense)
    monkeypatch.setattr(safetensors_io, "SINGLE", "no-such-file")
    refused(dense, "model.embed_tokens.weight as .* at one place")


def test_a_tensor_that_two_shards_have_is_read_as_transformers_reads_it(dense: Path) -> None:
    """The index may say what it wants: the last file of those that it names counts."""
    names = ("model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors")
    tensors = shard(dense, lambda name: names["layers.1" in name])
    for file in names:
        part = load_file(dense / file)
        save_file({**part, GATE: tensors[GATE] + len(part)}, dense / file, metadata={"format": "pt"})
    compare(dense)


def test_what_the_configuration_alone_redirects_is_found(dense: Path, tmp_path: Path) -> None:
    """transformers follows fields of config.json to other files."""
    config = json.loads((dense / "config.json").read_text())
    tensors = load_file(dense / SINGLE)
    save_file({n: t + 0.1 for n, t in tensors.items()}, dense / "other.safetensors", metadata={"format": "pt"})
    (dense / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    refused(dense, "model.embed_tokens.weight as .* at one place")
    (dense / "config.4.0.0.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    (dense / "config.json").write_text(json.dumps({**config, "configuration_files": ["config.4.0.0.json"]}))
    refused(dense, "config.json's rms_norm_eps as 0.1, upcycle as 1e-06")


def test_a_head_of_its_own_that_is_not_read_is_found(dense: Path) -> None:
    tensors = load_file(dense / SINGLE)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, dense / SINGLE, {"format": "pt"})
    compare(dense)
    with pytest.raises(UpcycleError, match=r"reads lm_head\.weight as .* at one place, upcycle as"):
        check_agreement(ModelReader(dense), read_config(dense))


def test_a_tensor_that_one_of_them_does_not_know_is_found(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ModelReader.names
    monkeypatch.setattr(ModelReader, "names", lambda self: [n for n in names(self) if n != GATE])
    refused(dense, f"{GATE} as a tensor, upcycle as nothing")


def test_a_folder_that_transformers_cannot_load_is_not_taken(dense: Path) -> None:
    tensors = load_file(dense / SINGLE)
    save_file({**tensors, GATE: tensors[GATE][1:].clone()}, dense / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UpcycleError, match=r"the model in .*dense cannot be loaded: .*mismatched"):
        compare(dense)
    save_file({n: t for n, t in tensors.items() if n != GATE}, dense / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UpcycleError, match=rf"dense: missing keys: \['{GATE}'\]"):
        compare(dense)


def test_weights_of_several_dtypes_agree(tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    tensors = load_file(dense / SINGLE)
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, dense / SINGLE, metadata={"format": "pt"})
    compare(dense)


@pytest.mark.parametrize("count", [1, RUNS * RUN, RUNS * RUN + 1, 100_003])
def test_a_sample_has_the_first_and_the_last_element(count: int) -> None:
    taken = sample(torch.arange(count))
    assert taken.flatten()[0] == 0
    assert count - 1 - taken.max() < RUNS
    assert taken.numel() == min(count, RUNS * RUN)
