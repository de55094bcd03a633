"""A model folder in another dtype."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from upcycle.reading import read_json
from upcycle.weights.folders import copy_files, require_space, write_config
from upcycle.weights.safetensors_io import INDEX, ModelReader, ModelWriter, TensorSpec, pieces
from upcycle.weights.streaming import PIECE, map_tensors

DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Of a configuration and of the parts in it."""


def cast_model(source: Path, target: Path, dtype: torch.dtype, leave: tuple[str, ...] = ()) -> None:
    """Write a plain model folder's tensors in another dtype and copy what is beside them; in pieces, as assembly does.

    Args:
        leave: names of files that are not copied.

    Raises:
        UpcycleError: not enough disk space, or values too large for float16.
    """
    reader = ModelReader(source, whole=True)
    specs = {name: TensorSpec(reader.spec(name).shape, dtype) for name in reader.names()}
    require_space(target, sum(spec.num_bytes for spec in specs.values()), "the model", "or leave --dtype out")
    with ModelWriter(target, specs) as writer:
        map_tensors(partial(_cast, reader, writer), reader.names(), "export: tensors")
    config = read_json(source / "config.json")
    write_config(target, _with_dtype(config, str(dtype).removeprefix("torch.")))
    weights = {path.name for path in source.glob("*.safetensors")}
    beside = {path.name for path in source.iterdir()} - weights - {INDEX, "config.json", *leave}
    copy_files(source, target, sorted(beside))


def _cast(reader: ModelReader, writer: ModelWriter, name: str) -> None:
    for begin, count in pieces(writer.size(name), PIECE):
        writer.write(name, reader.elements(name, begin, count), begin)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        name: dtype if name in DTYPE_FIELDS else _with_dtype(value, dtype) if isinstance(value, dict) else value
        for name, value in config.items()
    }
