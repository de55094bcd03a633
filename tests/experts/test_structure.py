"""Adapters as experts ask for the structure of a base's layers, not for a plain MoE that computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import assert_rows_see_themselves_alone, greedy
from transformers.models.arcee.modeling_arcee import ArceeMLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from conftest import make_dense
from upcycle.errors import NoTwinError, UpcycleError
from upcycle.experts.kinds import KINDS, load_model
from upcycle.experts.structure import checked_dense, may_have_twin, problem_of
from upcycle.records.plan import ExpansionPlan, Expert
from upcycle.routing.routers import freeze
from upcycle.settings import DevicesSettings, TrainingSettings
from upcycle.training.forecast import forecast
from upcycle.training.packing import can_pack
from upcycle.weights.folders import read_config
from worlds import IDS, as_base, assemble, forced_logits, logits, make_adapter, mixture, plan_of, shrunk

WINDOWS: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
NARROW = {**WINDOWS, "head_dim": 8}
TWO_ROPES = {
    "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("sliding_attention", 1e3), ("full_attention", 1e4))
    }
}
GEMMA4 = {**NARROW, **TWO_ROPES, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
SHARED = {"num_hidden_layers": 4, "layer_types": WINDOWS["layer_types"] * 2, "num_kv_shared_layers": 2}
BEYOND = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 5000.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.1,
}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "v_head_dim": 8}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
LINEAR = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
BASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "pretraining_tp": 2}),
    ("gemma", {}),
    ("gemma2", {**NARROW, "query_pre_attn_scalar": 8}),
    ("gemma3_text", {**NARROW, **TWO_ROPES}),
    ("gemma4_text", GEMMA4),
    ("gemma4_text", {**GEMMA4, **SHARED, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 99}),
    ("olmo", {}),
    ("olmo3", WINDOWS),
    ("exaone4", WINDOWS),
    ("ministral3", {"head_dim": 8, "rope_parameters": BEYOND}),
    ("cohere", {"use_qk_norm": True}),
    ("cohere2", {**WINDOWS, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("hunyuan_v1_dense", {"head_dim": 8}),
    ("qwen3_5_text", LINEAR),
    ("qwen3", {**NARROW, "use_sliding_window": True}),
    ("stablelm", {}),
    ("helium", {"head_dim": 8}),
    ("youtu", LATENT),
    ("phi3", {}),
    ("glm", {"head_dim": 8}),
    ("glm4", {"head_dim": 8}),
    ("llama", {"mlp_bias": True}),
    ("phi3", {"hidden_act": "gelu"}),
    ("arcee", {}),
    ("arcee", {"mlp_bias": True}),
    ("nemotron", {}),
    ("jais2", {"mlp_bias": True}),
    ("starcoder2", {"use_bias": True}),
    ("apertus", {}),
    ("phi", {}),
    ("nanochat", {}),
]
QUICK = {"gemma2", "gemma4_text", "ministral3", "cohere2", "qwen3_5_text", "phi3", "arcee", "apertus"}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
WITHOUT_TWIN = ("llama", "gemma2", "olmo", "olmo3", "exaone4", "ministral3", "cohere", "cohere2", "stablelm", "glm4")
WITHOUT_TWIN += ("nemotron", "jais2", "starcoder2", "apertus", "phi", "nanochat")


@pytest.mark.parametrize(
    ("dense", "changes"),
    [pytest.param(*base, marks=() if base[0] in QUICK else pytest.mark.long, id=base[0]) for base in BASES],
)
def test_forced_to_an_expert_it_is_the_base_with_that_adapter_merged(
    dense: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = as_base(make_dense(tmp_path / "dense", model_type=dense, **changes))
    if dense in WITHOUT_TWIN or "mlp_bias" in changes:
        with pytest.raises(NoTwinError, match=r"LoRA experts work on it: prepare\.train=lora"):
            KINDS["ffn"].check_base(base)
    for kind in ("lora", "bottleneck"):
        KINDS[kind].check_base(base)
    found = checked_dense(base)
    adapters = [make_adapter(base.folder, tmp_path / f"adapter-{i}", i) for i in (1, 2)]
    for folder in adapters:
        KINDS["lora"].check_checkpoint(base, adapters[0], folder)
    made = mixture(base.folder, adapters, tmp_path / "mixture")
    model, plain = load_model(made, torch.float32), logits(base.folder)
    for expert, folder in enumerate(adapters):
        with torch.no_grad():
            expected = load_model(folder, torch.float32, base=base.folder)(IDS).logits
        largest = expected.abs().max()
        assert (expected - plain).abs().max() > 0.02 * largest
        difference = (forced_logits(model, [expert] * 2, 2) - expected).abs().max()
        assert difference <= (2e-5 if "hidden_size_per_layer_input" in changes else 1e-5) * largest
    fresh = assemble("bottleneck", base, [], copies_of_the_base(2), tmp_path / "bottleneck", router_std=0.5)
    assert (logits(fresh) - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert len(greedy(made)) == len(IDS)
    if can_pack(model):
        assert_rows_see_themselves_alone(load_model(made, torch.float32).train())
    assert can_pack(model) == (dense != "qwen3_5_text")  # a recurrent layer carries one row into the next
    needs = forecast(found.config, TrainingSettings(), 32, DevicesSettings(), 1, lambda _: False, added=1000)
    assert needs.weights == 4 * (sum(p.numel() for p in load_model(base.folder, torch.float32).parameters()) + 1000)


def copies_of_the_base(count: int) -> ExpansionPlan:
    copies = tuple(Expert(name=f"copy-{i}", kind="base") for i in range(count))
    return plan_of(count, adapters="average", experts=copies)


@pytest.mark.parametrize("dense", ["apertus", "starcoder2"])
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_without_a_gate_it_trains_in_bf16_beside_fp32_parameters(kind: str, dense: str, tmp_path: Path) -> None:
    """As on a GPU; those of an activation widen what they multiply."""
    base = make_dense(tmp_path / "dense", model_type=dense)
    made = assemble(kind, base, [], copies_of_the_base(2), tmp_path / "mixture", router_std=0.5)
    model, expected = load_model(made, torch.float32).train(), logits(made)
    freeze(model, KINDS[kind].frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(IDS, labels=IDS)
    output.loss.backward()
    assert (output.logits.float() - expected).norm() < 0.05 * expected.norm()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {n for n, _ in model.named_parameters() if ".mlp.experts." in n or ".mlp.gate." in n}


@pytest.mark.parametrize(
    ("dense", "changes", "problem", "instead"),
    [
        ("bitnet", {}, r"an mlp of gate_proj\.weight .*, ffn_sub_norm\.weight \(48,\)", "use a different base"),
        ("persimmon", {}, r"an mlp of dense_h_to_4h", "use a different base"),
        (
            "nemotron_h",
            {"hybrid_override_pattern": "M-"},
            "keeps its layers elsewhere than in",
            "use prepare.train=ffn",
        ),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "no mlp but conv, feed_forward", "use prepare.train=ffn"),
        ("gpt2", {}, "keeps its layers elsewhere than in model.layers", "its FFN has no gate"),
        ("qwen2_vl", {"text_config": {}}, "is multimodal", "a multimodal model"),
        ("no_such", {}, "is not a causal language model that transformers knows", "use a different base"),
        (
            "gemma4_text",
            {**GEMMA4, **SHARED, "use_double_wide_mlp": True},
            r"layer 2 an mlp of gate_proj\.weight \(96, 32\)",
            "use a different base",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) and len(v) < 12 else "",
)
def test_another_structure_is_refused_by_what_was_found(
    dense: str, changes: dict[str, Any], problem: str, instead: str, base: Path
) -> None:
    small = as_base(base)
    given = {"model_type": dense, **SIZES, "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0, **changes}
    vars(small)["config"] = resolved(given)
    for kind in ("lora", "bottleneck"):
        with pytest.raises(
            UpcycleError, match=f"this {dense} model .*{problem}.* adapters as experts need .*{instead}"
        ):
            KINDS[kind].check_base(small)
    if instead != "use prepare.train=ffn":
        with pytest.raises(NoTwinError, match=f"nor do LoRA experts work on it, as it .*{problem}"):
            KINDS["ffn"].check_base(small)


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """With the architecture's own defaults."""
    from transformers import CONFIG_MAPPING

    known = config["model_type"] in CONFIG_MAPPING and "text_config" not in config
    return CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict() if known else config


