"""What keeps routers balanced, against definitions and against transformers' pooled loss."""

from pathlib import Path

import pytest
import torch

from upcycle.experts.kinds import load_model
from upcycle.routing.load import shares, slot_counts
from upcycle.routing.routers import RouterRecorder, freeze, routers
from upcycle.training.balance import load_balancing_loss, router_z_loss
from upcycle.training.loss_free import LossFreeBias
from upcycle.training.step_load import StepLoad, count
from worlds import assembled


def routing(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.softmax(logits, dim=-1).topk(k, dim=-1).indices


def balance(
    layers: list[torch.Tensor], indices: list[torch.Tensor], mask: torch.Tensor, group: int = 1
) -> torch.Tensor:
    """With the shares of the same tokens."""
    share = shares(slot_counts(indices, mask, layers[0].shape[1]))
    return load_balancing_loss(layers, share, mask, group)


def test_equals_the_definition_and_ignores_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(7, 4, generator=generator) for _ in range(3)]
    mask = torch.tensor([1, 1, 1, 0, 1, 0, 1])
    expected = 0.0
    for logits in layers:
        kept = [t for t in range(7) if mask[t]]
        chosen = routing(logits, 2)
        for expert in range(4):
            f = sum(int(expert in chosen[t].tolist()) for t in kept) / (2 * len(kept))
            p = sum(torch.softmax(logits[t], dim=0)[expert].item() for t in kept) / len(kept)
            expected += 4 * f * p / 3
    found = balance(layers, [routing(x, 2) for x in layers], mask)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_over_groups_it_is_that_of_whole_experts() -> None:
    """With equal logits in a group, choosing whole groups; and one slice of each expert is even over experts."""
    whole = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1] * 8 + [0])
    slices = whole.repeat_interleave(4, dim=1)
    expected = balance([whole], [routing(whole, 1)], mask)
    torch.testing.assert_close(balance([slices], [routing(slices, 4)], mask, group=4), expected)
    first = torch.tensor([[0, 4, 8]]).expand(9, 3)
    assert balance([slices * 0], [first], mask, group=4).item() == pytest.approx(1.0)


def test_over_a_step_experts_of_one_domain_each_are_balanced() -> None:
    """Micro-batches of one domain, each with an expert of its own: uneven by themselves, even over the step."""
    mask = torch.ones(5, dtype=torch.long)
    micro_batches = [10.0 * torch.nn.functional.one_hot(torch.full((5,), expert), 4).float() for expert in range(4)]
    counts = [count([routing(logits, 1)], mask, 4) for logits in micro_batches]
    alone = [load_balancing_loss([x], shares(c.own), mask).item() for x, c in zip(micro_batches, counts, strict=True)]
    step, seen = StepLoad(), []
    for number, routed in enumerate(counts):
        seen.append(step.add(routed, last=number == 3))
    assert alone == pytest.approx([4.0] * 4, rel=1e-3)
    torch.testing.assert_close(seen[1], torch.tensor([[0.5, 0.5, 0.0, 0.0]]))
    torch.testing.assert_close(seen[-1], torch.full((1, 4), 0.25))
    assert load_balancing_loss([micro_batches[3]], seen[-1], mask).item() == pytest.approx(1.0)
    torch.testing.assert_close(step.add(counts[2], last=True), torch.tensor([[0.0, 0.0, 1.0, 0.0]]))  # a new step


