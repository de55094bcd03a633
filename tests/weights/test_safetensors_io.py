"""Streaming reads and writes against the safetensors library's own."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from upcycle.errors import UpcycleError
from upcycle.weights.folders import read_config
from upcycle.weights.safetensors_io import INDEX, ModelReader, ModelWriter, TensorSpec, pieces
from worlds import make_adapter

TENSORS = {
    "a": torch.arange(24.0).view(6, 4),
    "b": torch.arange(5.0).bfloat16(),
    "c": torch.arange(12.0).half().view(3, 2, 2),
}
SPECS = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


@pytest.mark.parametrize("max_shard_bytes", [1 << 20, 100, 1])
def test_pieces_written_in_any_order_make_the_tensors(max_shard_bytes: int, tmp_path: Path) -> None:
    with ModelWriter(tmp_path, SPECS, max_shard_bytes) as writer:
        for name in reversed(TENSORS):
            for begin, count in reversed(list(pieces(TENSORS[name].numel(), 3))):
                writer.write(name, TENSORS[name].view(-1)[begin : begin + count].float(), begin)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {1 << 20: 1, 100: 2, 1: 3}[max_shard_bytes]
    merged = {k: v for file in files for k, v in load_file(file).items()}
    assert all(torch.equal(merged[name], tensor) for name, tensor in TENSORS.items())
    reader = ModelReader(tmp_path)
    assert reader.names() == ["a", "b", "c"]
    assert reader.spec("c") == SPECS["c"]
    assert torch.equal(reader.elements("a", 2, 9), TENSORS["a"].view(-1)[2:11])


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"no model\.safetensors"):
        ModelReader(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-8])
    with pytest.raises(UpcycleError, match=r"model\.safetensors is not a readable safetensors file"):
        ModelReader(tmp_path)


@pytest.mark.parametrize(
    ("shard", "message"), [("gone.safetensors", "which is not there"), ("../out.safetensors", "leads out of")]
)
def test_an_index_cannot_name_what_is_missing_or_outside(shard: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "out.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(UpcycleError, match=message):
        ModelReader(folder)


def test_an_index_that_promises_a_tensor_too_many_and_a_quantized_tensor_are_named(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "z": "one.safetensors"}}))
    with pytest.raises(UpcycleError, match=r"says that z is in one\.safetensors, which does not have it"):
        ModelReader(tmp_path)
    save_file({"q": torch.ones(3, dtype=torch.int8)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).unlink()
    (tmp_path / "one.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(UpcycleError, match=r"tensor q is I8, expected one of .* has to be dequantized"):
        ModelReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]"])
def test_garbage_is_not_a_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UpcycleError, match="is not a readable safetensors file"):
        ModelReader(tmp_path)


def test_a_value_beyond_float16_is_named(tmp_path: Path) -> None:
    specs = {"a": TensorSpec((2,), torch.float16)}
    with pytest.raises(UpcycleError, match="a has values beyond float16"), ModelWriter(tmp_path, specs) as writer:
        writer.write("a", torch.tensor([1.0, 1e6]))


def test_a_write_that_fails_in_the_background_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter((3, 0))
    monkeypatch.setattr("os.pwrite", lambda *_: next(taken))
    specs = {"a": TensorSpec((2,), torch.float32)}
    said = "5 of 8 bytes of a could not be written"
    with pytest.raises(OSError, match=said), ModelWriter(tmp_path, specs) as writer:
        writer.write("a", torch.ones(2))


def test_what_the_system_takes_in_parts_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux writes 2 GiB at once."""
    real = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda file, data, offset: real(file, data[:3], offset))
    values = torch.arange(20.0).reshape(4, 5)
    with ModelWriter(tmp_path, {"a": TensorSpec((4, 5), torch.float32)}) as writer:
        writer.write("a", values)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], values)


def test_an_adapter_is_no_base(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter", 1)
    for read in (ModelReader, read_config):
        with pytest.raises(UpcycleError, match=r"adapter.* an adapter.*: name the base that it was trained on"):
            read(adapter)
