"""The FFN block of a mixture of LoRA experts at nearly the price of a dense one.

Expert e is the FFN with weights W + s_e B_e A_e. For the k experts of a token x with weights w,

    g_e = W_gate x + s_e B_e A_e x,   u_e = W_up x + s_e B_e A_e x,   h_e = act(g_e) * u_e    (first terms once a token)
    y = W_down sum_e w_e h_e  +  sum_e w_e s_e B_e A_e h_e                                  (one down projection)

Biases are the dense model's: W x has them; the down projection's comes as often as the weights w sum to, mostly 1.
An FFN without a gate has h_e = act(u_e).

Tokens are sorted by their first expert before anything is done to them, so that for the first choice nothing as large
as (T, I) is gathered or scattered. g and u are kept for the backward pass: as much as a dense FFN with LoRA keeps.

Legend: T tokens, k experts per token, E experts, H hidden, I intermediate size, r rank, R = 2 r. A slot is a token at
one of its k choices.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.activations import SiLUActivation

SILU = (torch.nn.SiLU, SiLUActivation)
"""The usual activation, whose gradient torch computes in one pass."""
BLOCK = 384
"""Slots that a CPU takes at once: few enough for its caches, many enough to be worth a call."""


@runtime_checkable
class DenseFfn(Protocol):
    """The dense FFN block that all experts share."""

    inner: Callable[[Tensor], tuple[Tensor, ...]]
    """(gate, up), or (up,)."""
    down: Callable[[Tensor], Tensor]
    down_bias: Tensor | None
    """That `down` adds."""
    act_fn: Callable[[Tensor], Tensor]


def by_expert(experts: Int[Tensor, " S"], num_experts: int) -> tuple[Int[Tensor, " S"], Int[Tensor, " E"]]:
    """The order that sorts slots by their expert, and where each expert's run ends."""
    ordered, order = experts.sort(stable=True)
    # not by counting, which would wait for an accelerator in every layer
    numbers = torch.arange(num_experts, device=experts.device)
    return order, torch.searchsorted(ordered, numbers, right=True, out_int32=True)


def inverse_of(order: Int[Tensor, " S"]) -> Int[Tensor, " S"]:
    """Where each slot stands in the order."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@dataclass(frozen=True)
class Factors:
    """Low-rank parts of all experts."""

    a_in: Float[Tensor, "E R H"]
    """A of gate and, below it, of up."""
    b_gate: Float[Tensor, "E r I"]
    """B of gate, transposed, like all B here: products and gradients then run along rows."""
    b_up: Float[Tensor, "E r I"]
    a_down: Float[Tensor, "E r I"]
    b_down: Float[Tensor, "E r H"]


@dataclass(frozen=True)
class UngatedFactors:
    """The same where there is no gate."""

    a_up: Float[Tensor, "E r H"]
    b_up: Float[Tensor, "E r I"]
    a_down: Float[Tensor, "E r I"]
    b_down: Float[Tensor, "E r H"]


@dataclass(frozen=True)
class Slots:
    """One choice of every token, sorted by expert."""

    tokens: Int[Tensor, " T"]
    ends: Int[Tensor, " E"]
    """Where each expert's run ends."""

    @classmethod
    def of(cls, experts: Int[Tensor, " T"], num_experts: int) -> "Slots":
        return cls(*by_expert(experts, num_experts))

    def product(self, values: Float[Tensor, "T i"], matrices: Float[Tensor, "E i o"]) -> Float[Tensor, "T o"]:
        """Each slot's values times the matrix of its expert."""
        return torch.nn.functional.grouped_mm(values, matrices, offs=self.ends)

    def outer(self, left: Float[Tensor, "T i"], right: Float[Tensor, "T o"]) -> Float[Tensor, "E i o"]:
        """left^T right of each expert's slots: the gradient of `product`."""
        return torch.nn.functional.grouped_mm(left.mT, right, offs=self.ends)

    def blocks(self, grouped: bool) -> Iterator["Block"]:
        """All slots at once for grouped products, or runs of one expert that suit a CPU's caches."""
        if grouped:
            yield Block(slice(None), None, self)
            return
        begin = 0
        for expert, end in enumerate(self.ends.tolist()):
            for first in range(begin, end, BLOCK):
                yield Block(slice(first, min(end, first + BLOCK)), expert, self)
            begin = end


@dataclass(frozen=True)
class Block:
    """Slots that are computed together: of one expert, or of all (expert None)."""

    rows: slice
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

    def plus_product(self, base: Tensor, values: Float[Tensor, "n i"], matrices: Float[Tensor, "E i o"]) -> Tensor:
        """`base` (n, o) + `product`."""
        if self.expert is None:
            return base + self.product(values, matrices)
        return torch.addmm(base, values, matrices[self.expert])

    def add_outer(self, total: Float[Tensor, "E i o"], left: Float[Tensor, "n i"], right: Float[Tensor, "n o"]) -> None:
        """left^T right of each expert's slots added to its matrix."""
        if self.expert is None:
            total.add_(self.slots.outer(left, right))
        else:
            total[self.expert].addmm_(left.T, right)


