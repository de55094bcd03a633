"""Assignment of seed samples to experts."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle.errors import UpcycleError
from upcycle.router_initialization.assignment import assign, balanced, fill_empty, lowest_loss


@given(n=st.integers(2, 40), m=st.integers(2, 6), seed=st.integers(0, 100))
def test_balanced_buckets_differ_by_at_most_one(n: int, m: int, seed: int) -> None:
    experts = balanced(np.random.default_rng(seed).normal(size=(n, m)))
    sizes = np.bincount(experts, minlength=m)
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("n", [4, 5, 6])
def test_balanced_has_the_least_total_loss(n: int) -> None:
    losses = np.random.default_rng(n).normal(size=(n, 2))
    found = balanced(losses)
    candidates = [np.array(c) for c in itertools.product(range(2), repeat=n) if abs(2 * sum(c) - n) <= n % 2]
    best = min(losses[np.arange(n), c].sum() for c in candidates)
    assert losses[np.arange(n), found].sum() == pytest.approx(best)


def test_lowest_loss_gives_each_sample_its_best_expert() -> None:
    assert lowest_loss(np.array([[1.0, 2.0], [3.0, 0.5], [2.0, 2.0]])).tolist() == [0, 1, 0]


def test_an_empty_bucket_gets_the_samples_nearest_to_it() -> None:
    losses = np.array([[0.0, 9.0, 0.1], [0.0, 9.0, 5.0], [9.0, 0.0, 0.3], [9.0, 0.0, 0.2], [9.0, 0.0, 4.0], [0, 9, 9]])
    assert fill_empty(lowest_loss(losses), losses) == {2: [0]}


def test_a_loss_that_is_not_finite_names_the_sample() -> None:
    samples = [SimpleNamespace(where="a:1"), SimpleNamespace(where="a:2")]
    with pytest.raises(UpcycleError, match="a:2 under expert 1 is not finite"):
        assign(np.array([[1.0, 1.0], [1.0, np.nan]]), samples, "balanced")
