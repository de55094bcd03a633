"""Routing figures against their definitions."""

import math

import pytest

from upcycle.evaluation.routing import entropy, regressions, routing_metrics, specialisation


def test_entropy_is_one_when_even_and_zero_when_collapsed() -> None:
    assert entropy([0.25] * 4) == pytest.approx(1.0)
    assert entropy([1.0, 0.0, 0.0, 0.0]) == 0.0
    assert entropy([0.5, 0.5, 0.0, 0.0]) == pytest.approx(math.log(2) / math.log(4))


def test_metrics_are_per_domain_and_layer() -> None:
    found = routing_metrics({"a": [[0.5, 0.5, 0.0, 0.0], [0.25] * 4], "b": [[0.998, 0.002, 0.0, 0.0]]})
    assert found["a"].max_over_mean == pytest.approx([2.0, 1.0])
    assert found["a"].dead == [2, 0]
    assert found["b"].dead == [3]  # 0.002 is 0.8% of the mean load


def test_specialisation_is_how_far_domains_are_from_the_whole() -> None:
    same = {"all": [[0.5, 0.5]], "a": [[0.5, 0.5]], "b": [[0.5, 0.5]]}
    apart = {"all": [[0.5, 0.5]], "a": [[1.0, 0.0]], "b": [[0.0, 1.0]]}
    assert specialisation(same, "all") == [0.0]
    assert specialisation(apart, "all") == [0.5]


def test_regressions_are_against_the_best_expert_of_each_domain() -> None:
    experts = {"c1": {"all": 1.0, "a": 0.5, "b": 1.5}, "c2": {"all": 0.9, "a": 0.8, "b": 1.0}}
    found = regressions({"all": 0.7, "a": 0.6, "b": 0.9}, experts)
    assert (found["a"].best_expert, found["a"].loss_above_it) == ("c1", pytest.approx(0.1))
    assert (found["b"].best_expert, found["b"].loss_above_it) == ("c2", pytest.approx(-0.1))
    assert found["all"].best_expert == "c2"
