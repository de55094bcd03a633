"""The plan: who is merged with whom, and what the Gram matrix says about the children."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import perturbed
from upcycle.errors import UpcycleError
from upcycle.experts.gram import piece_gram, task_vector_gram
from upcycle.experts.kinds import KINDS
from upcycle.merging.lineage import Child, materialise
from upcycle.records.files import PLAN
from upcycle.records.plan import Checkpoint, similarities
from upcycle.settings import ExpandSettings
from upcycle.stages.expert_expansion.expand import expand
from upcycle.stages.expert_expansion.plan import add_child, choose_checkpoints, make_plan
from upcycle.weights.safetensors_io import ModelReader
from worlds import as_base


def points(n: int) -> list[Checkpoint]:
    return [Checkpoint(name=f"c{i}", path=f"c{i}") for i in range(n)]


def gram_of(vectors: torch.Tensor) -> np.ndarray:
    return (vectors.double() @ vectors.double().T).numpy()


def test_gram_is_the_inner_products_of_ffn_task_vectors(base: Path, checkpoints: list[Path]) -> None:
    def flat(folder: Path) -> torch.Tensor:
        reader = ModelReader(folder)
        names = [n for n in reader.names() if ".mlp." in n]
        return torch.cat([reader.elements(n).double() for n in names])

    taus = torch.stack([flat(c) - flat(base) for c in checkpoints])
    np.testing.assert_allclose(task_vector_gram(as_base(base), checkpoints), gram_of(taus), rtol=1e-6)


def test_most_dissimilar_pair_is_merged_first() -> None:
    angles = torch.tensor([0.0, 0.3, 1.2])
    vectors = torch.stack([torch.cos(angles), torch.sin(angles)], dim=1)
    plan = make_plan(points(3), gram_of(vectors), ExpandSettings(num_experts=4), seed=0)
    assert plan.experts[3].parents == (0, 2)
    assert plan.experts[3].similarity == pytest.approx(np.cos(1.2))
    assert sum(plan.experts[3].weights) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_similarities_follow_their_definitions(kind: str) -> None:
    vectors = torch.randn(4, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = similarities(gram_of(vectors), kind)
    for i in range(4):
        for j in range(4):
            cosine = torch.nn.functional.cosine_similarity(vectors[i], vectors[j], dim=0)
            expected = cosine if kind == "cosine" else -((vectors[i] - vectors[j]) ** 2).sum()
            assert found[i, j] == pytest.approx(expected.item(), abs=1e-9)


def test_predicted_inner_products_match_the_materialised_children() -> None:
    """Within five standard errors of a Monte Carlo over entries: 2e5 of them, p = 0.5."""
    generator = torch.Generator().manual_seed(0)
    n = 200_000
    base = torch.randn(n, generator=generator)
    experts = [base + torch.randn(n, generator=generator) for _ in range(2)]
    gram = gram_of(torch.stack([e - base for e in experts]))
    children = [Child((0, 1), (0.3, 0.7)), Child((0, 2), (0.8, 0.2)), Child((2, 3), (0.5, 0.5))]
    for child in children:
        gram = add_child(gram, child.parents, child.weights, 1 / (1 - 0.5))
    made = [*experts, *materialise(base, experts, children, "dare", 0.5, 0, "w")]
    found = gram_of(torch.stack([e - base for e in made]))
    np.testing.assert_allclose(found / n, gram / n, atol=5 * 3 / n**0.5)


def test_without_dropping_the_prediction_is_exact() -> None:
    vectors = torch.randn(3, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    child = 0.25 * vectors[0] + 0.75 * vectors[2]
    expected = gram_of(torch.cat([vectors, child[None]]))
    np.testing.assert_allclose(add_child(gram_of(vectors), (0, 2), (0.25, 0.75), 1.0), expected)


def test_avoid_never_merges_a_pair_twice_and_allow_may() -> None:
    vectors = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    avoided = make_plan(points(3), gram_of(vectors), ExpandSettings(num_experts=12, drop_rate=0), seed=0)
    pairs = [e.parents for e in avoided.experts[3:]]
    assert len(set(pairs)) == len(pairs)
    allow = ExpandSettings(num_experts=12, drop_rate=0, repeat_pairs="allow")
    allowed = [e.parents for e in make_plan(points(3), gram_of(vectors), allow, seed=0).experts[3:]]
    assert len(set(allowed)) < len(allowed)


def test_a_plan_is_the_same_for_a_seed_and_survives_its_file(tmp_path: Path) -> None:
    gram = gram_of(torch.randn(4, 50, generator=torch.Generator().manual_seed(3)))
    settings = ExpandSettings(num_experts=8, parents="random")
    plan = make_plan(points(4), gram, settings, seed=5)
    assert plan == make_plan(points(4), gram, settings, seed=5)
    assert plan != make_plan(points(4), gram, settings, seed=6)
    PLAN.write(tmp_path, plan)
    assert PLAN.read(tmp_path) == plan


@pytest.mark.parametrize(
    ("vectors", "num_experts", "message"),
    [
        (torch.eye(1), 3, "expected 2 or more"),
        (torch.tensor([[1.0, 0.0], [0.0, 0.0]]), 3, "c1 has the base's FFN weights"),
        (torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]), 3, "c1 has FFN weights that are not finite"),
    ],
)
def test_refuses_what_cannot_be_expanded(vectors: torch.Tensor, num_experts: int, message: str) -> None:
    with pytest.raises(UpcycleError, match=message):
        make_plan(points(len(vectors)), gram_of(vectors), ExpandSettings(num_experts=num_experts), seed=0)


def line(n: int) -> np.ndarray:
    """Checkpoints along a run that goes straight: norms 1..n, then a turn at the end."""
    vectors = torch.stack([torch.tensor([float(i + 1), 0.0, 0.0]) for i in range(n)])
    vectors[-1] = torch.tensor([0.0, float(n), 0.0])
    vectors[1] = torch.tensor([1.0, 0.0, 5.0])
    return gram_of(vectors)


@pytest.mark.parametrize(
    ("select", "count", "expected"),
    [
        ("first", 3, [0, 1, 2]),
        ("last", 3, [5, 6, 7]),
        ("uniform", 4, [1, 3, 5, 7]),
        ("uniform", 3, [2, 5, 7]),
        ("uniform", 8, list(range(8))),
        ("farthest", 2, [0, 7]),
        ("farthest", 3, [0, 1, 7]),
    ],
)
def test_more_checkpoints_than_wanted_are_thinned(select: str, count: int, expected: list[int]) -> None:
    assert choose_checkpoints(similarities(line(8), "cosine"), count, select) == expected
    settings = ExpandSettings(num_experts=max(8, count), num_checkpoints=count, select=select)
    plan = make_plan(points(8), line(8), settings, seed=0)
    assert [e.checkpoint for e in plan.sources] == expected
    np.testing.assert_allclose(np.array(plan.gram)[:count, :count], line(8)[np.ix_(expected, expected)])


def test_farthest_is_greedy_on_the_greatest_similarity_to_the_chosen() -> None:
    gram = gram_of(torch.randn(9, 5, generator=torch.Generator().manual_seed(4)))
    similarity = similarities(gram, "l2")
    chosen = set(choose_checkpoints(similarity, 2, "farthest"))
    assert similarity[tuple(chosen)] == similarity.min()
    for count in range(3, 9):
        more = set(choose_checkpoints(similarity, count, "farthest"))
        (new,) = more - chosen
        rest = set(range(9)) - chosen
        assert new == min(rest, key=lambda i: max(similarity[i, j] for j in chosen))
        chosen = more


def test_fewer_experts_than_checkpoints_thin_them() -> None:
    plan = make_plan(points(8), line(8), ExpandSettings(num_experts=4), seed=0)
    assert [e.name for e in plan.experts] == ["c1", "c3", "c5", "c7"]


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_the_base_may_be_an_expert(similarity: str) -> None:
    settings = ExpandSettings(num_experts=6, keep_base=True, similarity=similarity)
    plan = make_plan(points(2), gram_of(torch.tensor([[3.0, 0.0], [3.0, 0.1]])), settings, seed=0)
    assert [e.kind for e in plan.experts[:4]] == ["checkpoint", "checkpoint", "base", "child"]
    assert plan.gram[2] == (0.0,) * 6
    parents = {parent for e in plan.children for parent in e.parents}
    assert (2 in parents) == (similarity == "l2")  # it has no direction, but a distance


def test_children_that_are_not_linear_are_measured(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    settings = ExpandSettings(num_experts=5, merge="ties", drop_rate=0.6)
    plan = expand(KINDS["ffn"], as_base(base), points(3), checkpoints, settings, 7, tmp_path)
    children = [Child(e.parents, e.weights) for e in plan.children]
    flat = [[], [], [], [], []]
    readers = [ModelReader(folder) for folder in (base, *checkpoints)]
    for name in (n for n in readers[0].names() if ".mlp." in n):
        theta, *experts = (reader.elements(name) for reader in readers)
        for i, expert in enumerate([*experts, *materialise(theta, experts, children, "ties", 0.6, 7, name)]):
            flat[i].append(expert.double() - theta.double())
    taus = torch.stack([torch.cat(parts) for parts in flat])
    np.testing.assert_allclose(np.array(plan.gram), gram_of(taus), rtol=1e-5)


def test_one_checkpoint_twice_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    vectors = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    vectors[2] = vectors[0]
    make_plan(points(3), gram_of(vectors), ExpandSettings(num_experts=3), seed=0)
    said = " ".join(capsys.readouterr().out.split())
    assert said == "warning: expand: c0 and c2 have the same FFN weights and make the same expert; leave one out"
    make_plan(points(3), gram_of(vectors), ExpandSettings(num_experts=3, copies_of="last"), seed=0)
    vectors[2] += 1e-3
    make_plan(points(3), gram_of(vectors), ExpandSettings(num_experts=3), seed=0)
    assert not capsys.readouterr().out


def test_a_spherical_child_keeps_the_norm_of_its_parents() -> None:
    gram = np.array([[4.0, 1.0], [1.0, 4.0]])
    plan = make_plan(points(2), gram, ExpandSettings(num_experts=3, merge="slerp"), seed=0)
    assert plan.gram[2][2] == pytest.approx(4.0)


def test_nan_and_inf_are_named(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    broken = perturbed(base, tmp_path / "broken", 9)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 4:6] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpcycleError, match=rf"broken: 2 of the 1536 values of {name} are NaN or Inf"):
        task_vector_gram(as_base(base), [*checkpoints, broken])


def test_the_sum_over_many_entries_stays_exact() -> None:
    """3e7 equal entries: in fp32 alone the sum would stop growing at 2^24 times its step."""
    ones = torch.ones(1 << 25)
    gram = piece_gram(torch.zeros(1 << 25), [ones, ones * 3])
    assert gram.tolist() == [[2.0**25, 3 * 2.0**25], [3 * 2.0**25, 9 * 2.0**25]]


@pytest.mark.parametrize(("copies_of", "refused"), [("none", 0), ("last", 1), ("base", None)])
def test_only_what_becomes_an_expert_must_have_been_trained(copies_of: str, refused: int | None) -> None:
    for untrained in (0, 1):
        vectors = torch.eye(2)
        vectors[untrained] = 0
        settings = ExpandSettings(num_experts=2, copies_of=copies_of)
        if copies_of == "none" or untrained == refused:
            with pytest.raises(UpcycleError, match=f"c{untrained} has the base's FFN weights"):
                make_plan(points(2), gram_of(vectors), settings, seed=0)
        else:
            assert len(make_plan(points(2), gram_of(vectors), settings, seed=0).experts) == 2


def test_children_that_leave_their_parents_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Each generation of DARE adds to the norm."""
    gram = gram_of(torch.randn(4, 50, generator=torch.Generator().manual_seed(0)))
    make_plan(points(4), gram, ExpandSettings(num_experts=16, drop_rate=0.2), seed=0)
    assert "as far from the base" not in capsys.readouterr().out
    plan = make_plan(points(4), gram, ExpandSettings(num_experts=16, drop_rate=0.9), seed=0)
    norms = np.sqrt(np.diag(np.array(plan.gram)))
    said = " ".join(capsys.readouterr().out.split())
    assert f" is {norms.max() / norms[:4].max():,.1f} times as far from the base as any checkpoint; lower" in said
