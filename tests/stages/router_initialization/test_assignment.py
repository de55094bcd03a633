"""Assignment of seed samples to experts."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upcycle.errors import UpcycleError
from upcycle.stages.router_initialization.assignment import (
    assign,
    assign_unseen,
    balanced,
    bootstrap_gain,
    bucket_table,
    by_domain,
    centred,
    equal_steps,
    fill_empty,
    lowest_loss,
    margins,
)
from worlds import a_sample


@given(n=st.integers(2, 40), m=st.integers(2, 6), seed=st.integers(0, 100))
def test_balanced_buckets_differ_by_at_most_one(n: int, m: int, seed: int) -> None:
    experts = balanced(np.random.default_rng(seed).normal(size=(n, m)))
    sizes = np.bincount(experts, minlength=m)
    assert sizes.sum() == n
    assert sizes.max() - sizes.min() <= 1


def test_many_samples_are_assigned_in_parts_that_are_balanced() -> None:
    losses = np.random.default_rng(0).normal(size=(2503, 8))
    experts = balanced(losses)
    sizes = np.bincount(experts, minlength=8)
    assert sizes.max() - sizes.min() <= 1
    own = losses[np.arange(len(losses)), experts].mean()
    assert own == pytest.approx(losses.min(axis=1).mean(), abs=0.05)  # nearly as good as without balance


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
    samples = [a_sample("a:1"), a_sample("a:2")]
    with pytest.raises(UpcycleError, match="a:2 under expert 1 is not finite"):
        assign(np.array([[1.0, 1.0], [1.0, np.nan]]), samples, "balanced", 0)


def test_centred_gives_a_sample_to_the_expert_that_does_best_for_itself() -> None:
    losses = np.array([[1.0, 3.0], [1.0, 2.0]])  # expert 0 is better at both, expert 1 least bad at the second
    assert lowest_loss(losses).tolist() == [0, 0]
    assert centred(losses).tolist() == [0, 1]


def test_domains_are_spread_over_the_experts_that_are_best_at_them() -> None:
    domains = ["a", "a", "b", "c", "c", "c"]
    losses = np.array([[0.0, 5, 5], [1, 5, 5], [0.1, 0.2, 9], [9, 9, 0], [0, 9, 1], [9, 9, 0]])
    assert by_domain(losses, domains).tolist() == [0, 0, 1, 2, 2, 2]


def test_more_domains_than_experts_share_them_evenly() -> None:
    domains = list("aabbccddee")
    experts = by_domain(np.random.default_rng(0).normal(size=(10, 2)), domains)
    of_domain = {d: set(experts[[i for i, x in enumerate(domains) if x == d]].tolist()) for d in "abcde"}
    assert all(len(found) == 1 for found in of_domain.values())
    assert sorted(np.bincount([found.pop() for found in of_domain.values()]).tolist()) == [2, 3]


def test_without_domains_there_is_nothing_to_assign_by() -> None:
    with pytest.raises(UpcycleError, match=r"found 2 seed rows of one domain, 'x'; give rows a field `domain`"):
        assign(np.ones((2, 2)), [a_sample(), a_sample()], "domain", 0)


def test_random_buckets_are_equal_and_know_no_loss() -> None:
    samples = [a_sample() for _ in range(9)]
    found = [assign(losses, samples, "random", 1).tolist() for losses in (np.ones((9, 3)), np.eye(9)[:, :3])]
    assert found[0] == found[1]
    assert np.bincount(found[0]).tolist() == [3, 3, 3]
    assert found[0] != assign(np.ones((9, 3)), samples, "random", 2).tolist()


def test_equal_steps_repeat_small_buckets() -> None:
    pairs = equal_steps([(0, 0), (1, 0), (2, 0), (3, 1), (4, 1)])
    assert sorted(pairs) == [(0, 0), (1, 0), (2, 0), (3, 1), (3, 1), (4, 1)]


def test_margins_and_buckets() -> None:
    losses = np.array([[1.0, 1.5, 4.0], [2.0, 0.5, 0.75]])
    assert margins(losses).tolist() == [0.5, 0.25]
    table = bucket_table(np.array([0, 1]), [a_sample(domain="a"), a_sample(domain="b")], losses, ["c0", "c1", "c2"])
    assert [row.samples for row in table] == [1, 1, 0]
    assert table[1].domains == {"b": 1}
    assert (table[1].mean_loss, table[1].bucket_loss, table[1].margin) == (1.0, 0.5, 0.25)
    assert table[2].margin is None


def test_the_bootstrap_tells_experts_of_domains_from_noise() -> None:
    draw = np.random.default_rng(0)
    domains = [("a", "b", "c")[i % 3] for i in range(90)]
    noise = draw.normal(size=(90, 4))
    found = bootstrap_gain(noise, domains, 0)
    assert not found.more_than_noise
    assert found.interval[0] < 0 < found.interval[1]
    skilled = noise - 2.0 * np.array([[d == "abc"[e] if e < 3 else False for e in range(4)] for d in domains])
    found = bootstrap_gain(skilled, domains, 0)
    assert found.more_than_noise
    assert found.gain == pytest.approx(4 / 3, abs=0.4)  # the best single expert is right in one domain of three


def test_unseen_samples_have_the_expert_that_started_from_their_domain() -> None:
    """Not the one that few unseen samples would choose; of an unknown domain, the best."""
    samples = [a_sample(domain="x"), a_sample(domain="z")]
    losses = np.array([[0.1, 9.0], [9.0, 0.1]])
    assert assign_unseen(losses, samples, "domain", 0, {"x": 1, "y": 0}) == [1, 1]
    assert assign_unseen(losses[:1], samples[:1], "domain", 0, {"x": 1}) == [1]  # one domain is no error here
    assert assign_unseen(losses, samples, "lowest_loss", 0, {"x": 1}) == [0, 1]
