"""The kinds of experts, a row each; and models and folders of any kind."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from upcycle.distributed.device import compute_dtype, is_spread, pick_device, sees_several
from upcycle.distributed.shards import placement, put
from upcycle.errors import UpcycleError
from upcycle.experts.adapter_files import base_of, is_adapter, read_adapter_config
from upcycle.experts.bottleneck import BOTTLENECK
from upcycle.experts.ffn import FFN, FULL, fix_constants
from upcycle.experts.grouped import use_own_products
from upcycle.experts.kind import Kind, Load
from upcycle.experts.lora import ADAPTER, LORA
from upcycle.experts.mixture import mixture_of
from upcycle.records.files import LINEAGE
from upcycle.routing.routers import freeze, num_slices, router_modules, routing_vectors
from upcycle.settings import DevicesSettings
from upcycle.types import Model
from upcycle.weights.safetensors_io import ModelReader

KINDS: dict[str, Kind] = {"ffn": FFN, "full": FULL, "lora": LORA, "bottleneck": BOTTLENECK}
"""`prepare.train` to its row."""


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model of any kind."""
    return is_adapter(folder) or (folder / "config.json").is_file()


def kind_in(folder: Path) -> Kind:
    """The kind that a model folder is of; an adapter of PEFT's that no row names is loaded as a LoRA adapter is."""
    if not is_adapter(folder):
        return FFN
    peft_type = read_adapter_config(folder).get("peft_type")
    return next((kind for kind in KINDS.values() if peft_type in kind.peft_types), LORA)


def base_in(folder: Path, base: Path | None = None) -> list[Path]:
    """The dense model that a folder's adapters add to (`base_of`); of a plain model none."""
    return [base_of(folder, base)] if is_adapter(folder) else []


def kind_of(model: Model) -> Kind:
    """The kind that a model in memory is of: one of PEFT's, a mixture's, or that of plain models."""
    if hasattr(model, "peft_config"):
        return ADAPTER
    mixture = mixture_of(model)
    return FFN if mixture is None else next(k for k in KINDS.values() if mixture.peft_type in k.peft_types)


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    base: Path | None = None,
    four_bit: bool = False,
    where: Mapping[str, Any] | None = None,
) -> Model:
    """A causal language model of any kind, in evaluation mode; never unpickles, runs no remote code.

    Args:
        base: the dense model of adapters; none given: the one that they name.
        four_bit: quantize the dense model of adapters.
        where: from_pretrained's `distributed_config` or `device_map`, instead of `device`.

    Raises:
        UpcycleError: keys are missing or left over, so the model would be partly random.
    """
    model = kind_in(folder).load(Load(folder, dtype, torch.device(device), base, four_bit, where or {}))
    lineage = LINEAGE.known(folder)
    model.granularity = lineage.granularity if lineage else 1
    if num_slices(model) % model.granularity:
        raise UpcycleError(
            f"{folder / LINEAGE.name}: granularity is {model.granularity}, which does not divide the model's "
            f"{num_slices(model)} experts; restore the file, or remove it"
        )
    return model


def must_spread(folders: Iterable[Path], base: Path) -> bool:
    """Whether one of these models is too large for one device, so that one process has to use several."""
    if not sees_several():
        return False  # and no file need be read
    return any(is_spread(ModelReader(base if is_adapter(folder) else folder).num_parameters) for folder in folders)


def load_for_scoring(folder: Path, base: Path | None, exact: bool = False) -> Model:
    """A model of any kind in the device's own dtype; over all devices if one is too small.

    Args:
        exact: in fp32: it is trained or written.
    """
    device = pick_device()
    where = {"device_map": "auto"} if must_spread([folder], base or folder) else {}
    dtype = torch.float32 if exact else compute_dtype(device)
    return load_model(folder, dtype, device, base, where=where)


def load_for_training(folder: Path, base: Path, four_bit: bool, fixed: str, devices: DevicesSettings) -> Model:
    """A MoE, in training mode; what trains is in fp32, what does not in the device's own dtype.

    Args:
        devices: how it is divided among processes; experts of adapters have no shards of their own.
        fixed: one of `routing.routers.parts` that is left as it is besides what the kind leaves, or `none`.
    """
    kind = kind_in(folder)
    dtype = compute_dtype(pick_device()) if kind.frozen else torch.float32
    where = placement(devices.fsdp, 1 if kind.frozen else devices.ep, devices.replicate)
    model = load_model(folder, dtype, base=base, four_bit=four_bit, where=where).train()
    freeze(model, {fixed, *kind.frozen})
    if not kind.frozen:
        fix_constants(model)
    if not where:  # shards are gathered in the dtype that they are multiplied in
        use_own_products(model)
    return model


def save_model(model: Model, folder: Path, initial: Path) -> None:
    """Write a trained MoE as a standalone folder like the `initial` one."""
    kind_of(model).save(model, folder, initial)


def trained_parameters(model: Model) -> int:
    """Parameters that post-training writes: all, or those that are not always frozen."""
    frozen = kind_of(model).frozen
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not frozen)


def router_keys(model: Model) -> list[str]:
    """The name on disk of every layer's routing vectors."""
    return kind_of(model).router_keys(model)


def load_routers(model: Model, path: Path) -> None:
    """Put the routing vectors of a router file into the model."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, router in zip(router_keys(model), router_modules(model), strict=True):
            put(routing_vectors(router), tensors[name])
