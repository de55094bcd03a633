"""DARE and the lineage, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.merging.dare import dare
from upcycle.merging.lineage import Child, materialise
from upcycle.merging.random_bits import dropped_levels, keep_mask

N = 20_000


def vector(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
def test_keeps_a_share_of_one_minus_p_and_rescales_it(drop_rate: float) -> None:
    tau = vector(0)
    dropped = dare(tau, drop_rate, (0, "a"))
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(1 - drop_rate, abs=4 * (drop_rate * (1 - drop_rate) / N) ** 0.5)
    exact = 65536 / (65536 - dropped_levels(drop_rate))
    assert exact == pytest.approx(1 / (1 - drop_rate), rel=1e-4)
    torch.testing.assert_close(dropped[kept], tau[kept] * exact)


def test_mean_over_masks_is_the_task_vector() -> None:
    tau = vector(1, 200)
    mean = torch.stack([dare(tau, 0.5, (seed, "a")) for seed in range(4000)]).mean(dim=0)
    # the standard error of an entry is |tau| sqrt(p / (1 - p) / 4000)
    assert ((mean - tau).abs() <= 5 * tau.abs() / 4000**0.5).all()


def test_without_dropping_nothing_changes() -> None:
    tau = vector(2)
    assert torch.equal(dare(tau, 0.0, (0,)), tau)


@given(cut=st.integers(1, 299), key=st.tuples(st.integers(0, 9), st.integers(0, 9), st.text(max_size=5)))
@settings(max_examples=50, deadline=None)
def test_any_cut_gives_the_same_mask(cut: int, key: tuple) -> None:
    whole = keep_mask(key, 0, 300, 0.4)
    pieces = torch.cat([keep_mask(key, 0, cut, 0.4), keep_mask(key, cut, 300 - cut, 0.4)])
    assert torch.equal(whole, pieces)


def test_masks_of_different_keys_are_independent() -> None:
    keys = [(0, 2, 0, "a"), (0, 2, 1, "a"), (0, 3, 0, "a"), (1, 2, 0, "a"), (0, 2, 0, "b")]
    masks = torch.stack([keep_mask(key, 0, N, 0.5).float() for key in keys])
    correlation = torch.corrcoef(masks) - torch.eye(len(keys))
    assert correlation.abs().max() < 5 / N**0.5


def test_children_follow_their_formula_and_may_have_children() -> None:
    base, a, b = vector(6), vector(7), vector(8)
    children = [Child((0, 1), (0.3, 0.7)), Child((2, 0), (0.6, 0.4))]
    first, second = materialise(base, [a, b], children, "dare", 0.2, 11, "w")
    tau = 0.3 * dare(a - base, 0.2, (11, 2, 0, "w")) + 0.7 * dare(b - base, 0.2, (11, 2, 1, "w"))
    torch.testing.assert_close(first, base + tau)
    expected = base + 0.6 * dare(tau, 0.2, (11, 3, 2, "w")) + 0.4 * dare(a - base, 0.2, (11, 3, 0, "w"))
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("merge", ["dare", "linear", "dare_ties"])
def test_pieces_of_a_tensor_give_the_same_children(merge: str) -> None:
    base, a, b = vector(6), vector(7), vector(8)
    children = [Child((0, 1), (0.3, 0.7)), Child((2, 0), (0.6, 0.4))]
    whole = materialise(base, [a, b], children, merge, 0.2, 0, "w")
    cut = 7777
    head = materialise(base[:cut], [a[:cut], b[:cut]], children, merge, 0.2, 0, "w")
    tail = materialise(base[cut:], [a[cut:], b[cut:]], children, merge, 0.2, 0, "w", start=cut)
    for one, first, rest in zip(whole, head, tail, strict=True):
        assert torch.equal(one, torch.cat([first, rest]))
