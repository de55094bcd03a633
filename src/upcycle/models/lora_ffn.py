"""The FFN block of a mixture of LoRA experts at nearly the price of a dense one.

Expert e is the FFN with weights W + s_e B_e A_e. For the k experts of a token x with weights w,

    g_e = W_gate x + s_e B_e A_e x,   u_e = W_up x + s_e B_e A_e x,   h_e = act(g_e) * u_e    (first terms once a token)
    y = W_down sum_e w_e h_e  +  sum_e w_e s_e B_e A_e h_e                                  (one down projection)

The products with W stay outside, ordinary linear layers. What is here keeps g and u for the backward pass, as much as a
dense FFN with LoRA does, and makes the rest again.

Legend: T tokens, k experts per token, N = T k slots (a token at one of its experts), E experts, H hidden,
I intermediate size, r rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 192
"""Slots that a CPU takes at once: few enough for its caches, many enough to be worth a call."""


@dataclass(frozen=True)
class Factors:
    """Low-rank parts of all experts."""

    a_in: Float[Tensor, "E 2r H"]
    """A of gate and, below it, of up."""
    b_gate: Float[Tensor, "E r I"]
    """B of gate, transposed, like all B here: products and gradients then run along rows."""
    b_up: Float[Tensor, "E r I"]
    a_down: Float[Tensor, "E r I"]
    b_down: Float[Tensor, "E r H"]


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
        ends = flat.bincount(minlength=num_experts).cumsum(0, dtype=torch.int32)
        return cls(order, order // experts.shape[1], ends)

    def product(self, values: Float[Tensor, "N i"], matrices: Float[Tensor, "E i o"]) -> Float[Tensor, "N o"]:
        """Each slot's values times the matrix of its expert."""
        return torch.nn.functional.grouped_mm(values, matrices, offs=self.ends)

    def outer(self, left: Float[Tensor, "N i"], right: Float[Tensor, "N o"]) -> Float[Tensor, "E i o"]:
        """left^T right of each expert's slots: the gradient of `product`."""
        return torch.nn.functional.grouped_mm(left.mT, right, offs=self.ends)

    def blocks(self, grouped: bool) -> Iterator["Block"]:
        """All slots at once for grouped products, or runs of one expert that fit a cache."""
        if grouped:
            yield Block(slice(None), self.tokens, None, self)
            return
        begin = 0
        for expert, end in enumerate(self.ends.tolist()):
            for first in range(begin, end, BLOCK):
                rows = slice(first, min(end, first + BLOCK))
                yield Block(rows, self.tokens[rows], expert, self)
            begin = end


@dataclass(frozen=True)
class Block:
    """Slots that are computed together: of one expert, or of all (expert None)."""

    rows: slice
    tokens: Int[Tensor, " n"]
    expert: int | None
    slots: Slots

    def product(self, values: Float[Tensor, "n i"], matrices: Float[Tensor, "E i o"]) -> Float[Tensor, "n o"]:
        """Each slot's values times the matrix of its expert."""
        return self.slots.product(values, matrices) if self.expert is None else values @ matrices[self.expert]

    def add_product(self, total: Tensor, values: Float[Tensor, "n i"], matrices: Float[Tensor, "E i o"]) -> Tensor:
        """`product` added to `total` (n, o) in place."""
        if self.expert is None:
            return total.add_(self.product(values, matrices))
        return total.addmm_(values, matrices[self.expert])

    def add_outer(self, total: Float[Tensor, "E i o"], left: Float[Tensor, "n i"], right: Float[Tensor, "n o"]) -> None:
        """left^T right of each expert's slots added to its matrix."""
        if self.expert is None:
            total.add_(self.slots.outer(left, right))
        else:
            total[self.expert].addmm_(left.T, right)


