"""Streaming access to safetensors: read runs of a sharded model, write a sharded model piece by piece.

Reading maps the files; writing knows every name, shape and dtype beforehand, so headers are written first and each
piece goes to its place. Memory is that of the pieces, whatever the model.
"""

import errno
import json
import mmap
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from upcycle.disk import named_inside
from upcycle.errors import UpcycleError
from upcycle.reading import read_json
from upcycle.weights.names import EMBEDDING_NAMES, EMBEDDINGS, HEAD
from upcycle.weights.wrappers import wrapper_in

SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
POINTER = b"version https://git-lfs"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 << 30
MAX_WAITING = 16
"""Pieces that may wait to be written: bounds the memory, whatever the disk does."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


COMPILED = r"_orig_mod\."


def plain_name(name: str) -> str:
    """A tensor's name without what `torch.compile` puts before the names of a module's weights."""
    return re.sub(COMPILED, "", name)


class ModelReader:
    """The tensors of a model folder, single file or sharded, by name; nothing is read before it is used.

    For a multimodal wrapper: the text model's tensors, under their names in a folder of their own.

    Args:
        whole: show a wrapper's file as it is.

    Raises:
        UpcycleError: no weights, a damaged file, an index that names a missing shard or one outside the folder, or
            a tensor of a dtype that is not a plain floating-point one.
    """

    def __init__(self, folder: Path, whole: bool = False) -> None:
        self.folder = folder
        self._where: dict[str, _Mapped] = {}
        self.left_out = 0  # parameters of a wrapper's other parts
        wrapper = None if whole else wrapper_in(folder)
        for path, names in _shards(folder).items():
            found = _map_file(path)
            if lost := sorted(names - found.keys()):
                raise UpcycleError(f"{folder / INDEX} says that {lost[0]} is in {path.name}, which does not have it")
            for name, mapped in found.items():
                plain: str | None = plain_name(name)
                plain = wrapper.text_name(plain) if wrapper and plain else plain
                if plain is None:
                    self.left_out += prod(mapped.spec.shape)
                else:
                    self._where[plain] = mapped
        if not (whole or self._where.keys() & set(EMBEDDING_NAMES)) and HEAD in self._where:
            # tied, and kept under the other of its two names
            self._where[EMBEDDINGS] = self._where[HEAD]

    def names(self) -> list[str]:
        return sorted(self._where)

    @property
    def embeddings(self) -> str:
        """The name of the embeddings."""
        return next((name for name in EMBEDDING_NAMES if name in self._where), EMBEDDINGS)

    @property
    def num_parameters(self) -> int:
        """Entries of all tensors."""
        return sum(prod(self.spec(name).shape) for name in self.names())

    def spec(self, name: str) -> TensorSpec:
        return self._mapped(name).spec

    def elements(self, name: str, begin: int = 0, count: int | None = None) -> Tensor:
        """A flat run of a tensor's elements, as a view of the mapped file: not to be written to."""
        mapped = self._mapped(name)
        dtype, size = mapped.spec.dtype, prod(mapped.spec.shape)
        count = size - begin if count is None else count
        assert 0 <= begin <= begin + count <= size
        if count == 0:
            return torch.empty(0, dtype=dtype)
        offset = mapped.offset + begin * dtype.itemsize
        return torch.frombuffer(mapped.file, dtype=dtype, count=count, offset=offset)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, as a view of the mapped file: not to be written to."""
        return self.elements(name).view(self.spec(name).shape)

    def _mapped(self, name: str) -> "_Mapped":
        if name not in self._where:
            unmerged = f"{name.removesuffix('.weight')}.base_layer.weight" in self._where
            why = "; its adapter was not merged before it was saved: use merge_and_unload" if unmerged else ""
            raise UpcycleError(f"{self.folder} has no tensor {name}{why}")
        return self._where[name]


@dataclass(frozen=True)
class _Mapped:
    """A tensor in a mapped file."""

    spec: TensorSpec
    file: mmap.mmap
    offset: int


def _map_file(path: Path) -> dict[str, _Mapped]:
    try:
        with safe_open(path, framework="pt"):  # checks lengths, overlaps and offsets of the header
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory that it may write to
    except (SafetensorError, OSError, ValueError) as error:
        pointer = "; it is a pointer of Git LFS, not the file: run `git lfs pull`" if _is_pointer(path) else ""
        raise UpcycleError(f"{path} is not a readable safetensors file: {error}{pointer}") from None
    header.pop("__metadata__", None)
    return {name: _entry(path, name, entry, mapped, 8 + length) for name, entry in header.items()}


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def _entry(path: Path, name: str, entry: dict[str, Any], mapped: mmap.mmap, data: int) -> _Mapped:
    code = entry["dtype"]
    if code not in DTYPES:
        what = "a quantized model has to be dequantized first"
        if code in ("BOOL", "I64"):
            what = "it is no weight: load the folder with transformers and save it again, which leaves it out"
        raise UpcycleError(f"{path}: tensor {name} is {code}, expected one of {', '.join(DTYPES)}; {what}")
    return _Mapped(TensorSpec(tuple(entry["shape"]), DTYPES[code]), mapped, data + entry["data_offsets"][0])


def check_one(folder: Path) -> None:
    """Raises UpcycleError for a folder with both a model and an adapter, which transformers would put on its base."""
    if (folder / ADAPTER).is_file() and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        raise UpcycleError(
            f"{folder} holds both a model and an adapter ({ADAPTER}), and transformers would load the adapter on its "
            "own base; if the model has it merged already, remove the adapter's files, else the model's"
        )


INSTEAD = {
    "pytorch_model*.bin": "pickled weights are not read; load the folder once with transformers and save it again",
    "pytorch_model_fsdp*": "shards of FSDP; `accelerate merge-weights` makes one model of them",
    "*.distcp": "shards of a distributed checkpoint; `accelerate merge-weights` makes one model of them",
    "global_step*": "DeepSpeed's own checkpoint; its zero_to_fp32.py makes one model of it",
    "consolidated*.safetensors": "Mistral's own names; take the folder with model.safetensors",
    "*.gguf": "GGUF is not read; take the original model",
    "*.safetensors": f"transformers reads {SINGLE} alone; rename it, if it is the whole model",
}
"""What people have in place of safetensors, to what to do."""


def _instead(folder: Path) -> str:
    there = ((path.name, what) for pattern, what in INSTEAD.items() for path in sorted(folder.glob(pattern)))
    name, what = next(there, ("", ""))
    return f"; there is {name}: {what}" if name else ""


def _shards(folder: Path) -> dict[Path, set[str]]:
    """The files of a model, each with the tensors that the index, if there is one, promises of it."""
    index, single = folder / INDEX, folder / SINGLE
    check_one(folder)
    if single.is_file():  # before an index, as transformers does
        return {single: set()}
    if not index.exists():
        if (folder / ADAPTER).is_file():
            raise UpcycleError(f"{folder} holds an adapter and no model: name the base that it was trained on")
        raise UpcycleError(
            f"{folder} has no {SINGLE} (nor an index of shards): weights must be safetensors{_instead(folder)}"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UpcycleError(f"{index} is not a safetensors index: expected `weight_map`, tensor to file")
    shards: dict[Path, set[str]] = {}
    for name, file in sorted(weight_map.items(), key=lambda entry: entry[1]):  # of a tensor in two, the last counts
        shards.setdefault(named_inside(folder, file), set()).add(name)
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        raise UpcycleError(f"{index} names {missing[0]}, which is not there")
    return shards


class ModelWriter:
    """Writes a model's tensors piece by piece into shards laid out beforehand.

    Use as a context manager; `write` may come in any order and from any thread. A thread of its own hands the pieces to
    the system while the caller computes the next ones; a failed write is raised by a later call or at the end.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES):
        self._folder = folder
        self._specs = dict(specs)
        self._shards = _lay_out(self._specs, max_shard_bytes)
        self._thread = ThreadPoolExecutor(1)  # more at once would spin on the file's lock in the kernel
        self._waiting: deque[Future[None]] = deque()
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, int]] = {}

    def __enter__(self) -> "ModelWriter":
        for number, names in enumerate(self._shards):
            file = (self._folder / _shard_name(number, len(self._shards))).open("wb")
            self._files.append(file)
            offset = _write_header(file, {name: self._specs[name] for name in names})
            for name in names:
                self._places[name] = (file, offset)
                offset += self._specs[name].num_bytes
            file.truncate(offset)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        for file in self._files:
            file.close()
        if kind is None:
            for future in self._waiting:
                future.result()
            if len(self._shards) > 1:
                self._write_index()

    def size(self, name: str) -> int:
        """Entries of a tensor."""
        return prod(self._specs[name].shape)

    def write(self, name: str, piece: Tensor, element: int = 0) -> None:
        """Put a flat piece of a tensor at `element`, converted to the tensor's dtype; it must not change afterwards.

        Raises:
            UpcycleError: a value is too large for float16.
            OSError: an earlier piece could not be written.
        """
        spec = self._specs[name]
        file, offset = self._places[name]
        assert 0 <= element <= prod(spec.shape) - piece.numel()
        values = piece.detach().to("cpu", spec.dtype).contiguous().view(-1)
        if spec.dtype is torch.float16 and not values.isfinite().all():
            raise UpcycleError(f"{name} has values beyond float16; take bfloat16 or float32 (assemble.dtype, --dtype)")
        data = values.view(torch.uint8).numpy().data
        self._waiting.append(self._thread.submit(_pwrite, file, data, offset + element * spec.dtype.itemsize, name))
        while len(self._waiting) > MAX_WAITING:
            self._waiting.popleft().result()

    def _write_index(self) -> None:
        total = sum(spec.num_bytes for spec in self._specs.values())
        weight_map = {
            name: _shard_name(number, len(self._shards)) for number, names in enumerate(self._shards) for name in names
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _pwrite(file: BinaryIO, data: memoryview, offset: int, name: str) -> None:
    left = data.cast("B")
    while left.nbytes:  # Linux takes 2 GiB at once
        written = os.pwrite(file.fileno(), left, offset)
        if not written:
            raise OSError(errno.ENOSPC, f"{left.nbytes} of {data.nbytes} bytes of {name} could not be written")
        left, offset = left[written:], offset + written


def _lay_out(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_header(file: BinaryIO, specs: Mapping[str, TensorSpec]) -> int:
    """The safetensors header: 8 bytes of length, JSON padded to 8; returns where the data begin."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.num_bytes
        entry = {"dtype": DTYPE_CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        header[name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    file.flush()
    return 8 + len(text)


def pieces(count: int, elements: int) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of successive runs of at most `elements`."""
    for begin in range(0, count, elements):
        yield begin, min(elements, count - begin)
