"""The FFN block of a mixture of LoRA experts at nearly the price of a dense one.

Expert e is the FFN with weights W + B_e A_e (scaling included in B). For the k experts of a token x with weights w,

    g_e = W_gate x + B_e A_e x,   u_e = W_up x + B_e A_e x,   h_e = act(g_e) * u_e      (first terms once per token)
    y = W_down sum_e w_e h_e  +  sum_e w_e B_e A_e h_e                                  (one down projection)

The products with W stay outside, ordinary linear layers. What is here, from their outputs to the inputs of the last
line, keeps only W_gate x and W_up x for the backward pass, less than a dense FFN does, and makes the rest again.

Legend: T tokens, k experts per token, N = T k slots (a token at one of its experts), E experts, H hidden,
I intermediate size, r rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 128
"""Slots that a CPU takes at once: their (BLOCK, I) intermediates stay in its cache."""


@dataclass(frozen=True)
class Factors:
    """Low-rank parts of all experts, scaling included."""

    a_in: Float[Tensor, "E 2r H"]
    """A of gate and, below it, of up."""
    b_gate: Float[Tensor, "E I r"]
    b_up: Float[Tensor, "E I r"]
    a_down: Float[Tensor, "E r I"]
    b_down: Float[Tensor, "E H r"]


@dataclass(frozen=True)
class Slots:
    """The slots sorted by expert."""

    order: Int[Tensor, " N"]
    """Their places in the flattened (T, k)."""
    tokens: Int[Tensor, " N"]
    ends: Int[Tensor, " E"]
    """Where each expert's run ends."""

    @classmethod
    def of(cls, experts: Int[Tensor, "T k"], num_experts: int) -> "Slots":
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        return cls(order, order // experts.shape[1], flat.bincount(minlength=num_experts).cumsum(0))

    def blocks(self, grouped: bool) -> Iterator["Block"]:
        """All slots at once for grouped products, or runs of one expert that fit a cache."""
        if grouped:
            yield Block(slice(None), self.tokens, None, self.ends.int())
            return
        begin = 0
        for expert, end in enumerate(self.ends.tolist()):
            for first in range(begin, end, BLOCK):
                rows = slice(first, min(end, first + BLOCK))
                yield Block(rows, self.tokens[rows], expert, self.ends)
            begin = end


@dataclass(frozen=True)
class Block:
    """Slots that are computed together: of one expert, or of all (expert None)."""

    rows: slice
    tokens: Int[Tensor, " n"]
    expert: int | None
    ends: Int[Tensor, " E"]

    def product(self, values: Float[Tensor, "n i"], matrices: Float[Tensor, "E i o"]) -> Float[Tensor, "n o"]:
        """Each slot's values times the matrix of its expert."""
        if self.expert is None:
            return torch.nn.functional.grouped_mm(values, matrices, offs=self.ends)
        return values @ matrices[self.expert]

    def add_product(self, total: Tensor, values: Float[Tensor, "n i"], matrices: Float[Tensor, "E i o"]) -> Tensor:
        """`product` added to `total` (n, o) in place."""
        if self.expert is None:
            return total.add_(self.product(values, matrices))
        return total.addmm_(values, matrices[self.expert])

    def add_outer(self, total: Float[Tensor, "E i o"], left: Float[Tensor, "n i"], right: Float[Tensor, "n o"]) -> None:
        """left^T right of each expert's slots added to its matrix: the gradient of `product`."""
        if self.expert is None:
            total.add_(torch.nn.functional.grouped_mm(left.mT, right, offs=self.ends))
        else:
            total[self.expert].addmm_(left.T, right)


def mix(
    x: Float[Tensor, "T H"],
    gate: Float[Tensor, "T I"],
    up: Float[Tensor, "T I"],
    weights: Float[Tensor, "T k"],
    experts: Int[Tensor, "T k"],
    factors: Factors,
    act: Callable[[Tensor], Tensor],
    grouped: bool | None = None,
) -> tuple[Float[Tensor, "T I"], Float[Tensor, "T H"]]:
    """(sum_e w_e h_e, sum_e w_e B_e A_e h_e): what the down projection reads, and what is added to its output.

    Args:
        gate, up: W_gate x and W_up x.
        grouped: one grouped product over all experts (default on an accelerator), or blocks that fit a CPU's cache.
    """
    grouped = x.device.type != "cpu" if grouped is None else grouped
    dtype = gate.dtype
    low_rank = [matrix.to(dtype) for matrix in vars(factors).values()]
    with torch.autocast(x.device.type, enabled=False):
        apply: Any = _Mix.apply
        mixed, low = apply(x.to(dtype), gate, up, weights.to(dtype), experts, act, grouped, *low_rank)
    return mixed, low


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        up: Tensor,
        weights: Tensor,
        experts: Tensor,
        act: Callable[[Tensor], Tensor],
        grouped: bool,
        *low_rank: Tensor,
    ) -> tuple[Tensor, Tensor]:
        slots, f = Slots.of(experts, len(low_rank[0])), Factors(*low_rank)
        sorted_weights = weights.reshape(-1)[slots.order, None]
        rank = f.a_down.shape[1]
        z_in, z_down = x.new_empty(len(slots.order), 2 * rank), x.new_empty(len(slots.order), rank)
        mixed, low = torch.zeros_like(gate), torch.zeros_like(x)
        for block in slots.blocks(grouped):
            rows, tokens = block.rows, block.tokens
            z_in[rows] = block.product(x.index_select(0, tokens), f.a_in.mT)
            g, u = _inputs(block, z_in[rows], gate, up, f)
            hidden = act(g).mul_(u)
            z_down[rows] = block.product(hidden, f.a_down.mT)
            w = sorted_weights[rows]
            mixed.index_add_(0, tokens, hidden.mul_(w))
            low.index_add_(0, tokens, block.product(z_down[rows] * w, f.b_down.mT))
        ctx.save_for_backward(x, gate, up, sorted_weights, z_in, z_down, *vars(slots).values(), *low_rank)
        ctx.act, ctx.grouped, ctx.shape = act, grouped, weights.shape
        return mixed, low

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_mixed, d_low = gradients
        x, gate, up, sorted_weights, z_in, z_down, order, tokens, ends, *low_rank = ctx.saved_tensors
        slots, f = Slots(order, tokens, ends), Factors(*low_rank)
        rank = f.a_down.shape[1]
        d_x, d_gate, d_up = torch.zeros_like(x), torch.zeros_like(gate), torch.zeros_like(up)
        d_weights = torch.empty_like(sorted_weights)
        d = Factors(*(torch.zeros_like(matrix) for matrix in low_rank)) if any(ctx.needs_input_grad[7:]) else None
        for block in slots.blocks(ctx.grouped):
            rows, tokens = block.rows, block.tokens
            z, zd, w = z_in[rows], z_down[rows], sorted_weights[rows]
            g, u = _inputs(block, z, gate, up, f)
            with torch.enable_grad():
                activated = ctx.act(g.requires_grad_())
            hidden = activated.detach() * u
            d_hidden, d_out = d_mixed.index_select(0, tokens), d_low.index_select(0, tokens)
            d_zd = block.product(d_out, f.b_down)
            d_weights[rows] = (d_hidden * hidden).sum(1, keepdim=True) + (d_zd * zd).sum(1, keepdim=True)
            d_zd.mul_(w)
            block.add_product(d_hidden.mul_(w), d_zd, f.a_down)
            d_u = d_hidden * activated.detach()
            (d_g,) = torch.autograd.grad(activated, g, d_hidden.mul_(u))
            d_z = torch.cat([block.product(d_g, f.b_gate), block.product(d_u, f.b_up)], dim=1)
            d_x.index_add_(0, tokens, block.product(d_z, f.a_in))
            d_gate.index_add_(0, tokens, d_g)
            d_up.index_add_(0, tokens, d_u)
            if d is not None:
                block.add_outer(d.a_in, d_z, x.index_select(0, tokens))
                block.add_outer(d.b_gate, d_g, z[:, :rank])
                block.add_outer(d.b_up, d_u, z[:, rank:])
                block.add_outer(d.a_down, d_zd, hidden)
                block.add_outer(d.b_down, d_out * w, zd)
        unsorted = torch.empty_like(d_weights).index_copy_(0, order, d_weights).view(ctx.shape)
        return d_x, d_gate, d_up, unsorted, None, None, None, *(vars(d).values() if d else [None] * 5)