def mix(
    x: Float[Tensor, "T H"],
    gate: Float[Tensor, "T I"],
    up: Float[Tensor, "T I"],
    weights: Float[Tensor, "T k"],
    experts: Int[Tensor, "T k"],
    factors: Factors,
    scaling: Float[Tensor, " E"],
    act: Callable[[Tensor], Tensor],
    grouped: bool | None = None,
) -> tuple[Float[Tensor, "T I"], Float[Tensor, "T H"]]:
    """(sum_e w_e h_e, sum_e w_e s_e B_e A_e h_e): what the down projection reads, and what is added to its output.

    Args:
        gate, up: W_gate x and W_up x.
        grouped: one grouped product over all experts (default on an accelerator), or blocks that fit a CPU's cache.
    """
    grouped = x.device.type != "cpu" if grouped is None else grouped
    dtype = gate.dtype
    low_rank = [matrix.to(dtype) for matrix in vars(factors).values()]
    with torch.autocast(x.device.type, enabled=False):
        apply: Any = _Mix.apply
        mixed, low = apply(x.to(dtype), gate, up, weights.to(dtype), experts, scaling, act, grouped, *low_rank)
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
        scaling: Tensor,
        act: Callable[[Tensor], Tensor],
        grouped: bool,
        *low_rank: Tensor,
    ) -> tuple[Tensor, Tensor]:
        slots, f = Slots.of(experts, len(low_rank[0])), Factors(*low_rank)
        w = weights.reshape(-1)[slots.order, None]
        s = scaling.to(x.dtype)[experts.reshape(-1)[slots.order], None]
        z_in = slots.product(x.index_select(0, slots.tokens), f.a_in.mT).mul_(s)
        z_down = x.new_empty(len(slots.order), f.a_down.shape[1])
        g, u = (gate.new_empty(len(slots.order), gate.shape[1]) for _ in range(2))
        rank, mixed = f.a_down.shape[1], torch.zeros_like(gate)
        for block in slots.blocks(grouped):
            rows = block.rows
            for total, dense, z, b in ((g, gate, z_in[rows, :rank], f.b_gate), (u, up, z_in[rows, rank:], f.b_up)):
                block.add_product(torch.index_select(dense, 0, block.tokens, out=total[rows]), z, b)
            hidden = act(g[rows]).mul_(u[rows])
            z_down[rows] = block.product(hidden, f.a_down.mT)
            mixed.index_add_(0, block.tokens, hidden.mul_(w[rows]))
        low = torch.zeros_like(x).index_add_(0, slots.tokens, slots.product(z_down * (w * s), f.b_down))
        ctx.save_for_backward(x, g, u, w, s, z_in, z_down, *vars(slots).values(), *low_rank)
        ctx.act, ctx.grouped, ctx.shape = act, grouped, weights.shape
        return mixed, low

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_mixed, d_low = gradients
        x, g_all, u_all, w, s, z_in, z_down, order, tokens, ends, *low_rank = ctx.saved_tensors
        slots, f = Slots(order, tokens, ends), Factors(*low_rank)
        adapt = any(ctx.needs_input_grad[8:])
        d_gate, d_up = (torch.zeros_like(d_mixed) for _ in range(2))
        d_b_gate, d_b_up, d_a_down = (torch.zeros_like(matrix) for matrix in (f.b_gate, f.b_up, f.a_down))
        d_w, d_z_in = torch.empty_like(w), torch.empty_like(z_in)
        d_output = d_low.index_select(0, tokens)
        d_z_down = slots.product(d_output, f.b_down.mT).mul_(s)  # before the weights w
        rank = z_down.shape[1]
        for block in slots.blocks(ctx.grouped):
            rows = block.rows
            g, u = g_all[rows].requires_grad_(), u_all[rows]
            with torch.enable_grad():
                activated = ctx.act(g)
            a = activated.detach()
            hidden = a * u
            d_hidden = block.add_product(d_mixed.index_select(0, block.tokens), d_z_down[rows], f.a_down)
            d_w[rows, 0] = torch.linalg.vecdot(d_hidden, hidden)
            d_u = d_hidden.mul_(w[rows]) * a
            (d_g,) = torch.autograd.grad(activated, g, d_hidden.mul_(u))
            d_gate.index_add_(0, block.tokens, d_g)
            d_up.index_add_(0, block.tokens, d_u)
            d_z_in[rows, :rank] = block.product(d_g, f.b_gate.mT)
            d_z_in[rows, rank:] = block.product(d_u, f.b_up.mT)
            if adapt:
                block.add_outer(d_b_gate, z_in[rows, :rank], d_g)
                block.add_outer(d_b_up, z_in[rows, rank:], d_u)
                block.add_outer(d_a_down, d_z_down[rows] * w[rows], hidden)
        d_z_in.mul_(s)
        d_x = torch.zeros_like(x).index_add_(0, tokens, slots.product(d_z_in, f.a_in))
        d_weights = torch.empty_like(w).index_copy_(0, order, d_w).view(ctx.shape)
        if not adapt:
            return d_x, d_gate, d_up, d_weights, *[None] * 9
        d_a_in = slots.outer(d_z_in, x.index_select(0, tokens))
        d_b_down = slots.outer(z_down * (w * s), d_output)
        return d_x, d_gate, d_up, d_weights, *[None] * 4, d_a_in, d_b_gate, d_b_up, d_a_down, d_b_down


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
    inner = act(slots.product(x[slots.tokens], down.to(x.dtype).mT))
    outer = slots.product(inner, up.to(x.dtype).mT)
    return torch.zeros_like(x).index_add(0, slots.tokens, outer * weights.reshape(-1)[slots.order, None].to(x.dtype))
