"""Experts multiply in autocast's dtype, as linear layers do: torch has no autocast rule for grouped products."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from upcycle.types import Model

GROUPED = "grouped_mm"
AUTOCAST = "upcycle_autocast_grouped_mm"
"""Our name among transformers' implementations of experts."""


class _Cast:
    """A module of experts whose weights are in another dtype; gradients go to the weights themselves."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def _forward(experts: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """transformers' grouped products; within autocast the weights are cast first, else fp32 would be multiplied."""
    device = hidden.device.type
    module = _Cast(experts, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else experts
    output: Tensor = grouped_mm_experts_forward(module, hidden, indices, weights)
    return output


ALL_EXPERTS_FUNCTIONS.register(AUTOCAST, _forward)


def follow_autocast(model: Model) -> None:
    """Have a plain MoE's experts follow autocast; where transformers chose something else than grouped products, no."""
    if getattr(model.config, "_experts_implementation", None) == GROUPED:
        model.set_experts_implementation(AUTOCAST)
