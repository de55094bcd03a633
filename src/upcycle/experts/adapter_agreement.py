"""Do we read from an adapter's folder what PEFT reads there? The truth is PEFT's own loading, on the base as it is."""

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from upcycle.architectures.agreement import compare_tensors, main_dtype, otherwise
from upcycle.errors import UpcycleError
from upcycle.experts.adapter_files import PREFIX, merged_weight
from upcycle.experts.linears import weights_in
from upcycle.merging.low_rank import LowRank
from upcycle.types import Model
from upcycle.weights.folders import load_dense
from upcycle.weights.safetensors_io import COMPILED, ModelReader

NAME = "default"
"""What PEFT calls an adapter that is not given a name."""
WRITTEN_OTHERWISE = {COMPILED: "", rf"\.{NAME}\.weight$": ".weight"}
"""What `torch.compile` and plain state dictionaries add to the names that PEFT looks for."""
TOLERANCE = 1e-5
"""Of the largest entry of B A: fp32 rounding is 1e-7."""


def load_adapted(base: Path, folder: Path, dtype: torch.dtype) -> Model:
    """PEFT's model of an adapter on the CPU, not merged."""
    from peft import PeftModel

    dense = load_dense(base, dtype)
    adapted: Model = PeftModel.from_pretrained(dense, str(folder), torch_device="cpu", key_mapping=WRITTEN_OTHERWISE)
    return adapted


def check_adapter_agreement(base: Path, folder: Path, updates: dict[str, LowRank]) -> None:
    """Compare an adapter, as it is read here, with the model that PEFT makes of it.

    All factors and scalings, the product of the first and the last weight, and that the base is left as it is.

    Args:
        updates: what `read_adapter` gives.

    Raises:
        UpcycleError: names the folder and what PEFT reads otherwise, or says why PEFT cannot load it.
    """
    reader = ModelReader(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the file does not have; that is compared
        try:
            model = load_adapted(base, folder, main_dtype(reader))
        except UpcycleError:
            raise
        except Exception as error:  # wrong fields and shapes surface as several kinds
            raise UpcycleError(f"{folder} cannot be loaded by PEFT, so it is refused: {error}") from None
    state = {name.removeprefix(PREFIX): tensor for name, tensor in model.state_dict().items()}
    linears = _by_linear(updates, reader)
    for name, update in linears.items():
        for factor, ours in (("A", update.a), ("B", update.b)):
            theirs = state.pop(f"{name}.lora_{factor}.{NAME}.weight", None)
            if theirs is None:
                raise _otherwise(folder, f"{name}.lora_{factor}", "nothing", "a tensor")
            compare_tensors(folder, f"{name}.lora_{factor}", theirs, ours, "PEFT")
        scaling = model.get_submodule(PREFIX + name).scaling[NAME]
        if abs(scaling - update.scaling) > TOLERANCE * abs(scaling):
            raise _otherwise(folder, f"the scaling of {name}", f"{scaling:.6g}", f"{update.scaling:.6g}")
        weight = reader.tensor(f"{name}.weight")
        compare_tensors(folder, f"the base's {name}.weight", state.pop(f"{name}.base_layer.weight"), weight, "PEFT")
    for name in sorted(linears)[:: max(1, len(linears) - 1)]:
        _compare_products(folder, name, model.get_submodule(PREFIX + name).get_delta_weight(NAME), linears[name])
    _check_rest(folder, state)


def _by_linear(updates: dict[str, LowRank], base: ModelReader) -> dict[str, LowRank]:
    """The updates of the base's linear layers, from those of the weights in them."""
    found: dict[str, LowRank] = {}
    for linear in (name.removesuffix(".weight") for name in base.names()):
        if parts := [updates[weight] for weight in weights_in(linear) if weight in updates]:
            found[linear] = replace(parts[0], b=torch.cat([part.b for part in parts]))
    return found


def _compare_products(folder: Path, name: str, theirs: Tensor, update: LowRank) -> None:
    ours = merged_weight(torch.zeros(theirs.shape), update)
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    if not difference <= TOLERANCE:
        raise _otherwise(
            folder, f"what is added to {name}", "one product", f"another ({difference:.1e} of its largest)"
        )


def _check_rest(folder: Path, state: dict[str, Tensor]) -> None:
    """Of what PEFT has besides, nothing may change the model: an adapter that its file leaves out starts with B = 0."""
    for name, tensor in state.items():
        if f".{NAME}" in name and not name.endswith(f".lora_A.{NAME}.weight") and tensor.any():
            raise _otherwise(folder, name, "a tensor", "nothing")


def _otherwise(folder: Path, what: str, theirs: str, ours: str) -> UpcycleError:
    return otherwise(folder, what, theirs, ours, "PEFT")
