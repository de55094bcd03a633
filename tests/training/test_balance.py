"""The load-balancing loss, against its definition and against transformers' pooled one."""

import pytest
import torch

from upcycle.training.balance import load_balancing_loss


def routing(logits: torch.Tensor, k: int) -> torch.Tensor:
    return torch.softmax(logits, dim=-1).topk(k, dim=-1).indices


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
    found = load_balancing_loss(layers, [routing(x, 2) for x in layers], mask)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_model_whose_layers_each_collapse_is_not_balanced() -> None:
    """Layer l sends everything to expert l: pooled over layers this looks perfectly balanced."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [20.0 * torch.nn.functional.one_hot(torch.full((10,), expert), 4).float() for expert in range(4)]
    ours = load_balancing_loss(layers, [routing(x, 1) for x in layers], torch.ones(10, dtype=torch.long))
    pooled = load_balancing_loss_func(tuple(layers), 4, 1)
    assert ours.item() == pytest.approx(4.0, rel=1e-3)  # the worst there is
    assert pooled.item() == pytest.approx(1.0, rel=1e-3)  # as if balanced


def test_gradient_moves_probability_to_the_idle_expert() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 6, requires_grad=True)
    load_balancing_loss([logits], [routing(logits, 1)], torch.ones(6, dtype=torch.long)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 2] < 0).all()
