"""A plain MoE's experts for training: as one grouped product a weight, or one by one on a CPU of few threads.

What is grouped is transformers' own, with less beside it. torch has no autocast rule for grouped products: within
autocast the weights are cast here, as those of linear layers are, else fp32 would be multiplied. Slots are brought into
the order of their experts by a permutation, whose gradient is the inverse one; and of gate and up nothing but the
products themselves is kept.

Legend: T tokens, k experts per token, S = T k slots, H hidden, I channels, J = 2 I, E experts.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from upcycle.experts.lora_ffn import SILU, by_expert, inverse_of
from upcycle.experts.on_cpu import expert_ffns
from upcycle.types import Model

GROUPED = "grouped_mm"
OURS = "upcycle_grouped_mm"
"""Our name among transformers' implementations of experts."""
EXPERTS_PER_THREAD = 4
"""At least, for a CPU to compute experts one by one: with fewer, threads would wait for the longest run."""


def use_own_products(model: Model) -> None:
    """Have a plain MoE's experts computed here; where transformers chose something else than grouped products, no."""
    if getattr(model.config, "_experts_implementation", None) == GROUPED:
        model.set_experts_implementation(OURS)


def _forward(
    experts: nn.Module, hidden: Float[Tensor, "T H"], indices: Int[Tensor, "T k"], weights: Float[Tensor, "T k"]
) -> Float[Tensor, "T H"]:
    dtype = _autocast_dtype(hidden)
    if not _is_plain(experts):
        module = _Cast(experts, dtype) if dtype else experts
        output: Tensor = grouped_mm_experts_forward(module, hidden, indices, weights)
        return output
    up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
    dtype = dtype or up.dtype
    order, ends = by_expert(indices.reshape(-1), len(up))
    one_by_one = hidden.device.type == "cpu" and len(up) >= EXPERTS_PER_THREAD * torch.get_num_threads()
    compute = expert_ffns if one_by_one else grouped_ffns
    with torch.autocast(hidden.device.type, enabled=False):
        mixed = compute(hidden.to(dtype), up.to(dtype), down.to(dtype), weights.to(dtype), order, ends)
        return mixed.to(hidden.dtype)


def grouped_ffns(
    hidden: Float[Tensor, "T H"],
    up: Float[Tensor, "E J H"],
    down: Float[Tensor, "E H I"],
    weights: Float[Tensor, "T k"],
    order: Int[Tensor, " S"],
    ends: Int[Tensor, " E"],
) -> Float[Tensor, "T H"]:
    """What `on_cpu.expert_ffns` computes, by grouped products."""
    inverse = inverse_of(order)
    inputs = _dispatched(hidden, order, inverse, weights.shape[1])
    inner = _gated(torch.nn.functional.grouped_mm(inputs, up.mT, offs=ends))
    outputs = torch.nn.functional.grouped_mm(inner, down.mT, offs=ends)
    return (_permuted(outputs, inverse, order).view(*weights.shape, -1) * weights[:, :, None]).sum(dim=1)


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _is_plain(experts: Any) -> bool:
    """Gate and up side by side, no biases, no norm, all experts here, the usual activation."""
    odd = experts.has_bias or experts.is_transposed or experts.has_post_expert_norm or experts._is_expert_parallel
    usual = experts.has_gate and experts.is_concatenated and isinstance(experts.act_fn, SILU)
    return usual and not odd


class _Cast:
    """A module of experts whose weights are in another dtype; gradients go to the weights themselves."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        self._dtype = dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


def _dispatched(
    hidden: Float[Tensor, "T H"], order: Int[Tensor, " S"], inverse: Int[Tensor, " S"], k: int
) -> Float[Tensor, "S H"]:
    apply: Any = _Dispatch.apply
    slots: Tensor = apply(hidden, order, inverse, k)
    return slots


class _Dispatch(torch.autograd.Function):
    """Each token as often as it has experts, in the order of the slots; the gradient is a gather too, and a sum."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return hidden.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        slots = gradients[0].index_select(0, *ctx.saved_tensors)
        return slots.view(-1, ctx.k, slots.shape[1]).sum(dim=1), None, None, None


def _permuted(rows: Float[Tensor, "S n"], order: Int[Tensor, " S"], inverse: Int[Tensor, " S"]) -> Float[Tensor, "S n"]:
    apply: Any = _Permute.apply
    permuted: Tensor = apply(rows, order, inverse)
    return permuted


class _Permute(torch.autograd.Function):
    """Rows in another order: a gather both ways, where autograd would scatter and add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, *ctx.saved_tensors), None, None


def _gated(both: Float[Tensor, "S J"]) -> Float[Tensor, "S I"]:
    apply: Any = _SwiGlu.apply
    inner: Tensor = apply(both)
    return inner


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up of the two side by side; its gradient is written in its place, and only the input is kept."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gradient = gradients[0]
        gate, up = both.chunk(2, dim=-1)
        result = torch.empty_like(both)
        d_gate, d_up = result.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        torch.mul(gradient, activated, out=d_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=d_gate)
        return result


ALL_EXPERTS_FUNCTIONS.register(OURS, _forward)