def lora_ffn(
    x: Float[Tensor, "T H"],
    ffn: DenseFfn,
    weights: Float[Tensor, "T k"],
    experts: Int[Tensor, "T k"],
    factors: Factors | UngatedFactors,
    scaling: Float[Tensor, " E"],
    grouped: bool | None = None,
) -> Float[Tensor, "T H"]:
    """The block's output.

    Args:
        grouped: one grouped product over all experts (default on an accelerator), or blocks that suit a CPU's caches;
            without a gate always the first.
    """
    grouped = x.device.type != "cpu" if grouped is None else grouped
    order = experts[:, 0].argsort(stable=True)
    x, weights, experts = x.index_select(0, order), weights.index_select(0, order), experts.index_select(0, order)
    inner = ffn.inner(x)
    dtype = inner[0].dtype
    x, weights = x.to(dtype), weights.to(dtype)
    low_rank = [matrix.to(dtype) for matrix in vars(factors).values()]
    with torch.autocast(x.device.type, enabled=False):
        if isinstance(factors, UngatedFactors):
            (up,), f = inner, UngatedFactors(*low_rank)
            mixed, low = _mix_ungated(x, up, weights, experts, scaling.to(dtype), ffn.act_fn, f)
        else:
            apply: Any = _Mix.apply
            mixed, low = apply(x, *inner, weights, experts, scaling, ffn.act_fn, grouped, *low_rank)
    output = ffn.down(mixed) + low
    if ffn.down_bias is not None:
        output = output + (weights.sum(dim=1, keepdim=True) - 1) * ffn.down_bias
    return torch.empty_like(output).index_copy(0, order, output)


def _mix_ungated(
    x: Float[Tensor, "T H"],
    inner: Float[Tensor, "T I"],
    weights: Float[Tensor, "T k"],
    experts: Int[Tensor, "T k"],
    scaling: Float[Tensor, " E"],
    act: Callable[[Tensor], Tensor],
    f: UngatedFactors,
) -> tuple[Float[Tensor, "T I"], Float[Tensor, "T H"]]:
    """What `_Mix` gives, without a gate; its gradients are left to torch."""
    mixed, low = inner, x  # set by the first choice
    for number, choice in enumerate(experts.unbind(1)):
        slots, first = Slots.of(choice, len(scaling)), number == 0
        given = (x, inner, weights[:, number, None], scaling[choice, None])
        x_in, u, w, s = given if first else (values.index_select(0, slots.tokens) for values in given)
        z_up = slots.product(x_in, f.a_up.mT) * s
        hidden = act(u + slots.product(z_up, f.b_up)).to(x.dtype)  # its parameters may be fp32
        added = slots.product(slots.product(hidden, f.a_down.mT) * (w * s), f.b_down)
        mixed = hidden * w if first else mixed.index_add(0, slots.tokens, hidden * w)
        low = added if first else low.index_add(0, slots.tokens, added)
    return mixed, low


