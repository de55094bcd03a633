"""Models that fit on no single device: each process holds its part of every weight (FSDP2, expert parallelism).

transformers shards a model as it is loaded; here are the questions that others ask of such a model, and its optimizer
on disk.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from upcycle.distributed.world import rank, world_size
from upcycle.errors import UpcycleError

OPTIMIZER = "optimizer_shards"
"""Folder of a checkpoint."""


def placement(fsdp: int, ep: int, replicate: int) -> dict[str, Any]:
    """What from_pretrained takes to shard a model; nothing where there is nothing to shard.

    On an accelerator weights are gathered and multiplied in bf16, and kept in what they are loaded in.
    """
    if fsdp == 1:
        return {}
    from transformers.distributed import DistributedConfig

    quick = torch.accelerator.is_available()
    config = DistributedConfig(fsdp_size=fsdp, ep_size=ep, dp_replicate_size=replicate, fsdp_mixed_precision=quick)
    return {"distributed_config": config}


def is_sharded(model: Any) -> bool:
    """Whether each process has a part of the model alone."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds; all of a tensor that is not sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; all of them must come."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


@torch.no_grad()
def put(parameter: Any, values: Tensor) -> None:
    """Give a parameter, sharded or not, values that every process has."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(parameter), parameter.device_mesh, parameter.placements)
    parameter.copy_(values)


def reshard(model: nn.Module) -> None:
    """After a forward pass alone, which leaves the outermost weights gathered: what is saved next would lack them."""
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def take_over(model: nn.Module, other: nn.Module) -> None:
    """The weights of another model that is sharded in the same way."""
    with torch.no_grad():
        for (name, own), (found, given) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert name == found
            local(own).copy_(local(given))


def save_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Write this process's part of the optimizer's state, as safetensors; every process must come."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        f"{name}/{key}": torch.as_tensor(local(value) if isinstance(value, Tensor) else value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    save_file(
        {name: part.detach().cpu().contiguous() for name, part in parts.items()}, _part(folder, rank(), world_size())
    )


def check_resumable(checkpoint: Path, sharded: bool) -> None:
    """Before any training: an optimizer in parts is that of as many processes, divided in the same way.

    Raises:
        UpcycleError: names the checkpoint, and how it was written.
    """
    parts = len(list((checkpoint / OPTIMIZER).glob("*.safetensors")))
    if parts == (world_size() if sharded else 0):
        return
    written = f"by {parts} processes, each with a part of the model (devices.fsdp)" if parts else "without devices.fsdp"
    raise UpcycleError(
        f"{checkpoint} was written {written}, and its optimizer state cannot be divided differently; continue with "
        "the same setup, or remove the folder to train this stage again"
    )


def load_optimizer(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Read what `save_optimizer` wrote."""
    parameters = dict(model.named_parameters())
    for place, value in load_file(_part(folder, rank(), world_size())).items():
        name, _, key = place.rpartition("/")
        optimizer.state[parameters[name]][key] = _like(parameters[name], value)


def _part(folder: Path, number: int, count: int) -> Path:
    return folder / f"{number:05d}-of-{count:05d}.safetensors"


def _like(parameter: Any, value: Tensor) -> Tensor:
    """State of a parameter's own shape is sharded as it is; a count of steps is not."""
    part = local(parameter)
    if value.shape != part.shape:
        return value
    if not hasattr(parameter, "device_mesh"):
        return value.to(part.device)
    from torch.distributed.tensor import DTensor

    more: Mapping[str, Any] = {"run_check": False, "shape": parameter.shape, "stride": parameter.stride()}
    made: Tensor = DTensor.from_local(value.to(part.device), parameter.device_mesh, parameter.placements, **more)
    return made
