"""A plain MoE's experts on a CPU, beside grouped products and beside numbers."""

from collections.abc import Callable
from threading import Thread

import pytest
import torch
from torch import Tensor

from upcycle.experts.grouped import grouped_ffns
from upcycle.experts.lora_ffn import by_expert
from upcycle.experts.on_cpu import each_run, expert_ffns

TOKENS, HIDDEN, CHANNELS, EXPERTS = 11, 8, 16, 5
CHOICES = torch.tensor([[0, 1], [1, 0], [3, 0], [0, 4]] * 3)[:TOKENS]
"""Unequal shares, and none for expert 2."""


def _given(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (TOKENS, HIDDEN), (EXPERTS, 2 * CHANNELS, HIDDEN), (EXPERTS, HIDDEN, CHANNELS), (TOKENS, 2)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _slots() -> tuple[Tensor, Tensor]:
    return by_expert(CHOICES.reshape(-1), EXPERTS)


def test_gradients_are_those_of_the_function(threads: int) -> None:
    order, ends = _slots()
    assert torch.autograd.gradcheck(lambda *values: expert_ffns(*values, order, ends), _given(torch.float64))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_output_and_gradients_are_those_of_grouped_products(threads: int, dtype: torch.dtype, error: float) -> None:
    def run(compute: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
        output = compute(*given, *_slots())
        output.backward(torch.linspace(0, 1, output.numel(), dtype=output.dtype).view_as(output))
        return [output, *(values.grad for values in given)]

    given = _given(dtype)
    exact = [values.detach().float().requires_grad_() for values in given]
    for found, expected in zip(run(expert_ffns, given), run(grouped_ffns, exact), strict=True):
        assert (found - expected).norm() <= error * expected.norm()


def test_what_does_not_train_has_no_gradient(threads: int) -> None:
    whole, frozen = _given(torch.float32), _given(torch.float32)
    for values in frozen[1:3]:
        values.requires_grad_(False)
    for given in (whole, frozen):
        expert_ffns(*given, *_slots()).sum().backward()
    assert frozen[1].grad is None
    assert frozen[2].grad is None
    torch.testing.assert_close(frozen[0].grad, whole[0].grad)
    torch.testing.assert_close(frozen[3].grad, whole[3].grad)


def test_torch_keeps_its_threads(threads: int) -> None:
    expert_ffns(*_given(torch.float32), *_slots()).sum().backward()
    later: list[int] = []
    thread = Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == threads
    assert later == [threads]


def test_an_error_of_a_thread_is_raised(threads: int) -> None:
    def compute(expert: int, _run: slice) -> None:
        if expert == 3:
            raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        each_run(compute, [(expert, slice(0, 1)) for expert in range(EXPERTS)])
