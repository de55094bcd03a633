"""Scoring, pre-optimisation and the whole routing stage on a tiny MoE."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_dense, perturbed
from upcycle.data.batches import collate
from upcycle.data.chat import Sample
from upcycle.data.splits import SeedData, load_splits
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import load_model, load_routers
from upcycle.recipe import Recipe
from upcycle.records.files import ROUTE_REPORT
from upcycle.routing.routers import GatedRouter, RouterRecorder, RowExperts, random_routers, swapped_routers
from upcycle.settings import RouteSettings
from upcycle.stages.router_initialization.preoptimise import auxiliary_loss, gated_losses, preoptimise
from upcycle.stages.router_initialization.route import route
from upcycle.stages.router_initialization.scoring import expert_losses
from upcycle.weights.base import load_tokenizer
from worlds import as_base, assembled

NAMES = ["c1", "c2", "c3"]
SETTINGS = RouteSettings(epochs=3, tokens_per_batch=256, learning_rate=0.01)


@pytest.fixture(scope="module")
def moe(base: Path, checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe")
    return assembled(base, checkpoints, out)


@pytest.fixture
def samples(recipe: Recipe, base: Path) -> list[Sample]:
    return load_splits(recipe, load_tokenizer(base, None), 128).train[:13]


def answer_loss(folder: Path, sample: Sample) -> float:
    model = load_model(folder, torch.float32)
    labels = torch.tensor([sample.labels])
    with torch.no_grad():
        logits = model(torch.tensor([sample.input_ids])).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100).item()


def test_scores_are_the_checkpoints_own_losses(moe: Path, checkpoints: list[Path], samples: list[Sample]) -> None:
    found = expert_losses(load_model(moe, torch.float32), samples, 256, 0)
    for i in (0, 5, 12):
        for expert, checkpoint in enumerate(checkpoints):
            assert found[i, expert].item() == pytest.approx(answer_loss(checkpoint, samples[i]), abs=1e-5)


def test_auxiliary_loss_is_the_cross_entropy_of_saying_yes() -> None:
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    yes = torch.nn.functional.binary_cross_entropy(torch.sigmoid(scores), torch.ones(2, 6), reduction="none")
    per_token = yes.mean(dim=0).view(2, 3)
    expected = (per_token[0, :2].mean() + per_token[1, 0]) / 2
    torch.testing.assert_close(auxiliary_loss(scores, mask), expected)


def test_only_routing_vectors_learn_and_only_those_of_experts_with_samples(moe: Path, samples: list[Sample]) -> None:
    model = load_model(moe, torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    start = random_routers(2, 3, 32, 0.02, 0)
    pairs = [(i, i % 2) for i in range(len(samples))]  # nothing for expert 2
    vectors, log = preoptimise(model, samples, pairs, start, SETTINGS, 0, 0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for layer in range(2):
        assert torch.equal(vectors[layer][2], start[layer][2])
        assert not torch.equal(vectors[layer][0], start[layer][0])
    assert log[-1]["auxiliary_loss"] < log[0]["auxiliary_loss"]


def test_memory_does_not_decide_what_is_learned(moe: Path, samples: list[Sample]) -> None:
    """A step takes as many samples whatever goes through the model at once."""
    model, start = load_model(moe, torch.float32), random_routers(2, 3, 32, 0.02, 0)
    pairs = [(i, i % 3) for i in range(len(samples))]
    made = []
    for limit in (1, 100, 100_000):
        settings = SETTINGS.model_copy(update={"tokens_per_batch": limit, "batch_size": 4})
        made.append(preoptimise(model, samples, pairs, start, settings, 0, 0))
    for vectors, log in made[1:]:
        torch.testing.assert_close(vectors, made[0][0], rtol=1e-4, atol=1e-6)
        assert log[-1] == pytest.approx(made[0][1][-1], rel=1e-4)
    fewer = SETTINGS.model_copy(update={"batch_size": len(samples)})
    moved = [(v - s).norm() for v, s in zip(made[0][0], start, strict=True)]
    less = [
        (v - s).norm() for v, s in zip(preoptimise(model, samples, pairs, start, fewer, 0, 0)[0], start, strict=True)
    ]
    assert all(far > near for far, near in zip(moved, less, strict=True))


def test_a_router_that_has_hardly_moved_is_said(
    base: Path, moe: Path, samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cosine(rate: float) -> float:
        settings = SETTINGS.model_copy(update={"start": "upit", "learning_rate": rate})
        report = route(as_base(base), moe, SeedData(samples[:9], []), NAMES, settings, 0, tmp_path)
        return max(report.cosine)

    assert cosine(1e-6) == pytest.approx(1.0, abs=1e-3)
    assert "the router is nearly the random one that it began from (cosine 1.00 to 1.00)" in capsys.readouterr().out
    assert cosine(0.1) < 0.9
    assert "nearly the random one" not in capsys.readouterr().out


def test_language_model_loss_reaches_the_routing_vectors_through_the_gate(moe: Path, samples: list[Sample]) -> None:
    model = load_model(moe, torch.float32)
    rows = RowExperts()
    batch = collate(samples, [0, 1], 0, "cpu")
    rows.experts = torch.tensor([0, 2])
    start = random_routers(2, 3, 32, 0.02, 0)
    with swapped_routers(model, lambda layer: GatedRouter(rows, start[layer])) as routers:
        language, _ = gated_losses(model, batch, routers, "all")
        language.backward()
        for router in routers:
            assert (router.vectors.grad[[0, 2]].abs().sum(dim=1) > 0).all()
            assert (router.vectors.grad[1] == 0).all()


@pytest.mark.parametrize("start", ["upit", "random"])
def test_the_stage_writes_a_router_that_loads(
    start: str, base: Path, moe: Path, samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SETTINGS.model_copy(update={"start": start})
    report = route(as_base(base), moe, SeedData(samples[:9], samples[9:]), NAMES, settings, 0, tmp_path)
    assert [b.samples for b in report.buckets] == [3, 3, 3]
    assert ROUTE_REPORT.read(tmp_path) == report
    tensors = load_file(tmp_path / "router.safetensors")
    model = load_model(moe, torch.float32)
    load_routers(model, tmp_path / "router.safetensors")
    for layer in range(2):
        loaded = model.model.layers[layer].mlp.gate.weight
        assert torch.equal(loaded, tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"])
    found = [first_choice(model, sample) for sample in samples[9:]]
    hits = [choice == expert for choice, expert in zip(found, report.held_out.assigned, strict=True)]
    assert report.held_out.accuracy == pytest.approx(sum(hits) / len(hits))
    said = capsys.readouterr().out
    share = f"{report.held_out.accuracy:.1%} of {len(samples) - 9} unseen seed samples (chance 33.3%; always naming the"
    assert f"the router ranks the assigned expert first for {share} most frequent expert would give " in said
    change = f"{abs(report.difference.gain):.4f} {'lower' if report.difference.gain >= 0 else 'higher'}"
    assert f"the loss is {change} than with the best single expert (gain {report.difference.gain:.4f}, 95% of" in said
    assert f"router start {start}: {report.cost.forward:,} tokens forward, " in said


@torch.no_grad()
def first_choice(model: torch.nn.Module, sample: Sample) -> int:
    """The expert with the largest mean router probability over all tokens and layers."""
    with RouterRecorder(model) as recorder:
        model(torch.tensor([sample.input_ids]))
    return int(
        torch.stack([torch.softmax(logits, dim=1).mean(dim=0) for logits in recorder.logits]).mean(dim=0).argmax()
    )


def test_nothing_is_said_of_domains_where_there_is_one(
    base: Path, moe: Path, samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alike = [replace(sample, domain="all") for sample in samples]
    report = route(as_base(base), moe, SeedData(alike[:9], alike[9:]), NAMES, SETTINGS, 0, tmp_path)
    assert report.difference is None
    assert "noise" not in capsys.readouterr().out


def test_a_norm_behind_the_ffn_is_said_to_take_the_gate_away(
    samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = make_dense(tmp_path / "olmo", model_type="olmo2")
    made = assembled(dense, [perturbed(dense, tmp_path / f"c{i}", i) for i in range(3)], tmp_path / "moe")
    settings = SETTINGS.model_copy(update={"start": "upit"})
    route(as_base(dense), made, SeedData(samples[:9], []), NAMES, settings, 0, tmp_path)
    assert "L_aux alone trains them" in capsys.readouterr().out
    model, rows, start = load_model(made, torch.float32), RowExperts(), random_routers(2, 3, 32, 0.02, 0)
    with swapped_routers(model, lambda layer: GatedRouter(rows, start[layer])) as routers:
        vectors = [router.vectors for router in routers]
        losses = gated_losses(model, collate(samples, [0], 0, "cpu"), routers, "all")
        language, auxiliary = (torch.autograd.grad(loss, vectors, retain_graph=True) for loss in losses)
    assert all(one.norm() < 1e-4 * other.norm() for one, other in zip(language, auxiliary, strict=True))


def test_separable_data_are_routed_to_their_expert(moe: Path, samples: list[Sample], tmp_path: Path) -> None:
    """If the two halves of the data are told apart by their tokens, the pre-optimised router tells them apart."""
    model = load_model(moe, torch.float32)
    halves: list[list[Sample]] = [[], []]
    for sample in samples:
        halves[sample.domain == "reverse"].append(sample)
    ordered = [*halves[0], *halves[1]]
    pairs = [(i, int(i >= len(halves[0]))) for i in range(len(ordered))]
    settings = SETTINGS.model_copy(update={"epochs": 40, "learning_rate": 0.03})
    vectors, log = preoptimise(model, ordered, pairs, random_routers(2, 3, 32, 0.0, 0), settings, 0, 0)
    assert log[-1]["auxiliary_loss"] < 0.2 < log[0]["auxiliary_loss"]
    assert all(vector[2].abs().sum() == 0 for vector in vectors)


def test_an_empty_bucket_is_named_and_its_expert_still_learns(
    base: Path, moe: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import upcycle.stages.router_initialization.route as module

    monkeypatch.setattr(module, "expert_losses", lambda _m, s, *_: torch.tensor([[0.0, 1.0, 2.0]]).repeat(len(s), 1))
    settings = SETTINGS.model_copy(update={"assignment": "lowest_loss"})
    route(as_base(base), moe, SeedData(samples, []), NAMES, settings, 0, tmp_path)
    printed = capsys.readouterr().out
    assert "no seed sample was assigned to expert 1 (c2)" in printed
    assert "no seed sample was assigned to expert 2 (c3)" in printed
    start = random_routers(2, 3, 32, SETTINGS.init_std, 0)
    for vector, before in zip(load_file(tmp_path / "router.safetensors").values(), start, strict=True):
        assert ((vector - before).abs().sum(dim=1) > 0).all()


def test_fewer_seed_samples_than_experts_are_refused(
    base: Path, moe: Path, samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(UpcycleError, match="2 seed samples for 3 experts"):
        route(as_base(base), moe, SeedData(samples[:2], []), NAMES, SETTINGS, 0, tmp_path)
