"""The ways to start a router, against their definitions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upcycle.data.chat import Sample
from upcycle.data.splits import SeedData, load_splits
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import load_model
from upcycle.recipe import Recipe
from upcycle.routing.routers import random_routers
from upcycle.settings import RouteSettings
from upcycle.stages.router_initialization import starts
from upcycle.stages.router_initialization.features import Tokens, TokenSample, router_inputs
from upcycle.stages.router_initialization.route import _save, condition_numbers, route
from upcycle.stages.router_initialization.starts import STARTS, Seed
from upcycle.weights.base import load_tokenizer
from worlds import as_base, assembled

L, E, H = 2, 3, 6
CENTRES = torch.eye(H)[:E] * 5


@pytest.fixture(scope="module")
def moe(base: Path, checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assembled(base, checkpoints, tmp_path_factory.mktemp("moe"))


@pytest.fixture
def samples(recipe: Recipe, base: Path) -> list[Sample]:
    return load_splits(recipe, load_tokenizer(base, None), 128).train[:13]


def clusters(count: int = 40, noise: float = 1.0) -> list[Tokens]:
    """Batches of tokens around a centre per expert; the last expert has few."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        experts = torch.tensor([0] * count + [1] * count + [2] * (count // 4))
        hidden = CENTRES[experts] + noise * torch.randn(L, len(experts), H, generator=generator) + 2.0
        batches.append(Tokens(hidden, experts))
    return batches


class AModel(torch.nn.Module):
    """A model that no start may run: what its routers would read is given."""

    device = torch.device("cpu")


@pytest.fixture
def seed(monkeypatch: pytest.MonkeyPatch) -> Seed:
    batches = clusters()
    monkeypatch.setattr(starts, "_stream", lambda _: iter(batches))
    sizes = torch.cat([b.experts for b in batches]).tolist()
    samples = [Sample([0], [-100], "", "", "", 0, "")] * len(sizes)  # a token each
    settings = RouteSettings(epochs=6, learning_rate=0.05, logit_std=None)
    random = random_routers(L, E, H, 0.02, 0)
    return Seed(AModel(), samples, list(enumerate(sizes)), random, settings, 0, 0)


def everything() -> Tokens:
    batches = clusters()
    return Tokens(torch.cat([b.hidden for b in batches], dim=1), torch.cat([b.experts for b in batches]))


def accuracy(vectors: list[torch.Tensor]) -> float:
    tokens = everything()
    hits = [(h @ v.T).argmax(dim=1) == tokens.experts for h, v in zip(tokens.hidden, vectors, strict=True)]
    return torch.stack(hits).float().mean().item()


def test_mean_hidden_is_the_mean_of_an_experts_own_tokens(seed: Seed) -> None:
    start, tokens = starts.mean_hidden(seed), everything()
    for layer in range(L):
        means = torch.stack([tokens.hidden[layer][tokens.experts == e].mean(dim=0) for e in range(E)])
        torch.testing.assert_close(start.vectors[layer], means - means.mean(dim=0), rtol=1e-4, atol=1e-4)
    assert (start.forward_tokens, start.backward_tokens) == (seed.num_tokens, 0)
    assert accuracy(start.vectors) > 0.95


def test_ridge_solves_its_normal_equations(seed: Seed) -> None:
    start, tokens = starts.ridge(seed), everything()
    counts = torch.bincount(tokens.experts).double()
    weights = (counts.sum() / (E * counts))[tokens.experts][:, None]
    targets = torch.nn.functional.one_hot(tokens.experts).double() - 1 / E
    for layer in range(L):
        hidden = tokens.hidden[layer].double()
        gram = hidden.T @ (weights * hidden)
        penalty = seed.settings.ridge * gram.diagonal().mean() * torch.eye(H, dtype=torch.float64)
        residual = (gram + penalty) @ start.vectors[layer].T.double() - hidden.T @ (weights * targets)
        assert residual.abs().max() < 1e-3
    assert accuracy(start.vectors) > 0.95


def test_what_a_start_reads_is_counted_by_tokens(seed: Seed) -> None:
    answer, chat = Sample([1] * 9, [-100] * 7 + [1, 2], "", "", "", 7, ""), Sample([1] * 4, [1] * 4, "", "", "", 0, "")
    long = replace(seed, samples=[answer, chat], pairs=[(0, 0), (1, 2), (0, 0)])
    assert long.num_read.tolist() == [18, 0, 4]
    answers = replace(long, settings=long.settings.model_copy(update={"tokens": "answer"}))
    assert answers.num_read.tolist() == [4, 0, 4]
    thousand = replace(answer, input_ids=[1] * 20_000, labels=[-100] * 19_999 + [1])
    many = replace(answers, samples=[thousand] * 40, pairs=[(i, i % E) for i in range(40)])
    kept = starts._token_sample(many)
    kept.add(Tokens(torch.zeros(L, 40, H), torch.zeros(40, dtype=torch.long)))
    assert len(kept.take().experts) == 40  # prompts are not read, so none of the answers' tokens is left out


def test_kmeans_gives_centroids_to_the_experts_whose_tokens_they_hold(seed: Seed) -> None:
    vectors = starts.kmeans(seed).vectors
    centres = CENTRES - CENTRES.mean(dim=0)
    for layer in vectors:
        torch.testing.assert_close(layer, centres, atol=0.6, rtol=0)


