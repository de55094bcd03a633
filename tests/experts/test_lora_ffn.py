"""The mixture's FFN block against its definition, forward and backward, in all ways to compute it."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from upcycle.experts.lora_ffn import BLOCK, Factors, UngatedFactors, lora_ffn, slot_products

T, H, WIDE, E, R = 500, 16, 24, 5, 8


def world(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=draw) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    dense = [values(WIDE, H), values(WIDE, H), values(H, WIDE)]
    factors = Factors(values(E, 2 * R, H), values(E, R, WIDE), values(E, R, WIDE), values(E, R, WIDE), values(E, R, H))
    weights = torch.rand(T, 2, generator=draw).to(dtype).requires_grad_()
    chosen = torch.stack([torch.randperm(E - 1, generator=draw)[:2] for _ in range(T)])  # the last gets no token
    chosen[: 2 * BLOCK, 0], chosen[: 2 * BLOCK, 1] = 0, 1  # more tokens than a block takes
    return values(T, H), dense, factors, weights, chosen, torch.linspace(0.5, 2, E)


def definition(x: Tensor, dense: Any, f: Factors, weights: Tensor, chosen: Tensor, scaling: Tensor) -> Tensor:
    output = torch.zeros_like(x)
    for e in range(E):
        updates = (f.b_gate[e].T @ f.a_in[e, :R], f.b_up[e].T @ f.a_in[e, R:], f.b_down[e].T @ f.a_down[e])
        gate, up, down = (w + scaling[e].to(w) * update for w, update in zip(dense, updates, strict=True))
        share = (weights * (chosen == e)).sum(dim=1, keepdim=True)
        output = output + share * ((silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return output


def ours(
    x: Tensor,
    dense: Any,
    f: Factors,
    weights: Tensor,
    chosen: Tensor,
    scaling: Tensor,
    grouped: bool,
    fused: bool = False,
) -> Tensor:
    gate, up, down = (partial(torch.nn.functional.linear, weight=weight) for weight in dense)
    both = partial(torch.nn.functional.linear, weight=torch.cat(dense[:2]))
    inner = (lambda x: both(x).chunk(2, dim=-1)) if fused else lambda x: (gate(x), up(x))
    ffn = SimpleNamespace(inner=inner, down=down, down_bias=None, act_fn=silu)
    return lora_ffn(x, ffn, weights, chosen, f, scaling, grouped)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_outputs_and_gradients_are_those_of_full_experts(grouped: bool, fused: bool) -> None:
    x, dense, factors, weights, chosen, scaling = world()
    inputs = [x, weights, *dense, *vars(factors).values()]
    expected = definition(x, dense, factors, weights, chosen, scaling)
    found = ours(x, dense, factors, weights, chosen, scaling, grouped, fused)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    pull = torch.linspace(-1, 1, H)
    gradients = [torch.autograd.grad((y * pull).sum() + y.square().sum(), inputs) for y in (found, expected)]
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert not any(gradient[-1].any() for gradient in gradients[0][5:])  # of the expert without a token


@pytest.mark.parametrize(("dtype", "near", "of_gradients"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 0.02, 0.1)])
def test_without_a_gate_outputs_and_gradients_are_those_of_full_experts_with_the_base_s_biases(
    dtype: torch.dtype, near: float, of_gradients: float
) -> None:
    x, (_, up, down), f, weights, chosen, scaling = world(dtype)
    biases = [torch.linspace(-1, 1, size, dtype=dtype) for size in (WIDE, H)]
    factors = UngatedFactors(f.a_in[:, :R].detach().requires_grad_(), f.b_up, f.a_down, f.b_down)
    inputs = [x, weights, *vars(factors).values()]
    shares = torch.sigmoid(weights)  # of a gate: they need not sum to 1
    ffn = SimpleNamespace(
        inner=lambda x: (torch.nn.functional.linear(x, up, biases[0]),),
        down=lambda hidden: torch.nn.functional.linear(hidden, down, biases[1]),
        down_bias=biases[1],
        act_fn=silu,
    )
    found = lora_ffn(x, ffn, shares, chosen, factors, scaling)
    assert found.dtype is dtype
    expected = torch.zeros(T, H)
    for e in range(E):
        a_up, b_up, a_down, b_down = (matrix[e].float() for matrix in vars(factors).values())
        inner = x.float() @ (up.float() + scaling[e] * b_up.T @ a_up).T + biases[0].float()
        output = silu(inner) @ (down.float() + scaling[e] * b_down.T @ a_down).T + biases[1].float()
        expected = expected + (shares.float() * (chosen == e)).sum(dim=1, keepdim=True) * output
    assert (found.float() - expected).norm() < near * expected.norm()
    gradients = [torch.autograd.grad(y.float().square().sum(), inputs, retain_graph=True) for y in (found, expected)]
    for mine, reference in zip(*gradients, strict=True):
        assert (mine.float() - reference.float()).norm() < of_gradients * reference.float().norm()


@pytest.mark.parametrize("grouped", [False, True])
def test_bf16_is_as_near_as_bf16_allows(grouped: bool) -> None:
    x, dense, factors, weights, chosen, scaling = world(torch.bfloat16)
    wide = [t.float() for t in dense], Factors(*(t.float() for t in vars(factors).values()))
    expected = definition(x.float(), *wide, weights.float(), chosen, scaling)
    found = ours(x, dense, factors, weights, chosen, scaling, grouped)
    assert found.dtype is torch.bfloat16
    assert (found.float() - expected).norm() < 0.02 * expected.norm()


def test_fixed_adapters_cost_no_gradient_and_inputs_still_get_theirs() -> None:
    x, dense, factors, weights, chosen, scaling = world()
    fixed = Factors(*(t.detach() for t in vars(factors).values()))
    found = torch.autograd.grad(ours(x, dense, fixed, weights, chosen, scaling, False).sum(), [x, weights])
    expected = torch.autograd.grad(definition(x, dense, factors, weights, chosen, scaling).sum(), [x, weights])
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_bottlenecks_follow_their_formula() -> None:
    x, _, _, weights, chosen, _ = world()
    draw = torch.Generator().manual_seed(1)
    down, up = torch.randn(E, R, H, generator=draw), torch.randn(E, H, R, generator=draw)
    rows = [
        sum(weights[t, j] * up[e] @ silu(down[e] @ x[t]) for j, e in enumerate(chosen[t].tolist())) for t in range(20)
    ]
    found = slot_products(x, weights, chosen, down, up, silu)
    torch.testing.assert_close(found[:20], torch.stack(rows), rtol=1e-4, atol=1e-4)
