"""Our grouped products beside transformers': outputs and every gradient, in each family's own module."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.activations import ACT2FN

from upcycle.experts import grouped
from upcycle.experts.grouped import GROUPED, OURS, _gated, _permuted, use_own_products

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": MixtralConfig(**COMMON, intermediate_size=48, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON, intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=16, num_experts=4
    ),
    "qwen3_moe": Qwen3MoeConfig(**COMMON, intermediate_size=48, moe_intermediate_size=24, num_experts=4, head_dim=8),
    "another activation": MixtralConfig(**COMMON, intermediate_size=48, num_local_experts=4, hidden_act="gelu"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_those_of_transformers(
    name: str, autocast: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    unused = "grouped_ffns" if threads == 1 else "expert_ffns"
    monkeypatch.setattr(grouped, unused, None)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32)
    ids = torch.randint(64, (3, 20))
    assert model.config._experts_implementation == GROUPED

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return output.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    expected, gradients = run()
    use_own_products(model)
    assert model.config._experts_implementation == OURS
    found, ours = run()
    tolerance = {"atol": 2e-2, "rtol": 5e-2} if autocast else {"atol": 1e-6, "rtol": 1e-5}  # there fp32 was multiplied
    torch.testing.assert_close(found, expected, **tolerance)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(ours[parameter], gradient, **tolerance, msg=lambda text, p=parameter: f"{p}: {text}")


def test_experts_without_a_token_get_no_gradient(threads: int) -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["mixtral"]), dtype=torch.float32)
    use_own_products(model)
    experts = model.model.layers[0].mlp.experts
    chosen = torch.tensor([[0, 1]] * 6)
    experts(torch.randn(6, 32), chosen, torch.full((6, 2), 0.5)).sum().backward()
    assert experts.down_proj.grad[:2].abs().sum() > 0
    assert experts.down_proj.grad[2:].abs().sum() == 0


def test_the_gradients_are_those_of_the_functions() -> None:
    both = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_gated, (both,))
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(_gated(both), ACT2FN["silu"](gate) * up)
    order = torch.tensor([3, 0, 4, 1, 2])
    inverse = order.argsort()
    assert torch.autograd.gradcheck(lambda rows: _permuted(rows, order, inverse), (both,))
    torch.testing.assert_close(_permuted(_permuted(both, order, inverse), inverse, order), both)


def test_an_implementation_that_was_chosen_stays() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["mixtral"]), experts_implementation="eager")
    use_own_products(model)
    assert model.config._experts_implementation == "eager"
