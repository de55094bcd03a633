"""Merge kernels against their definitions, against PEFT's where they agree, and by their properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from upcycle.merging.dare import dare
from upcycle.merging.kernels import KERNELS
from upcycle.merging.lineage import Child, materialise
from upcycle.merging.linear import linear, slerp, slerp_weights
from upcycle.merging.ties import agreeing_mean, agreeing_sum, trim_mask

N = 2000
ZERO = torch.zeros(N)
SEEDS = st.integers(0, 1000)
FRACTIONS = st.floats(0, 1)


def vector(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def child(merge: str, taus: list[torch.Tensor], weights: tuple[float, ...], drop_rate: float, seed: int = 0):
    """The task vector of one child of all `taus`."""
    zero = torch.zeros_like(taus[0])
    return next(materialise(zero, taus, [Child(tuple(range(len(taus))), weights)], merge, drop_rate, seed, "w"))


def test_linear_is_the_weighted_sum_as_in_peft() -> None:
    taus = [vector(0), vector(1), vector(2)]
    weights = torch.tensor([0.2, 0.5, 0.3])
    expected = merge_utils.task_arithmetic(taus, weights)
    torch.testing.assert_close(linear(ZERO, taus, weights.tolist(), [None] * 3), expected)


@given(seed=SEEDS, drop_rate=st.floats(0.01, 0.95))
@settings(max_examples=30, deadline=None)
def test_trim_keeps_the_largest_as_in_peft(seed: int, drop_rate: float) -> None:
    tau = vector(seed)
    torch.testing.assert_close(tau * trim_mask(tau, drop_rate), merge_utils.prune(tau, 1 - drop_rate, "magnitude"))


def test_trim_of_everything_is_zero() -> None:
    assert trim_mask(vector(0, 3), 0.9).count_nonzero() == 0


@given(seed=SEEDS, drop_rate=st.floats(0.01, 0.9))
@settings(max_examples=30, deadline=None)
def test_ties_is_pefts_for_equal_weights(seed: int, drop_rate: float) -> None:
    """PEFT divides by the number of agreeing parents, which is our weighted mean if all weights are one."""
    taus = [vector(seed), vector(seed + 1)]
    expected = merge_utils.ties(taus, torch.ones(2), 1 - drop_rate, "total")
    torch.testing.assert_close(child("ties", taus, (1.0, 1.0), drop_rate), expected)
    torch.testing.assert_close(child("ties", taus, (0.5, 0.5), drop_rate), expected)


def test_ties_by_hand() -> None:
    zero, a, b = torch.zeros(4), torch.tensor([2.0, -1.0, 3.0, 0.0]), torch.tensor([-1.0, -2.0, 1.0, 5.0])
    # weighted sums .5 a + .5 b: .5, -1.5, 2, 2.5
    torch.testing.assert_close(
        agreeing_mean(zero, [a, b], [0.5, 0.5], [None, None]), torch.tensor([2.0, -1.5, 2.0, 5.0])
    )
    torch.testing.assert_close(
        agreeing_sum(zero, [a, b], [0.5, 0.5], [None, None]), torch.tensor([1.0, -1.5, 2.0, 2.5])
    )
    # .2 a + .8 b elects b's sign in the first place
    torch.testing.assert_close(
        agreeing_mean(zero, [a, b], [0.2, 0.8], [None, None]), torch.tensor([-1.0, -1.8, 1.4, 5.0])
    )


def test_dare_ties_is_dare_without_the_minority_sign() -> None:
    taus = [vector(3), vector(4)]
    dropped = [dare(tau, 0.3, (0, 2, i, "w")) for i, tau in enumerate(taus)]
    torch.testing.assert_close(
        child("dare_ties", taus, (0.4, 0.6), 0.3), agreeing_sum(ZERO, dropped, [0.4, 0.6], [None, None])
    )
    same_sign = [taus[0].abs(), taus[1].abs()]
    both = [child(merge, same_sign, (0.4, 0.6), 0.3) for merge in ("dare", "dare_ties")]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_slerp_is_on_the_arc(fraction: float) -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    angle = torch.tensor(fraction * torch.pi / 2)
    torch.testing.assert_close(slerp(a, b, fraction), torch.stack([angle.cos(), angle.sin()]))


def test_slerp_of_nearly_parallel_vectors_is_the_chord() -> None:
    assert slerp_weights(1.0, 0.3) == (0.7, 0.3)
    assert slerp_weights(1.0 - 1e-9, 0.3) == pytest.approx((0.7, 0.3), abs=1e-6)


@given(seed=SEEDS, fraction=FRACTIONS)
@settings(max_examples=30, deadline=None)
def test_slerp_keeps_equal_norms_and_does_not_care_for_order(seed: int, fraction: float) -> None:
    a, b = (torch.nn.functional.normalize(vector(s), dim=0) for s in (seed, seed + 1))
    assert slerp(a, b, fraction).norm().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(slerp(a, b, fraction), slerp(b, a, 1 - fraction), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", sorted(KERNELS))
@given(seed=SEEDS, which=st.integers(0, 1))
@settings(max_examples=20, deadline=None)
def test_weight_one_gives_that_parent_and_weight_zero_nothing_of_the_other(merge: str, seed: int, which: int) -> None:
    taus, weights = [vector(seed), vector(seed + 1)], (float(which == 0), float(which == 1))
    torch.testing.assert_close(child(merge, taus, weights, 0.0), taus[which])


@pytest.mark.parametrize("merge", ["linear", "slerp", "ties"])
@given(seed=SEEDS, weight=FRACTIONS, drop_rate=st.floats(0, 0.9))
@settings(max_examples=20, deadline=None)
def test_the_order_of_parents_does_not_matter(merge: str, seed: int, weight: float, drop_rate: float) -> None:
    a, b = vector(seed), vector(seed + 1)
    one, other = (
        child(merge, [a, b], (weight, 1 - weight), drop_rate),
        child(merge, [b, a], (1 - weight, weight), drop_rate),
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("merge", sorted(KERNELS))
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_entries_are_merged_apart(merge: str, seed: int) -> None:
    """Permuting the entries of the parents permutes the child's, masks aside."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    taus = [vector(seed), vector(seed + 1)]
    drop_rate = 0.0 if merge.startswith("dare") else 0.4
    moved = child(merge, [tau[order] for tau in taus], (0.3, 0.7), drop_rate)
    torch.testing.assert_close(moved, child(merge, taus, (0.3, 0.7), drop_rate)[order])


def test_mean_over_seeds_of_a_dare_child_is_the_linear_child() -> None:
    taus = [vector(5, 200), vector(6, 200)]
    mean = torch.stack([child("dare", taus, (0.3, 0.7), 0.5, seed) for seed in range(3000)]).mean(dim=0)
    expected = child("linear", taus, (0.3, 0.7), 0.0)
    deviation = ((0.3 * taus[0]) ** 2 + (0.7 * taus[1]) ** 2).sqrt()  # of one draw, p = 1/2
    assert ((mean - expected).abs() <= 5 * deviation / 3000**0.5).all()


@pytest.mark.parametrize("merge", [name for name, kernel in KERNELS.items() if kernel.linear])
def test_masking_multiplies_the_squared_norm_by_its_scale(merge: str) -> None:
    kernel, tau = KERNELS[merge], vector(7, 200_000)
    mask = kernel.mask(tau, 0.5, (0,), 0)
    grown = (kernel.scale(0.5) * tau * (1 if mask is None else mask)).square().sum() / tau.square().sum()
    assert grown.item() == pytest.approx(kernel.scale(0.5), rel=0.02)
