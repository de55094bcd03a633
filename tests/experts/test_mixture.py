"""The mixture of adapters as a model: what it computes, what it saves, what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from upcycle.errors import UpcycleError
from upcycle.experts.adapter_files import CONFIG, WEIGHTS, is_adapter
from upcycle.experts.kinds import load_model
from upcycle.experts.lora import LORA
from upcycle.experts.mixture import save_mixture
from upcycle.records.plan import Expert
from upcycle.routing.routers import freeze
from upcycle.weights.folders import four_bit_config
from upcycle.weights.safetensors_io import ModelReader
from worlds import IDS, assemble, forced_logits, logits, make_adapter, mixture, plan_of


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of other ranks, scalings and targets."""
    out = tmp_path_factory.mktemp("adapters")
    options = ({"rank": 4}, {"rank": 10, "use_rslora": True}, {"rank": 2, "target_modules": ["down_proj"]})
    return [make_adapter(base, out / str(seed), seed, **changes) for seed, changes in enumerate(options)]


@pytest.fixture(scope="module")
def made(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(base, adapters, tmp_path_factory.mktemp("mixture"))


def test_forced_to_an_expert_it_is_the_base_with_that_adapter(base: Path, adapters: list[Path], made: Path) -> None:
    model = load_model(made, torch.float32)
    for expert, folder in enumerate(adapters):
        merged = load_model(folder, torch.float32, base=base)
        with torch.no_grad():
            expected = merged(IDS).logits
        assert (expected - logits(base)).abs().max() > 0.1
        torch.testing.assert_close(forced_logits(model, [expert] * 2, 3), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folded_it_is_a_plain_moe_with_the_same_logits(dtype: str, made: Path, tmp_path: Path) -> None:
    LORA.fold(made, tmp_path, dtype, None)
    assert not is_adapter(tmp_path)
    expected, found = logits(made), logits(tmp_path)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_no_experts_delta_is_lost_on_the_way(base: Path, adapters: list[Path], made: Path, tmp_path: Path) -> None:
    LORA.fold(made, tmp_path, "float32", None)
    dense, folded = ModelReader(base), ModelReader(tmp_path)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for expert, folder in enumerate(adapters):
        merged = load_model(folder, torch.float32, base=base).state_dict()
        for layer in range(2):
            for weight, name in names.items():
                found = folded.tensor(f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight")
                source = f"model.layers.{layer}.mlp.{weight}.weight"
                torch.testing.assert_close(found, merged[source], rtol=0, atol=1e-6)
                adapted = weight == "down_proj" or expert < 2
                assert torch.equal(found, dense.tensor(source)) != adapted


def test_what_is_saved_is_loaded_for_more_training(made: Path, tmp_path: Path) -> None:
    model = load_model(made, torch.float32).train()
    freeze(model, LORA.frozen)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    save_mixture(model, tmp_path, made)
    again = load_model(tmp_path, torch.float32)
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, again(IDS).logits)
    before, after = load_file(made / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == [n for n in before if ".experts.2." in n and ".down_proj." not in n]  # not adapted: stays zero


@pytest.mark.parametrize(("what", "moves"), [("router", "expert"), ("experts", "router"), ("none", "both")])
def test_freezing_leaves_the_base_alone_too(what: str, moves: str, made: Path) -> None:
    model = load_model(made, torch.float32)
    freeze(model, {what, *LORA.frozen})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("experts" in name for name in trained) == (moves != "router")
    assert any(name.endswith("mlp.gate.weight") for name in trained) == (moves != "expert")
    assert all(".experts." in name or name.endswith("mlp.gate.weight") for name in trained)


def test_gradients_are_the_same_with_recomputed_activations(made: Path) -> None:
    found = []
    for recompute in (False, True):
        model = load_model(made, torch.float32).train()
        freeze(model, LORA.frozen)
        if recompute:
            model.activation_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_an_incomplete_or_foreign_folder_is_refused(made: Path, tmp_path: Path) -> None:
    tensors = load_file(made / WEIGHTS)
    (tmp_path / CONFIG).write_bytes((made / CONFIG).read_bytes())
    name = "base_model.model.model.layers.1.mlp.experts.1.up_proj.lora_B.weight"
    for changed, message in (
        ({n: t for n, t in tensors.items() if n != name}, f"has no {name}; the mixture is incomplete"),
        ({**tensors, name: tensors[name][:, :3].contiguous()}, r"has shape \(48, 3\), expected \(48, 10\)"),
        ({**tensors, "extra": torch.zeros(1)}, "extra has no place in the mixture"),
    ):
        save_file(changed, tmp_path / WEIGHTS)
        with pytest.raises(UpcycleError, match=message):
            load_model(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ranks": [4, 4]}, "expert_ranks has 2 values, but num_experts is 3"),
        ({"expert_scaling": [1.0]}, "expert_scaling has 1 values, but num_experts is 3"),
        ({"expert_ranks": []}, "expert_ranks has 0 values"),
        ({"num_experts": 10**9}, "num_experts: expected 4096 or less"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4 of num_experts 3"),
        ({"r": 99}, "r is 99, but the largest of expert_ranks is 10"),
        ({"dtype": "save_file"}, "dtype: expected 'float32'"),
        ({"surprise": 1}, "surprise: expected no such field"),
        ({"expert_scaling": [1.0, 1.0, float("nan")]}, "expert_scaling.2: expected a finite number"),
        (
            {"expert_ranks": [10**12] * 3, "r": 10**12},
            r"expert_ranks\[0\] is 1000000000000, but expert 0 has no tensor",
        ),
    ],
)
def test_a_configuration_that_contradicts_itself_or_the_tensors_is_refused_before_memory_is_taken(
    changes: dict[str, Any], message: str, made: Path, tmp_path: Path
) -> None:
    (tmp_path / WEIGHTS).write_bytes((made / WEIGHTS).read_bytes())
    config = json.loads((made / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(UpcycleError, match=f"adapter_config.json.*{message}"):
        load_model(tmp_path, torch.float32)


def test_fresh_bottlenecks_and_adapters_leave_the_base_as_it_is(base: Path, tmp_path: Path) -> None:
    experts = tuple(Expert(name=f"copy-{i}", kind="base") for i in range(3))
    copies = plan_of(3, adapters="average", experts=experts)
    for kind in ("lora", "bottleneck"):
        out = assemble(kind, base, [], copies, tmp_path / kind, rank=6)
        torch.testing.assert_close(logits(out), logits(base), rtol=0, atol=1e-5)
        model = load_model(out, torch.float32)
        assert sum(p.numel() > 0 and bool(p.any()) for n, p in model.named_parameters() if ".experts." in n) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_four_bits_without_a_gpu_are_refused() -> None:
    with pytest.raises(UpcycleError, match=r"lora\.four_bit needs a GPU, which is not available"):
        four_bit_config(torch.float32)