def test_a_model_whose_layers_each_collapse_is_not_balanced() -> None:
    """Layer l sends everything to expert l: pooled over layers this looks perfectly balanced."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [20.0 * torch.nn.functional.one_hot(torch.full((10,), expert), 4).float() for expert in range(4)]
    ours = balance(layers, [routing(x, 1) for x in layers], torch.ones(10, dtype=torch.long))
    pooled = load_balancing_loss_func(tuple(layers), 4, 1)
    assert ours.item() == pytest.approx(4.0, rel=1e-3)  # the worst there is
    assert pooled.item() == pytest.approx(1.0, rel=1e-3)  # as if balanced


def test_gradient_moves_probability_to_the_idle_expert() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 6, requires_grad=True)
    balance([logits], [routing(logits, 1)], torch.ones(6, dtype=torch.long)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 2] < 0).all()


def test_z_loss_is_the_mean_square_of_the_log_partition() -> None:
    layers = [torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    kept = torch.stack([layer[[0, 2]].exp().sum(dim=1).log().square() for layer in layers])
    torch.testing.assert_close(router_z_loss(layers, torch.tensor([1, 0, 1])), kept.mean())


@pytest.fixture
def moe(base: Path, checkpoints: list[Path], tmp_path: Path) -> Path:
    return assembled(base, checkpoints, tmp_path / "moe", router_std=0.5)


IDS = torch.randint(3, 99, (2, 30), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_bias_chooses_but_does_not_weigh(moe: Path) -> None:
    model = load_model(moe, torch.float32)
    with LossFreeBias(model, 0.1) as bias:
        with RouterRecorder(model) as recorder:
            model(IDS)
            plain = recorder.indices
            recorder.clear()
            bias.bias[0] = torch.tensor([0.0, 5.0, 0.0])
            model(IDS)
        assert (recorder.indices[0] == 1).any(dim=1).all()  # now everywhere among the chosen
        assert not all(torch.equal(a, b) for a, b in zip(plain, recorder.indices, strict=True))
        gate = getattr(*routers(model)[0])
        hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
        _, weights, indices = gate(hidden)
    assert (indices == 1).any(dim=1).all()
    own = torch.softmax(hidden @ gate.weight.T, dim=1).gather(1, indices)  # the bias is not in the weights
    torch.testing.assert_close(weights, own / own.sum(dim=1, keepdim=True))


def test_the_bias_follows_the_load_and_fades_out(moe: Path) -> None:
    bias = LossFreeBias(load_model(moe, torch.float32), 0.1)
    bias.add(slot_counts([torch.tensor([[0, 1], [0, 1], [0, 2]])] * 2, torch.tensor([1, 1, 1]), 3))
    bias.step(0.1)
    torch.testing.assert_close(bias.bias, torch.tensor([[-0.1, 0.0, 0.1]] * 2), atol=1e-6, rtol=0)
    assert bias.strength == 1.0
    strengths = []
    for progress in (0.75, 0.875, 1.0):
        bias.step(progress)
        strengths.append(bias.strength)
    assert strengths == pytest.approx([1.0, 0.5, 0.0])


@torch.no_grad()
def test_the_bias_balances_what_is_uneven(moe: Path) -> None:
    """Tokens that share a direction, so that the router prefers some experts: the load evens out step by step."""
    model = load_model(moe, torch.float32)
    gates = [getattr(parent, attribute) for parent, attribute in routers(model)]
    hidden = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0)) + 1.0
    loads = []
    with LossFreeBias(model, 0.003) as bias:
        for _ in range(300):
            indices = [gate(hidden)[2] for gate in gates]
            bias.add(slot_counts(indices, torch.ones(2000, dtype=torch.long), 3))
            loads.append((torch.bincount(indices[0].flatten(), minlength=3) / 4000 * 3).max().item())
            bias.step(0.1)
    assert loads[0] > 1.2
    assert loads[-1] < 1.05  # it ends in steps of the rate around the even load


@pytest.mark.parametrize("what", ["none", "router", "experts", "shared"])
def test_freeze_leaves_one_part_as_it_is(what: str, moe: Path) -> None:
    model = load_model(moe, torch.float32)
    freeze(model, {what})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    gates = {name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight")}
    experts = {name for name, _ in model.named_parameters() if ".experts." in name}
    rest = {name for name, _ in model.named_parameters()} - gates - experts
    assert gates
    assert experts
    assert frozen == {"none": set(), "router": gates, "experts": experts, "shared": rest}[what]