def up_before_gate(self: Phi3MLP, x: torch.Tensor) -> torch.Tensor:
    up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
    return self.down_proj(self.activation_fn(gate) * up)


def test_an_ffn_that_computes_something_else_of_the_same_weights_is_found(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(base)
    assert problem_of(config) is None
    phi3 = resolved({"model_type": "phi3", **SIZES, "pad_token_id": 0})
    assert problem_of(phi3) is None
    monkeypatch.setattr(Phi3MLP, "forward", up_before_gate)
    assert problem_of(phi3).startswith("has in layer 0 an mlp that computes something else than down_proj(")
    right = LlamaMLP.forward
    arcee = resolved({"model_type": "arcee", **SIZES})
    assert problem_of(arcee) is None
    monkeypatch.setattr(ArceeMLP, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    assert problem_of(arcee) == "has in layer 0 an mlp that computes something else than down_proj(act_fn(up_proj(x)))"
    for wrong in (lambda self, x: 2 * right(self, x), lambda self, x, places: right(self, x)):
        monkeypatch.setattr(LlamaMLP, "forward", wrong)
        assert problem_of(config).startswith("has in layer 0 an mlp that computes something else than down_proj(")


def test_structure_is_asked_without_a_trace(base: Path) -> None:
    """Neither the random numbers of a run nor its memory change."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert problem_of({**read_config(base), "num_hidden_layers": 3, "vocab_size": 10**9}) is None
    assert torch.equal(torch.rand(2), expected)


def test_only_what_has_a_plain_moe_is_said_to_fold(base: Path, tmp_path: Path) -> None:
    gemma, gemma2 = (make_dense(tmp_path / name, model_type=name, head_dim=8) for name in ("gemma", "gemma2"))
    for dense, folds in ((base, True), (gemma, True), (gemma2, False)):
        made = mixture(dense, [make_adapter(dense, tmp_path / f"{dense.name}-adapter", 1)] * 2, tmp_path / "mixture")
        assert KINDS["lora"].describe(made).folds == folds
    with pytest.raises(UpcycleError, match=r"caps the scores of attention.*; export .*mixture without --fold"):
        KINDS["lora"].fold(made, tmp_path / "plain", "source", None)
    assert may_have_twin("someone/not-here", 2)
    assert may_have_twin("builtin:tiny", 2)


def test_a_mixture_folds_into_weights_that_are_rewritten_or_split(tmp_path: Path) -> None:
    for dense in ("gemma", "helium", "phi3", "arcee"):
        base = make_dense(tmp_path / dense, model_type=dense, head_dim=8)
        adapters = [make_adapter(base, tmp_path / f"{dense}-{i}", i) for i in (1, 2)]
        made, plain = mixture(base, adapters, tmp_path / f"{dense}-mixture"), tmp_path / f"{dense}-plain"
        plain.mkdir()
        KINDS["lora"].fold(made, plain, "float32", None)
        torch.testing.assert_close(logits(plain), logits(made), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("dense", "changes"), [("glm", {"head_dim": 8}), ("youtu", LATENT), ("gemma4_text", GEMMA4)])
def test_a_moe_that_weighs_experts_otherwise_takes_one_for_a_token_or_none(
    dense: str, changes: dict[str, Any], tmp_path: Path, tiny_recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_dense(tmp_path / dense, model_type=dense, **changes)
    adapters = [make_adapter(base, tmp_path / str(i), i) for i in (1, 2)]
    for active in (1, 2):
        made = mixture(base, adapters, tmp_path / f"mixture-{active}", num_experts_per_tok=active)
        plain = tmp_path / f"plain-{active}"
        plain.mkdir()
        folds = active == 1 and dense != "gemma4_text"
        changed = {"assemble": {"num_experts_per_tok": active}, "posttrain": {"freeze": "router"}}
        KINDS["lora"].read_base(as_base(base), shrunk("upit-lora", tiny_recipe, **changed))
        assert ("`upcycle export --fold` will refuse it" in capsys.readouterr().out) == (not folds)
        assert KINDS["lora"].describe(made).folds == folds
        if folds:
            KINDS["lora"].fold(made, plain, "float32", None)
            torch.testing.assert_close(logits(plain), logits(made), rtol=0, atol=1e-5)
        else:
            with pytest.raises(
                UpcycleError, match=r"would give different logits.*, the mixture.* softmax; export .*without"
            ):
                KINDS["lora"].fold(made, plain, "float32", None)
