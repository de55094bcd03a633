"""Every row of the table of families: exact where it says so, refused with a reason elsewhere."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_clients
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import CONFIG_MAPPING

from conftest import make_dense, perturbed
from upcycle.architectures.agreement import check_agreement
from upcycle.architectures.check import check, check_source
from upcycle.architectures.clients import CLIENTS, LIMITS, UNTRIED, Limit, always
from upcycle.architectures.families import FAMILIES, MOES, expert_counts, family_of
from upcycle.architectures.families import WRONG as WITHOUT
from upcycle.architectures.listing import ADAPTERS, MODELS
from upcycle.architectures.mapping import Mapping, map_model, shared_shapes, with_own_head
from upcycle.errors import UpcycleError
from upcycle.experts.ffn import describe
from upcycle.experts.kinds import load_model
from upcycle.experts.structure import problem_of
from upcycle.routing.routers import (
    SIGMOID,
    ForcedRouter,
    RouterRecorder,
    RowExperts,
    freeze,
    router_modules,
    routing_vectors,
    swapped_routers,
)
from upcycle.training.loss_free import LossFreeBias
from upcycle.training.packing import TOKEN_MASK, SideBySide, can_pack, fill_lines
from upcycle.types import Model
from upcycle.weights.folders import read_config
from upcycle.weights.safetensors_io import ModelReader
from worlds import IDS, assembled, assert_experts_are, logits

ALTERNATING = ["sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "rope_theta": 5000.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
    "long_factor": [1.5, 2.0, 2.5, 3.0],
    "short_factor": [1.0, 1.1, 1.2, 1.3],
}
PHI3_LONG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
NOPE = {"no_rope_layers": [1, 0]}
CWM = {"sliding_window": 8, "head_dim": 8, "bos_token_id": 1}
HALF_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
HALF_LONGROPE = {"partial_rotary_factor": 0.5, "long_factor": [1.5, 2.5], "short_factor": [1.0, 1.2]}
PHI3_ORIGINAL = {"original_max_position_embeddings": 32}
MIXED_QWEN3 = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
QWEN3_5 = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
NO_EXPERTS = {"num_local_experts": 0, "shared_intermediate_size": 64, "position_embedding_type": "rope"}
GRANITE_MAMBA = {
    "layer_types": ["linear_attention", "full_attention"],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}
NO_MAMBA = {"layer_types": ["full_attention"] * 2}
NO_ROPE = {"position_embedding_type": None}
HUNYUAN_ROPE = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 500.0}
YOUTU = {
    "pad_token_id": None,  # as published; transformers would set that row of the embeddings to 0 at each loading
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
MINICPM3 = {**YOUTU, "scale_emb": 3, "scale_depth": 0.7, "dim_model_base": 8}
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 256,
    "initializer_range": 0.05,  # smaller logits, as tolerances are absolute
    "rms_norm_eps": 1e-8,  # its share in Beam's norms is not the same; with so small a residual 1e-6 makes 5e-6
    "sliding_window": 8,
    "layer_types": ALTERNATING,
    "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}, "full_attention": LINEAR},
}
GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 8,
    "layer_types": ALTERNATING,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 5000.0},
    },
}
NEMOTRON_BLOCKS = ["linear_attention", "mlp", "full_attention", "mlp"]
NEMOTRON: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": NEMOTRON_BLOCKS,
    "head_dim": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
}
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
FULL_OLMO3 = {kind: {"rope_type": "default", "rope_theta": 500.0} for kind in ("sliding_attention", "full_attention")}

EXACT = [
    ("llama", "mixtral", {}),
    ("llama", "mixtral", {"head_dim": 16, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    ("llama", "mixtral", {"rope_parameters": LINEAR}),
    ("llama", "mixtral", {"rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    ("llama", "mixtral", {"rope_parameters": YARN}),
    ("llama", "mixtral", {"rope_parameters": LLAMA3}),
    ("llama", "granitemoe", {"attention_bias": True}),
    ("llama", "granitemoe", {"attention_bias": True, "head_dim": 16}),
    ("mistral", "mixtral", {"sliding_window": None}),
    ("mistral", "mixtral", {"sliding_window": 8, "head_dim": 16}),
    ("ministral3", "mixtral", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.0}}),
    ("ministral", "mixtral", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2, "head_dim": 8}),
    ("ministral", "mixtral", {"sliding_window": 8, "layer_types": ["full_attention"] * 2, "head_dim": 8}),
    ("ministral", "granitemoe_swa", {"sliding_window": 8, "layer_types": ALTERNATING, "head_dim": 16}),
    ("cwm", "granitemoe_swa", {**CWM, "layer_types": ALTERNATING, "rope_parameters": LLAMA3}),
    ("phi3", "mixtral", {}),
    ("phi3", "mixtral", {"sliding_window": 8}),
    ("phi3", "mixtral", PHI3_LONG),
    ("smollm3", "mixtral", {"no_rope_layers": [1, 1]}),
    ("smollm3", "mixtral", {"no_rope_layers": [1, 1], "rope_parameters": YARN}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen2", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ALTERNATING[::-1]}),
    ("qwen3", "qwen3_moe", {"head_dim": 16}),
    ("qwen3", "qwen3_moe", {"attention_bias": True, "rope_parameters": YARN}),
    ("olmo2", "flex_olmo", {}),
    ("olmo2", "flex_olmo", {"attention_bias": True}),
    ("olmo3", "flex_olmo", {"layer_types": ["full_attention"] * 2, "rope_parameters": FULL_OLMO3}),
    ("granite", "granitemoe", GRANITE),
    ("granite", "granitemoe", {**GRANITE, "attention_bias": True}),
    ("smollm3", "granitemoe_swa", NOPE),
    ("smollm3", "granitemoe_swa", {**NOPE, "rope_parameters": YARN}),
    ("smollm3", "granitemoe_swa", {**NOPE, "use_sliding_window": True, "sliding_window": 8}),
    ("internlm3", "mixtral", {"head_dim": 16, "rope_parameters": DYNAMIC, "max_position_embeddings": 32}),
    ("seed_oss", "qwen2_moe", {**NO_DROPOUT, "head_dim": 16}),
    ("seed_oss", "qwen2_moe", {**NO_DROPOUT, "attention_bias": False, "rope_parameters": {**YARN}}),
    ("ernie4_5", "ernie4_5_moe", {"head_dim": 16}),
    ("ernie4_5", "ernie4_5_moe", {"rope_parameters": YARN}),
    ("cohere2", "cohere2_moe", {"sliding_window": 8, "layer_types": ALTERNATING, "logit_scale": 0.25}),
    ("cohere2", "cohere2_moe", {"sliding_window": 8, "attention_bias": True, "rope_parameters": YARN}),
    ("cohere", "cohere2_moe", {"logit_scale": 0.25}),
    ("phi3", "glm4_moe", {"rope_parameters": HALF_ROPE}),
    ("phi3", "glm4_moe", {"sliding_window": 4096, "rope_parameters": {**LONGROPE, **HALF_LONGROPE}, **PHI3_ORIGINAL}),
    ("qwen3", "mellum", {**MIXED_QWEN3, "head_dim": 16}),
    ("qwen3", "mellum", {**MIXED_QWEN3, "rope_parameters": YARN}),
    ("qwen3_5_text", "qwen3_5_moe_text", QWEN3_5),
    ("granite_swa", "granitemoe_swa", {**GRANITE, "sliding_window": 8, "layer_rope_theta": [0, 500.0]}),
    (
        "granitemoehybrid",
        "granitemoe",
        {**GRANITE, **NO_EXPERTS, **GRANITE_MAMBA, **NO_MAMBA},
    ),
    ("granitemoehybrid", "granitemoehybrid", {**GRANITE, **NO_EXPERTS, **GRANITE_MAMBA}),
    ("granitemoehybrid", "granitemoehybrid", {**GRANITE, **NO_EXPERTS, **GRANITE_MAMBA, **NO_ROPE}),
    ("hyperclovax", "granitemoe", {**GRANITE, "use_post_norm": False, "head_dim": 16}),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", {"head_dim": 16, "rope_parameters": HUNYUAN_ROPE}),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", {"head_dim": 16, "attention_bias": True}),
    ("youtu", "deepseek_v3", YOUTU),
    ("youtu", "deepseek_v3", {**YOUTU, "rope_interleave": False, "q_lora_rank": None}),
    ("lfm2", "lfm2_moe", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    ("lfm2", "lfm2_moe", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
    ("nemotron_h", "nemotron_h", NEMOTRON),
    ("glm", "glm4_moe", {"head_dim": 8, "rope_parameters": HALF_ROPE}),
    ("glm", "glm4_moe", {"head_dim": 16, "attention_bias": False, "rope_parameters": {**YARN}}),
    ("helium", "mixtral", {"head_dim": 8}),
    ("helium", "mixtral", {"head_dim": 8, "rope_parameters": LINEAR}),
    ("arcee", "mixtral", {}),
    ("arcee", "mixtral", {"head_dim": 16, "rope_parameters": YARN}),
    ("minicpm3", "deepseek_v3", {**MINICPM3, "rope_parameters": LONGROPE}),
    ("minicpm3", "deepseek_v3", {**MINICPM3, "attention_bias": True, "q_lora_rank": None}),
    ("gemma4_text", "gemma4_text", GEMMA4),
    ("gemma4_text", "gemma4_text", {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma3_text", "beam", GEMMA3),
    ("gemma3_text", "beam", {**GEMMA3, "attention_bias": True, "final_logit_softcapping": 5.0}),
    ("gemma", "granitemoe", {"head_dim": 8}),
    ("gemma", "granitemoe", {"head_dim": 16, "attention_bias": True, "use_bidirectional_attention": False}),
]
ONE_OF_EACH = list({(dense, moe): (dense, moe, changes) for dense, moe, changes in EXACT}.values())
VALUES_CHANGED = [case for case in ONE_OF_EACH if case[0] in ("gemma", "minicpm3", "gemma3_text", "gemma4_text")]
"""Those with weights that are computed, and not only moved."""
ONE_OF_EACH_MOE = list({moe: (dense, moe, changes) for dense, moe, changes in EXACT}.values())
RECURRENT = ("qwen3_5_text", "qwen3_5_moe_text", "granitemoehybrid", "lfm2", "lfm2_moe", "nemotron_h")
"""Those that carry something from one row to the next where rows lie side by side."""
PARTIAL = [
    ("llama", "qwen2_moe", {"rope_parameters": LLAMA3}),
    ("llama", "qwen2_moe", {"head_dim": 16}),
    ("mistral", "qwen2_moe", {"sliding_window": 8}),
    ("mistral", "qwen2_moe", {"sliding_window": None}),
    ("ministral", "qwen2_moe", {"sliding_window": 8, "layer_types": ALTERNATING * 2, "head_dim": 16}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen3", "qwen3_moe", {"head_dim": 16}),
    ("seed_oss", "qwen2_moe", NO_DROPOUT),
    ("cwm", "qwen2_moe", {**CWM, "layer_types": ALTERNATING * 2}),
    ("qwen3", "mellum", {**MIXED_QWEN3, "layer_types": ALTERNATING * 2}),
    ("cohere2", "cohere2_moe", {"sliding_window": 8, "layer_types": ALTERNATING * 2}),
    ("cohere", "cohere2_moe", {}),
    ("ernie4_5", "ernie4_5_moe", {}),
    ("gemma3_text", "beam", {**GEMMA3, "layer_types": ALTERNATING * 2}),
    ("nemotron_h", "nemotron_h", {**NEMOTRON, "num_hidden_layers": 8, "layers_block_type": NEMOTRON_BLOCKS * 2}),
]
"""Those whose MoE can have layers without experts."""
FIRST_DENSE = [
    ("phi3", "glm4_moe", {"rope_parameters": HALF_ROPE}),
    ("youtu", "deepseek_v3", YOUTU),
    ("lfm2", "lfm2_moe", {"layer_types": ["conv", "full_attention"] * 2}),
    ("glm", "glm4_moe", {"head_dim": 16}),
    ("minicpm3", "deepseek_v3", MINICPM3),
]
"""Those where only the first layers can be without."""


@pytest.mark.parametrize(
    ("dense", "moe", "changes", "tied"),
    [*((*case, True) for case in EXACT), *((*case, False) for case in ONE_OF_EACH)],
    ids=lambda v: v if isinstance(v, str) else ("tied" if v else "untied") if isinstance(v, bool) else "",
)
def test_equal_experts_give_the_dense_logits(
    dense: str, moe: str, changes: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    """On a text longer than any window, from the files that assembly writes; and we read what transformers reads."""
    source = make_dense(tmp_path / "dense", model_type=dense, tie_word_embeddings=tied, **changes)
    reader = ModelReader(source)
    check_agreement(reader, with_own_head(reader, read_config(source)))  # a tied Nemotron-H is not tied
    made = assembled(source, [source] * 3, tmp_path / "moe")
    assert json.loads((made / "config.json").read_text())["model_type"] == moe
    expected = logits(source)
    largest = max(1.0, float(expected.abs().max()))  # fp32 rounds the larger ones by more, on some machines to 1.1e-5
    torch.testing.assert_close(logits(made), expected, rtol=0, atol=1e-5 * largest)
    assert greedy(made).equal(greedy(source))
    for folder in (source, made):
        model = load_model(folder, torch.float32).train()
        assert can_pack(model) == (model.config.model_type not in RECURRENT)
        if can_pack(model):
            assert_rows_see_themselves_alone(model)


def greedy(folder: Path) -> Tensor:
    """Tokens decoded one by one, from a prompt longer than any window, with the cache."""
    model = load_model(folder, torch.float32)
    return model.generate(IDS[:, :20], max_new_tokens=12, do_sample=False, use_cache=True)


def assert_rows_see_themselves_alone(model: Model) -> None:
    """A row's logits are the same in a line with others as in a padded batch of the same rows."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 99, (n,), generator=draw) for n in (7, 40, 12, 19, 5, 30)]
    batch = SideBySide(0)([{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows])
    mask, labels = batch.pop(TOKEN_MASK), batch.pop("labels")
    padded = pad_sequence(rows, batch_first=True)
    seen = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits
        expected = model(input_ids=padded, attention_mask=seen, use_cache=False).logits
    assert batch["input_ids"].shape == (3, 40)
    assert mask.sum() == seen.sum()
    assert (labels != -100).sum() == mask.sum() - len(rows)
    lines = [(number, place) for number, line in enumerate(fill_lines([len(row) for row in rows])) for place in line]
    begins = dict.fromkeys(range(len(batch["input_ids"])), 0)
    for number, place in lines:
        begin, count = begins[number], len(rows[place])
        assert batch["input_ids"][number, begin : begin + count].equal(rows[place])
        torch.testing.assert_close(found[number, begin : begin + count], expected[place, :count], rtol=0, atol=2e-5)
        begins[number] += count


@pytest.mark.parametrize("dense", sorted({family.dense for family in FAMILIES}))
def test_every_family_has_a_case(dense: str) -> None:
    rows = {f.moe.model_type for f in FAMILIES if f.dense == dense}
    assert rows == {moe for d, moe, _ in (*EXACT, *PARTIAL, *FIRST_DENSE) if d == dense}


@pytest.mark.parametrize("dense", WITHOUT)
def test_lora_experts_are_offered_where_every_layer_has_their_ffn(dense: str) -> None:
    config = CONFIG_MAPPING[dense](num_hidden_layers=2, num_key_value_heads=4)
    assert (problem_of(config.to_dict()) is None) == (dense in ADAPTERS)


@pytest.mark.parametrize("dense", sorted({*WITHOUT, *(family.dense for family in FAMILIES)}))
def test_every_family_is_known_by_the_names_of_its_models(dense: str) -> None:
    assert MODELS[dense]
    assert all(family.note for family in FAMILIES if family.dense == dense)


def test_damaged_counts_of_experts_are_none() -> None:
    for damage in ("x", [4], None, 0, {}):
        assert expert_counts({"num_experts": damage}) == (0, 0)
        assert family_of({**CONFIG_MAPPING["llama"]().to_dict(), "num_experts": damage}, "base").dense == "llama"


@pytest.mark.parametrize("moe", MOES)
def test_every_moe_is_given_to_the_other_programs(moe: str) -> None:
    """Or is said not to have been."""
    given = {name.split(" -> ")[1] for name in test_clients.FAMILIES}
    known = {limit.client for limit in (*LIMITS, *UNTRIED) if limit.moe == moe and not limit.where}
    assert moe in given or known == set(CLIENTS)


@pytest.mark.parametrize("limit", [*LIMITS, *UNTRIED], ids=lambda limit: f"{limit.client} {limit.moe}")
def test_every_limit_is_of_a_moe_here_and_says_of_which_of_them(limit: Limit) -> None:
    assert limit.moe in MOES
    assert limit.client in CLIENTS
    assert (limit.where == "") == (limit.when is always)


@pytest.mark.parametrize(("dense", "moe", "changes"), ONE_OF_EACH, ids=lambda v: v if isinstance(v, str) else "")
def test_an_expert_of_any_layout_is_its_checkpoint(
    dense: str, moe: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    source = make_dense(tmp_path / "dense", model_type=dense, **changes)
    folders = [perturbed(source, tmp_path / f"c{i}", i) for i in (1, 2)]
    assert_experts_are(folders, assembled(source, folders, tmp_path / "moe"))


@pytest.mark.parametrize(("dense", "moe", "changes"), ONE_OF_EACH_MOE, ids=lambda v: v if isinstance(v, str) else "")
@torch.no_grad()
def test_a_bias_on_the_choice_of_experts_leaves_their_weights_as_the_model_has_them(
    dense: str, moe: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """And what no loss reaches is not trained."""
    source = make_dense(tmp_path / "dense", model_type=dense, **changes)
    folders = [perturbed(source, tmp_path / f"c{i}", i) for i in (1, 2, 3)]
    model = load_model(assembled(source, folders, tmp_path / "moe", router_std=0.5), torch.float32)
    for router in router_modules(model):
        if hasattr(router, "per_expert_scale"):
            router.per_expert_scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
    expected = model(IDS).logits
    assert (moe in SIGMOID) == (MOES[moe].routing == "sigmoid")
    with LossFreeBias(model, 0.1):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    freeze(model, ())
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert all(name.endswith("e_score_correction_bias") for name in fixed)
    assert bool(fixed) == (moe == "ernie4_5_moe")


def test_all_parameters_of_a_router_are_the_routers(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", model_type="gemma4_text", **GEMMA4)
    model = load_model(assembled(source, [source] * 2, tmp_path / "moe"), torch.float32)
    freeze(model, ("router",))
    fixed = {name.rpartition("router.")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"proj.weight", "scale", "per_expert_scale"}


@pytest.mark.parametrize("moe", [moe for moe in MOES if MOES[moe].least_experts > 1])
def test_a_router_that_compares_two_experts_is_refused_one(moe: str, tmp_path: Path) -> None:
    dense, changes = next((dense, changes) for dense, found, changes in ONE_OF_EACH_MOE if found == moe)
    source = make_dense(tmp_path / "dense", model_type=dense, **changes)
    with pytest.raises(UpcycleError, match=rf"num_experts is 1, but the router of {moe}, .* at least 2 experts"):
        map_model(source, ModelReader(source), 1)


def test_channels_that_grouped_products_cannot_take_are_refused(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", intermediate_size=52)
    with pytest.raises(UpcycleError, match=r"the FFN has 52 channels .*, which is no multiple of 8"):
        map_model(source, ModelReader(source), 2)


def test_routing_vectors_of_gemma_4_see_what_other_modules_in_the_routers_place_see(tmp_path: Path) -> None:
    """The FFN's input normalised, and not as it is."""
    source = make_dense(tmp_path / "dense", model_type="gemma4_text", **GEMMA4)
    model = load_model(assembled(source, [source] * 3, tmp_path / "moe", router_std=0.3), torch.float32)
    vectors, seen = routing_vectors(router_modules(model)[0]), []
    with torch.no_grad(), RouterRecorder(model) as recorder:
        model(IDS)
        with swapped_routers(model, lambda _: ForcedRouter(RowExperts(), 3)) as routers:
            routers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            model(IDS)
    expected = torch.log_softmax(seen[0] @ vectors.T, dim=-1)
    torch.testing.assert_close(recorder.logits[0], expected)
    assert expected.std(dim=0).min() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("dense", "moe", "changes"), VALUES_CHANGED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_computed_is_rounded_once(
    dense: str, moe: str, changes: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    """And the comparison at the end of assembly, which sets rounding aside, is as sharp as in fp32."""
    source = make_dense(tmp_path / "dense", model_type=dense, **changes)
    folders = [perturbed(source, tmp_path / f"c{i}", i) for i in (1, 2)]
    exact = ModelReader(assembled(source, folders, tmp_path / "exact"))
    made = ModelReader(assembled(source, folders, tmp_path / "moe", dtype=dtype))
    rounded = getattr(torch, dtype)
    assert all(torch.equal(made.tensor(name), exact.tensor(name).to(rounded)) for name in made.names())


@pytest.mark.parametrize(("dense", "moe", "changes"), ONE_OF_EACH_MOE, ids=lambda v: v if isinstance(v, str) else "")
def test_names_on_disk_are_those_of_transformers(dense: str, moe: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", model_type=dense, **changes)
    made = assembled(source, [source] * 2, tmp_path / "moe")
    load_model(made, torch.float32).save_pretrained(tmp_path / "again")
    ours, theirs = ModelReader(made), ModelReader(tmp_path / "again")
    assert ours.names() == theirs.names()
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True would be lost"),
        (
            {"model_type": "phi3", "rope_parameters": {"partial_rotary_factor": 0.5}, "sliding_window": 2047},
            r"partial_rotary_factor=0\.5.*; as glm4_moe, sliding_window=2047 would be lost",
        ),
        ({"model_type": "ministral3", "rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
        ({"model_type": "granitemoehybrid", "num_local_experts": 4}, "a mixture of 4 experts already"),
        ({"model_type": "nemotron_h"}, "n_routed_experts=8: nemotron_h is a mixture of 8 experts already"),
        ({"model_type": "nemotron_h", "layers_block_type": ["full_attention"]}, "none of its blocks is an FFN"),
        ({"model_type": "hyperclovax"}, "use_post_norm=True would be lost"),
        (
            {"model_type": "olmo3", "layer_types": ALTERNATING, "num_hidden_layers": 2},
            "exact with full attention in all",
        ),
        ({"model_type": "smollm3", "rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ({"model_type": "smollm3", "attention_bias": True}, "attention_bias=True would be lost"),
        ({"model_type": "granite", "mlp_bias": True}, "mlp_bias=True would be lost"),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop=0.1 would be lost"),
        ({"model_type": "internlm3", "attention_bias": True, "mlp_bias": True}, "attention_bias=True would be lost"),
        ({"model_type": "seed_oss", "attention_out_bias": True}, "attention_out_bias=True would be lost"),
        ({"model_type": "seed_oss", "mlp_bias": True}, "mlp_bias=True would be lost"),
        ({"model_type": "helium", "attention_bias": True}, "attention_bias=True would be lost"),
        (
            {"model_type": "arcee", "hidden_act": "gelu"},
            r"hidden_act='gelu' would be lost \(exact with hidden_act='relu2'",
        ),
        ({"model_type": "ernie4_5", "use_bias": True}, "use_bias=True would be lost"),
        ({"model_type": "cohere2", "rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        (
            {"model_type": "gemma", "use_bidirectional_attention": True},
            "use_bidirectional_attention=True would be lost",
        ),
        ({"model_type": "gemma4_text"}, r"hidden_size_per_layer_input=256, .* on a copy with fewer \(exact with 0\)"),
        (
            {"model_type": "gemma4_text", "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
            "a mixture of 4 experts already",
        ),
        ({"model_type": "gemma2"}, "caps the scores of attention"),
        ({"model_type": "exaone4"}, "norms only after attention and FFN"),
        ({"model_type": "glm4"}, "normalise queries and keys too"),
        ({"model_type": "apertus"}, "an activation with weights of its own"),
        ({"model_type": "starcoder2"}, "its norms have biases"),
        ({"model_type": "jais2"}, "its norms have biases"),
        ({"model_type": "nemotron"}, "its norms have biases"),
        ({"model_type": "stablelm"}, "its norms have biases"),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention=True would be lost",
        ),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0 would be lost"),
        ({"model_type": "olmo"}, "its norms have no weights"),
        ({"model_type": "cohere", "use_qk_norm": True}, "use_qk_norm=True would be lost"),
        ({"model_type": "gpt2"}, "its FFN has no gate"),
        ({"model_type": "phi"}, "side by side"),
        ({"model_type": "mixtral"}, r"num_local_experts=8: mixtral is a mixture of 8 experts already.*2604.*0005-moe"),
        ({"model_type": "olmoe"}, "num_experts=64: olmoe is a mixture of 64 experts already"),
        ({"model_type": "qwen3_vl_moe"}, "qwen3_moe is a mixture of 60 experts already"),
        ({"model_type": "bloom"}, "there is no row for it; `upcycle families` lists"),
        ({"model_type": "qwen2_vl", "text_config": {}}, "a multimodal model"),
    ],
    ids=lambda v: v["model_type"] if isinstance(v, dict) else "",
)
def test_what_would_be_wrong_is_refused_with_the_reason(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UpcycleError, match=message):
        family_of(read_config(tmp_path), "base")


@pytest.mark.parametrize(
    ("dense", "changes", "moe", "programs"),
    [
        ("seed_oss", {}, "qwen2_moe", "does not renormalise"),  # with dropout, as published
        ("internlm3", {"head_dim": 16}, "mixtral", "ignores head_dim"),
        ("phi3", PHI3_LONG, "mixtral", "WRONG: .* long factors"),
        ("ernie4_5", {}, "ernie4_5_moe", "llama.cpp.* not tried"),
        ("smollm3", NOPE, "granitemoe_swa", "llama.cpp.* yes"),
        ("cohere2", {"sliding_window": 8}, "cohere2_moe", "WRONG: has windows one token longer"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_check_says_what_it_becomes_and_which_programs_read_it(
    dense: str, changes: dict[str, Any], moe: str, programs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(str(make_dense(tmp_path / "dense", model_type=dense, **changes)), 4, 2, "source")
    said = capsys.readouterr().out
    assert f"dense: {dense} -> {moe}, 4 experts, top-2" in said
    assert "exact: logits with equal experts are the dense model's" in said
    assert re.search(programs, said)


@pytest.mark.parametrize(("dense", "changes"), [("llama", {}), ("ernie4_5", {}), ("smollm3", NOPE), ("cohere2", {})])
def test_a_made_moe_is_described_by_its_own_fields(dense: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", model_type=dense, **changes)
    made = assembled(source, [source] * 3, tmp_path / "moe")
    assert "mixture of 3 experts, top-2: " in describe(made).what
    assert describe(source).what == f"A dense {dense} model"


WRONG = [
    ("smollm3", {"no_rope_layers": [1, 0]}),
    ("olmo3", {"layer_types": ALTERNATING, "sliding_window": 8, "rope_parameters": FULL_OLMO3}),
    ("ministral", {"layer_types": ALTERNATING, "sliding_window": 8, "head_dim": 8}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("qwen3", {"layer_types": ALTERNATING, "sliding_window": 8, "use_sliding_window": True}),
]


@pytest.mark.parametrize(("dense", "changes"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_the_comparison_of_logits_finds_what_names_do_not_tell(
    dense: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """The rows' rules set aside: what they refuse is really another function."""
    source = make_dense(tmp_path / "dense", model_type=dense, **changes)
    config, reader = read_config(source), ModelReader(source)
    family = next(f for f in FAMILIES if f.dense == dense)
    mapping = Mapping(source, family, config, shared_shapes(reader, family, config), 2)
    with pytest.raises(UpcycleError, match="differ from the dense model's"):
        check_source(mapping, reader)