class _Mix(torch.autograd.Function):
    """(sum_e w_e h_e, sum_e w_e s_e B_e A_e h_e) of tokens sorted by their first expert."""

    @staticmethod
    # positional, as autograd wants every input that may get a gradient
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
        f = Factors(*low_rank)
        rank, kept = f.a_down.shape[1], []
        choices = [Slots.of(choice, len(f.a_in)) for choice in experts.unbind(1)]
        # the first choice takes the dense block's own memory, once the others have what they need of it
        inputs = [(gate.index_select(0, c.tokens), up.index_select(0, c.tokens)) for c in choices[1:]]
        inputs.insert(0, (gate.detach(), up.detach()))
        mixed, low = torch.empty_like(gate), x  # `low` is set by the first choice
        for number, (slots, (g, u)) in enumerate(zip(choices, inputs, strict=True)):
            first = number == 0
            w = weights[:, number, None] if first else weights[slots.tokens, number, None]
            s = scaling.to(x.dtype)[experts[slots.tokens, number], None]
            z_in = slots.product(x if first else x.index_select(0, slots.tokens), f.a_in.mT).mul_(s)
            z_down = x.new_empty(len(x), rank)
            for block in slots.blocks(grouped):
                rows = block.rows
                block.add_product(g[rows], z_in[rows, :rank], f.b_gate)
                block.add_product(u[rows], z_in[rows, rank:], f.b_up)
                hidden = act(g[rows]).mul_(u[rows])
                z_down[rows] = block.product(hidden, f.a_down.mT)
                if first:
                    torch.mul(hidden, w[rows], out=mixed[rows])
                else:
                    mixed.index_add_(0, slots.tokens[rows], hidden.mul_(w[rows]))
            added = slots.product(z_down * (w * s), f.b_down)
            low = added if first else low.index_add_(0, slots.tokens, added)
            kept += [slots.tokens, slots.ends, g, u, w, s, z_in, z_down]
        ctx.save_for_backward(x, *low_rank, *kept)
        ctx.act, ctx.grouped = act, grouped
        return mixed, low

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_mixed, d_low = gradients
        x, *saved = ctx.saved_tensors
        f, kept = Factors(*saved[:5]), saved[5:]
        adapt = any(ctx.needs_input_grad[8:])
        d = Factors(*(torch.zeros_like(matrix) for matrix in vars(f).values()))
        d_gate, d_up = torch.empty_like(d_mixed), torch.empty_like(d_mixed)
        d_x, d_weights = x, x.new_empty(len(x), len(kept) // 8)  # `d_x` is set by the first choice
        rank = f.a_down.shape[1]
        for number in range(len(kept) // 8):
            tokens, ends, g_all, u_all, w, s, z_in, z_down = kept[8 * number : 8 * number + 8]
            slots, first = Slots(tokens, ends), number == 0
            d_output = d_low if first else d_low.index_select(0, tokens)
            d_z_down = slots.product(d_output, f.b_down.mT).mul_(s)  # before the weights w
            d_z_in, d_w = torch.empty_like(z_in), x.new_empty(len(x))
            for block in slots.blocks(ctx.grouped):
                rows = block.rows
                g, u = g_all[rows], u_all[rows]
                a, pull = _activate(ctx.act, g)
                hidden = a * u
                if first:
                    d_hidden = block.plus_product(d_mixed[rows], d_z_down[rows], f.a_down)
                else:
                    d_hidden = block.add_product(d_mixed.index_select(0, tokens[rows]), d_z_down[rows], f.a_down)
                torch.linalg.vecdot(d_hidden, hidden, out=d_w[rows])
                d_hidden.mul_(w[rows])
                # the first choice writes straight to its place
                d_g, d_u = (d_gate[rows], d_up[rows]) if first else (torch.empty_like(g), a)
                torch.mul(d_hidden, a, out=d_u)
                pull(d_hidden.mul_(u), d_g)
                if not first:
                    d_gate.index_add_(0, tokens[rows], d_g)
                    d_up.index_add_(0, tokens[rows], d_u)
                d_z_in[rows, :rank] = block.product(d_g, f.b_gate.mT)
                d_z_in[rows, rank:] = block.product(d_u, f.b_up.mT)
                if adapt:
                    block.add_outer(d.b_gate, z_in[rows, :rank], d_g)
                    block.add_outer(d.b_up, z_in[rows, rank:], d_u)
                    block.add_outer(d.a_down, d_z_down[rows] * w[rows], hidden)
            d_z_in.mul_(s)
            read = slots.product(d_z_in, f.a_in)
            d_x = read if first else d_x.index_add_(0, tokens, read)
            d_weights[tokens, number] = d_w
            if adapt:
                d.a_in.add_(slots.outer(d_z_in, x if first else x.index_select(0, tokens)))
                d.b_down.add_(slots.outer(z_down * (w * s), d_output))
        return d_x, d_gate, d_up, d_weights, *[None] * 4, *(vars(d).values() if adapt else [None] * 5)


def _activate(act: Callable[[Tensor], Tensor], g: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], None]]:
    """act(g), and what writes the gradient of g, given that of act(g), to a place."""
    if act is torch.nn.functional.silu or isinstance(act, SILU):

        def pull(gradient: Tensor, out: Tensor) -> None:
            torch.ops.aten.silu_backward.grad_input(gradient, g, grad_input=out)

        return torch.nn.functional.silu(g), pull
    with torch.enable_grad():
        leaf = g.detach().requires_grad_()
        activated = act(leaf)

    def pull_any(gradient: Tensor, out: Tensor) -> None:
        out.copy_(torch.autograd.grad(activated, leaf, gradient)[0])

    return activated.detach(), pull_any


def slot_products(
    x: Float[Tensor, "T H"],
    weights: Float[Tensor, "T k"],
    experts: Int[Tensor, "T k"],
    down: Float[Tensor, "E r H"],
    up: Float[Tensor, "E H r"],
    act: Callable[[Tensor], Tensor],
) -> Float[Tensor, "T H"]:
    """sum_e w_e U_e act(D_e x): what bottleneck experts add."""
    total = torch.zeros_like(x)
    for number, choice in enumerate(experts.unbind(1)):
        slots = Slots.of(choice, len(down))
        inner = act(slots.product(x[slots.tokens], down.to(x.dtype).mT)).to(x.dtype)  # its parameters may be fp32
        added = slots.product(inner, up.to(x.dtype).mT) * weights[slots.tokens, number, None].to(x.dtype)
        total = total.index_add(0, slots.tokens, added)
    return total
