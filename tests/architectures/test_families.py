"""Every row of the table of families: exact where it says so, refused with a reason elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from conftest import make_dense, perturbed
from upcycle.architectures.agreement import check_agreement
from upcycle.architectures.check import check_source
from upcycle.architectures.families import FAMILIES, family_of
from upcycle.architectures.mapping import Mapping, shared_shapes
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import load_model
from upcycle.training.packing import TOKEN_MASK, SideBySide, fill_lines
from upcycle.weights.folders import read_config
from upcycle.weights.safetensors_io import ModelReader
from worlds import assembled, assert_experts_are, logits

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
    ("ministral", "qwen2_moe", {"sliding_window": 8, "layer_types": ALTERNATING, "head_dim": 16}),
    ("phi3", "mixtral", {}),
    ("phi3", "mixtral", {"sliding_window": 8}),
    ("smollm3", "mixtral", {"no_rope_layers": [1, 1]}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen2", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ALTERNATING[::-1]}),
    ("qwen3", "qwen3_moe", {"head_dim": 16}),
    ("qwen3", "qwen3_moe", {"attention_bias": True, "rope_parameters": YARN}),
    ("olmo2", "flex_olmo", {}),
    ("olmo2", "flex_olmo", {"attention_bias": True}),
    ("olmo3", "flex_olmo", {"layer_types": ["full_attention"] * 2, "rope_parameters": FULL_OLMO3}),
    ("granite", "granitemoe", GRANITE),
    ("granite", "granitemoe", {**GRANITE, "attention_bias": True}),
]
PARTIAL = [
    ("llama", "qwen2_moe", {"rope_parameters": LLAMA3}),
    ("llama", "qwen2_moe", {"head_dim": 16}),
    ("mistral", "qwen2_moe", {"sliding_window": 8}),
    ("mistral", "qwen2_moe", {"sliding_window": None}),
    ("ministral", "qwen2_moe", {"sliding_window": 8, "layer_types": ALTERNATING * 2, "head_dim": 16}),
    ("qwen2", "qwen2_moe", {}),
    ("qwen3", "qwen3_moe", {"head_dim": 16}),
]
"""Those whose MoE can have layers without experts."""


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("dense", "moe", "changes"), EXACT, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_equal_experts_give_the_dense_logits(
    dense: str, moe: str, changes: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    """On a text longer than any window, from the files that assembly writes; and we read what transformers reads."""
    source = make_dense(tmp_path / "dense", model_type=dense, tie_word_embeddings=tied, **changes)
    check_agreement(ModelReader(source), read_config(source))
    made = assembled(source, [source] * 3, tmp_path / "moe")
    assert json.loads((made / "config.json").read_text())["model_type"] == moe
    torch.testing.assert_close(logits(made), logits(source), rtol=0, atol=1e-5)
    for folder in (source, made):
        assert_rows_see_themselves_alone(folder)


def assert_rows_see_themselves_alone(folder: Path) -> None:
    """A row's logits are the same in a line with others as in a padded batch of the same rows."""
    model, draw = load_model(folder, torch.float32).train(), torch.Generator().manual_seed(1)
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
    assert rows == {moe for d, moe, _ in (*EXACT, *PARTIAL) if d == dense}


@pytest.mark.parametrize(
    ("dense", "changes"),
    [("phi3", {}), ("qwen2", {}), ("granite", GRANITE), ("olmo2", {}), ("qwen3", {})],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_an_expert_of_any_layout_is_its_checkpoint(dense: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", model_type=dense, **changes)
    folders = [perturbed(source, tmp_path / f"c{i}", i) for i in (1, 2)]
    assert_experts_are(folders, assembled(source, folders, tmp_path / "moe"))


@pytest.mark.parametrize("dense", ["llama", "qwen2", "granite", "olmo2", "qwen3"])
def test_names_on_disk_are_those_of_transformers(dense: str, tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", model_type=dense)
    made = assembled(source, [source] * 2, tmp_path / "moe")
    load_model(made, torch.float32).save_pretrained(tmp_path / "again")
    ours, theirs = ModelReader(made), ModelReader(tmp_path / "again")
    assert ours.names() == theirs.names()
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in ours.names())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias=True would be lost"),
        ({"model_type": "phi3", "rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
        ({"model_type": "ministral3", "rope_parameters": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
        ({"model_type": "qwen3", "layer_types": ALTERNATING, "num_hidden_layers": 2}, "mix full_attention and sliding"),
        (
            {"model_type": "olmo3", "layer_types": ALTERNATING, "num_hidden_layers": 2},
            "exact with full attention in all",
        ),
        ({"model_type": "smollm3"}, r"layers \[3, 7, 11\] have no rotary positions"),
        ({"model_type": "smollm3", "attention_bias": True}, "attention_bias=True would be lost"),
        ({"model_type": "granite", "mlp_bias": True}, "mlp_bias=True would be lost"),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop=0.1 would be lost"),
        ({"model_type": "gemma"}, "scales embeddings"),
        ({"model_type": "gemma2"}, "caps logits"),
        ({"model_type": "gemma3_text"}, "two kinds of rotary positions"),
        ({"model_type": "olmo"}, "its norms have no weights"),
        ({"model_type": "gpt2"}, "its FFN has no gate"),
        ({"model_type": "phi"}, "side by side"),
        ({"model_type": "mixtral"}, "there is no row for it; supported: llama -> mixtral"),
        ({"model_type": "qwen2_vl", "text_config": {}}, "a model of more than text"),
    ],
    ids=lambda v: v["model_type"] if isinstance(v, dict) else "",
)
def test_what_would_be_wrong_is_refused_with_the_reason(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UpcycleError, match=message):
        family_of(read_config(tmp_path), "base")


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