def _inputs(block: Block, z: Float[Tensor, "n 2r"], gate: Tensor, up: Tensor, f: Factors) -> tuple[Tensor, Tensor]:
    """g and u of the block's slots: (n, I) each."""
    rank = z.shape[1] // 2
    g = block.add_product(gate.index_select(0, block.tokens), z[:, :rank], f.b_gate.mT)
    u = block.add_product(up.index_select(0, block.tokens), z[:, rank:], f.b_up.mT)
    return g, u


def slot_products(
    x: Float[Tensor, "T H"],
    weights: Float[Tensor, "T k"],
    experts: Int[Tensor, "T k"],
    down: Float[Tensor, "E r H"],
    up: Float[Tensor, "E H r"],
    act: Callable[[Tensor], Tensor],
) -> Float[Tensor, "T H"]:
    """sum_e w_e U_e act(D_e x): what bottleneck experts add."""
    slots = Slots.of(experts, len(down))
    ends = slots.ends.int()
    inner = act(torch.nn.functional.grouped_mm(x[slots.tokens], down.to(x.dtype).mT, offs=ends))
    outer = torch.nn.functional.grouped_mm(inner, up.to(x.dtype).mT, offs=ends)
    return torch.zeros_like(x).index_add(0, slots.tokens, outer * weights.reshape(-1)[slots.order, None].to(x.dtype))
