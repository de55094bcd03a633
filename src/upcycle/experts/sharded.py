"""A sharded model as a plain folder, a layer at a time: no process ever holds all of it."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from upcycle.distributed.shards import whole
from upcycle.distributed.world import is_main, wait
from upcycle.types import Model
from upcycle.weights.safetensors_io import ModelWriter, TensorSpec

LAYER = re.compile(r"\.layers\.\d+\.")


def write_plain(model: Model, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights under the names that `save_pretrained` gives them. Every process must come.

    The first process has one layer at a time, whole, and writes it.
    """
    empty = {name: torch.empty(tensor.shape, device="meta") for name, tensor in _tensors(model)}
    specs = {name: TensorSpec(tuple(t.shape), dtype) for name, t in revert_weight_conversion(model, empty).items()}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(model):
        layer = LAYER.search(name)
        groups.setdefault(layer[0] if layer else "", {})[name] = tensor
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    with ModelWriter(folder, specs) if is_main() else nullcontext() as writer:
        for tensors in groups.values():
            complete = {name: whole(tensor) for name, tensor in tensors.items()}
            if writer is not None:
                for name, tensor in revert_weight_conversion(model, complete).items():
                    writer.write(name, tensor.reshape(-1))
    wait()


def save_checkpoint(model: Model, folder: Path) -> None:
    """What a resume needs of the model, which others can read too. Every process must come."""
    write_plain(model, folder, torch.float32)
    if is_main():
        model.config.save_pretrained(folder)


def _tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """What is stored: tied weights once."""
    return ((name, parameter.data) for name, parameter in model.named_parameters())