def test_contrastive_learns_to_tell_experts_apart_without_the_model(seed: Seed) -> None:
    start = starts.contrastive(seed)
    assert accuracy(start.vectors) > 0.95
    assert start.log[-1]["contrastive_loss"] < start.log[0]["contrastive_loss"] < 1.2
    assert start.backward_tokens == 0


@pytest.mark.parametrize("name", ["random", "mean_hidden", "kmeans", "ridge", "contrastive"])
def test_logits_have_the_deviation_asked_for_and_norms_may_be_equal(name: str, seed: Seed) -> None:
    settings = seed.settings.model_copy(update={"start": name, "logit_std": 2.0, "equal_norms": True})
    start = starts.start(Seed(**{**vars(seed), "settings": settings}))
    tokens = everything()
    for hidden, vectors in zip(tokens.hidden, start.vectors, strict=True):
        assert (hidden @ vectors.T).std(dim=1).mean().item() == pytest.approx(2.0, rel=1e-3)
        torch.testing.assert_close(vectors.norm(dim=1), vectors.norm(dim=1).mean().expand(E))


def test_router_inputs_are_what_the_experts_own_dense_model_feeds_its_ffn(
    moe: Path, checkpoints: list[Path], samples: list[Sample]
) -> None:
    model = load_model(moe, torch.float32)
    pairs = [(0, 2), (1, 0), (2, 1)]
    for tokens in ("all", "answer"):
        found = list(router_inputs(model, samples, pairs, tokens, 1, 0))  # a batch for each
        for part in found:
            (expert,) = set(part.experts.tolist())
            (sample,) = [samples[s] for s, e in pairs if e == expert]
            expected = ffn_inputs(checkpoints[expert], sample)
            wanted = torch.tensor([label != -100 for label in [*sample.labels[1:], -100]])
            if tokens == "answer":
                expected = expected[:, wanted]
            torch.testing.assert_close(part.hidden, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def ffn_inputs(folder: Path, sample: Sample) -> torch.Tensor:
    model, seen = load_model(folder, torch.float32), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    model(torch.tensor([sample.input_ids]))
    return torch.stack(seen)


def test_padding_is_left_out(moe: Path, samples: list[Sample]) -> None:
    pairs = [(i, 0) for i in range(len(samples))]
    (together,) = router_inputs(load_model(moe, torch.float32), samples, pairs, "all", 10**6, 0)
    assert len(together.experts) == sum(len(s.input_ids) for s in samples)


def test_a_token_sample_is_bounded_and_seeded() -> None:
    def draw(seed: int) -> Tokens:
        sample = TokenSample(100, 360, seed)
        for batch in clusters():
            sample.add(batch)
        return sample.take()

    assert 60 < len(draw(0).experts) < 140
    assert torch.equal(draw(0).hidden, draw(0).hidden)
    assert draw(0).hidden.shape != draw(1).hidden.shape or not torch.equal(draw(0).hidden, draw(1).hidden)


@pytest.mark.parametrize("logit_std", [None, 1.0])
@pytest.mark.parametrize("name", STARTS)
def test_every_start_runs_and_says_what_it_cost(
    name: str, logit_std: float | None, base: Path, moe: Path, samples: list[Sample], tmp_path: Path
) -> None:
    settings = RouteSettings(start=name, epochs=2, tokens_per_batch=256, equal_steps=True, logit_std=logit_std)
    names = ["c1", "c2", "c3"]
    seed_data = SeedData(samples[:9], samples[9:])
    report = route(as_base(base), moe, seed_data, names, settings, 0, tmp_path)
    again = route(as_base(base), moe, seed_data, names, settings, 0, tmp_path)
    assert report == again
    tokens = sum(len(s.input_ids) for s in samples)
    assert report.cost.scoring == 3 * tokens
    assert (report.cost.forward > 0) == (name != "random" or logit_std is not None)
    assert (report.cost.backward > 0) == (name == "upit")
    assert len(report.condition) == 2
    assert report.difference.interval[0] <= report.difference.gain <= report.difference.interval[1]


def test_a_router_that_cannot_tell_two_experts_apart_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    good = torch.eye(4)[:3]
    same = torch.stack([good[0], good[1], good[1]])
    assert condition_numbers([good])[0] == pytest.approx(1.0)
    assert condition_numbers([good, same])[1] > 1e6
    assert "the routers of 1 layer (first: [1]) hardly tell some experts apart" in " ".join(
        capsys.readouterr().out.split()
    )


def test_routing_vectors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    vectors = [torch.ones(3, 4), torch.full((3, 4), float("nan"))]
    with pytest.raises(UpcycleError, match=r"b is not finite after pre-optimisation; lower route\.learning_rate"):
        _save(tmp_path / "router.safetensors", vectors, ["a", "b"])
    assert not (tmp_path / "router.safetensors").exists()


def test_experts_may_move_with_the_router(base: Path, moe: Path, samples: list[Sample], tmp_path: Path) -> None:
    settings = RouteSettings(
        start="upit", epochs=2, tokens_per_batch=256, expert_learning_rate=1e-3, assignment="lowest_loss"
    )
    route(as_base(base), moe, SeedData(samples, []), ["c1", "c2", "c3"], settings, 0, tmp_path)
    before, after = load_model(moe, torch.float32), load_model(tmp_path / "moe", torch.float32)
    moved = {
        n for (n, p), q in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert moved
    assert all(".experts." in name for name in moved)
    assert (tmp_path / "moe" / "config.json").read_bytes() == (moe / "config.json").read_bytes()
