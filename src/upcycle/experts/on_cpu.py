"""A plain MoE's experts on a CPU: each is computed by one thread, from its tokens to what it adds to them.

A second thread gains little in a product of a few hundred rows, and what an expert makes of them fits a core's caches.
So each thread takes the next expert that has tokens, and only gate and up of it are kept for the backward pass.

Legend: T tokens, k experts per token, S = T k slots, H hidden, I channels, J = 2 I, E experts.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from upcycle.experts.lora_ffn import inverse_of

Run = tuple[int, slice]
"""An expert, and where its slots stand in their order."""


def expert_ffns(
    hidden: Float[Tensor, "T H"],
    up: Float[Tensor, "E J H"],
    down: Float[Tensor, "E H I"],
    weights: Float[Tensor, "T k"],
    order: Int[Tensor, " S"],
    ends: Int[Tensor, " E"],
) -> Float[Tensor, "T H"]:
    """The sum of each token's experts, SwiGLU FFNs of one dtype.

    Args:
        up: gate, and up below it.
        order: sorts slots by their expert.
        ends: where each expert's run ends.
    """
    apply: Any = ExpertFfns.apply
    output: Tensor = apply(hidden, up, down, weights, order, ends.tolist())
    return output


class ExpertFfns(torch.autograd.Function):
    """Slots are kept in the order of their experts: an expert's are a view, of which only one thread writes."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, up: Tensor, down: Tensor, weights: Tensor, order: Tensor, ends: list[int]
    ) -> Tensor:
        runs, tokens = _runs(ends), order // weights.shape[1]
        both = hidden.new_empty(len(order), up.shape[1])
        outputs = hidden.new_empty(len(order), hidden.shape[1])

        def compute(expert: int, run: slice) -> None:
            torch.mm(hidden.index_select(0, tokens[run]), up[expert].T, out=both[run])
            gate, value = both[run].chunk(2, dim=-1)
            torch.mm(silu(gate).mul_(value), down[expert].T, out=outputs[run])

        each_run(compute, runs)
        places = inverse_of(order).view_as(weights)
        ctx.save_for_backward(hidden, up, down, weights, order, tokens, places, both)
        ctx.runs = runs
        return _mixed(outputs, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, up, down, weights, order, tokens, places, both = ctx.saved_tensors
        gradient, by_slot = gradients[0].contiguous(), weights.flatten().index_select(0, order)[:, None]
        _, needs_up, needs_down, *_ = ctx.needs_input_grad
        d_up, d_down = (_gradient_of(w, len(ctx.runs)) if n else None for w, n in ((up, needs_up), (down, needs_down)))
        d_inputs = hidden.new_empty(len(order), hidden.shape[1])
        d_weights = torch.empty_like(by_slot)

        def compute(expert: int, run: slice) -> None:
            given = gradient.index_select(0, tokens[run])
            gate, value = both[run].chunk(2, dim=-1)
            activated = silu(gate)
            inner = activated * value
            d_inner = given @ down[expert]
            torch.sum(d_inner * inner, dim=1, keepdim=True, out=d_weights[run])
            if d_down is not None:
                torch.mm(given.T, inner.mul_(by_slot[run]), out=d_down[expert])
            d_inner.mul_(by_slot[run])
            d_both = torch.empty_like(both[run])
            d_gate, d_value = d_both.chunk(2, dim=-1)
            torch.mul(d_inner, activated, out=d_value)
            torch.ops.aten.silu_backward.grad_input(d_inner.mul_(value), gate, grad_input=d_gate)
            if d_up is not None:
                torch.mm(d_both.T, hidden.index_select(0, tokens[run]), out=d_up[expert])
            torch.mm(d_both, up[expert], out=d_inputs[run])

        each_run(compute, ctx.runs)
        return _mixed(d_inputs, places), d_up, d_down, d_weights[places, 0], None, None


def _mixed(
    slots: Float[Tensor, "S H"], places: Int[Tensor, "T k"], weights: Float[Tensor, "T k"] | None = None
) -> Float[Tensor, "T H"]:
    """The weighted sum of each token's slots, in one pass."""
    return torch.nn.functional.embedding_bag(places, slots, mode="sum", per_sample_weights=weights)


def _runs(ends: list[int]) -> list[Run]:
    """Of the experts that have tokens, the longest first, so that threads end at nearly the same time."""
    begins = [0, *ends[:-1]]
    runs = [(e, slice(begin, end)) for e, (begin, end) in enumerate(zip(begins, ends, strict=True)) if begin < end]
    return sorted(runs, key=lambda run: run[1].start - run[1].stop)


def _gradient_of(weight: Tensor, used: int) -> Tensor:
    """Where each used expert writes its own; zeros for the others."""
    return torch.empty_like(weight) if used == len(weight) else torch.zeros_like(weight)


def each_run(compute: Callable[[int, slice], None], runs: Sequence[Run]) -> None:
    """`compute` for every run, by as many threads as torch has, each of which takes the next one."""
    left = iter(runs)

    def work() -> None:
        with torch.no_grad():
            for expert, run in left:
                compute(expert, run)

    threads = min(torch.get_num_threads(), len(runs))
    if threads == 1:
        work()
        return
    for future in [_pool(torch.get_num_threads()).submit(work) for _ in range(threads)]:
        future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that run torch on one core each."""
    pool, all_there = ThreadPoolExecutor(threads), Barrier(threads)

    def begin() -> None:
        torch.set_num_threads(1)
        all_there.wait()

    for future in [pool.submit(begin) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(threads)  # torch gives later threads the number that was set last, by whichever thread
    return pool
