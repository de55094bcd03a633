"""The MoE is the dense model where it must be: equal experts, or every token forced to one expert."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_dense, perturbed
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import KINDS, load_model
from upcycle.merging.lineage import Child, materialise
from upcycle.records.plan import Checkpoint, Expert
from upcycle.settings import ExpandSettings
from upcycle.stages.expert_expansion.expand import expand
from upcycle.weights.safetensors_io import SINGLE, ModelReader
from worlds import as_base, assemble, assembled, assert_experts_are, forced_logits, logits, plan_of


def test_forced_to_an_expert_gives_its_checkpoint(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    assert_experts_are(checkpoints, assembled(base, checkpoints, tmp_path / "moe"))


def test_rows_of_a_batch_may_go_to_different_experts(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    model = load_model(assembled(base, checkpoints, tmp_path / "moe"), torch.float32)
    found = forced_logits(model, [2, 0], 3)
    torch.testing.assert_close(found[0], logits(checkpoints[2])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], logits(checkpoints[0])[1], rtol=0, atol=1e-5)
    assert type(model.model.layers[0].mlp.gate).__name__ == "MixtralTopKRouter"  # its own is back


def test_a_config_that_relies_on_its_defaults_is_completed_with_llamas(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "short")
    config = json.loads((base / "config.json").read_text())
    for field in ("attention_dropout", "initializer_range", "hidden_act", "rms_norm_eps", "head_dim"):
        del config[field]
    config.update(rope_theta=config.pop("rope_parameters")["rope_theta"])  # as older files have it
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    moe = assembled(tmp_path / "short", [tmp_path / "short"] * 2, tmp_path / "moe")
    written = json.loads((moe / "config.json").read_text())
    assert written["rms_norm_eps"] == 1e-6  # Llama's default, not Mixtral's 1e-5
    assert written["rope_theta"] == 20000.0
    torch.testing.assert_close(logits(moe), logits(tmp_path / "short"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_storage_dtype_is_what_the_config_says(dtype: str, base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    moe = assembled(base, checkpoints, tmp_path / "moe", dtype=dtype)
    assert json.loads((moe / "config.json").read_text())["dtype"] == dtype
    reader = ModelReader(moe)
    assert {str(reader.spec(name).dtype) for name in reader.names()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("shared", ["last", "mean", "base"])
def test_shared_weights_come_from_where_the_recipe_says(shared: str, base: Path, tmp_path: Path) -> None:
    folders = [perturbed(base, tmp_path / f"c{i}", i, ffn_only=False) for i in (1, 2)]
    moe = load_model(assembled(base, folders, tmp_path / "moe", shared=shared), torch.float32)
    name = "model.layers.1.self_attn.q_proj.weight"
    values = [load_model(f, torch.float32).get_parameter(name) for f in (*folders, base)]
    expected = {"last": values[1], "mean": (values[0] + values[1]) / 2, "base": values[2]}[shared]
    torch.testing.assert_close(moe.get_parameter(name), expected)


def test_a_process_without_upcycle_loads_and_generates(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    moe = assembled(base, checkpoints, tmp_path / "moe")
    script = f"""
import sys
sys.modules["upcycle"] = None  # importing it raises
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained({str(moe)!r}, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained({str(moe)!r})
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
prompt = tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}], add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)
text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
assert text.startswith("<|im_start|>user"), text
assert model.generation_config.eos_token_id == 2
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_config_is_one_that_other_programs_read(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    moe = assembled(base, checkpoints, tmp_path / "moe")
    config = json.loads((moe / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["output_router_logits"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 20000.0
    # the same names on disk as transformers writes
    model = load_model(moe, torch.float32)
    model.save_pretrained(tmp_path / "again")
    from safetensors import safe_open

    names = [set(safe_open(p / "model.safetensors", "pt").keys()) for p in (moe, tmp_path / "again")]
    assert names[0] == names[1]


def test_what_older_files_carry_without_need_is_left_aside(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    older = tmp_path / "older"
    shutil.copytree(base, older)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # tied, but written
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, older / "model.safetensors", metadata={"format": "pt"})
    moe = assembled(older, checkpoints, tmp_path / "moe")
    torch.testing.assert_close(logits(moe), logits(assembled(base, checkpoints, tmp_path / "same")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "is in only one of this checkpoint and the base"),
        ("model.layers.0.mlp.gate_proj.bias", "is in only one of this checkpoint and the base"),
    ],
)
def test_a_tensor_with_no_place_is_refused(
    name: str, message: str, base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    odd = tmp_path / "odd"
    shutil.copytree(checkpoints[0], odd)
    tensors = load_file(odd / "model.safetensors")
    save_file({**tensors, name: torch.ones(32)}, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpcycleError, match=f"{name} {message}"):
        assembled(base, [odd, *checkpoints], tmp_path / "moe")


def test_nan_in_a_shared_tensor_is_named(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoints[0], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpcycleError, match=r"broken: model\.norm\.weight holds NaN or Inf"):
        assembled(base, [checkpoints[1], broken], tmp_path / "moe")


@pytest.mark.parametrize("merge", ["linear", "slerp", "ties", "dare_ties", "dare"])
def test_children_in_the_moe_are_those_of_the_lineage(
    merge: str, base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    """With the base as an expert, and two children, whatever the kernel."""
    settings = ExpandSettings(num_experts=6, merge=merge, keep_base=True)
    named = [Checkpoint(name=f.name, path=str(f)) for f in checkpoints]
    plan = expand(KINDS["ffn"], as_base(base), named, checkpoints, settings, 5, tmp_path)
    assemble("ffn", base, checkpoints, plan, tmp_path)
    made, readers = ModelReader(tmp_path), [ModelReader(f) for f in (base, *checkpoints)]
    for dense, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
        tensor = f"model.layers.1.mlp.{dense}.weight"
        theta, *sources = (reader.elements(tensor) for reader in readers)
        children = [Child(e.parents, e.weights) for e in plan.children]
        expected = [*sources, theta, *materialise(theta, [*sources, theta], children, merge, 0.2, 5, tensor)]
        assert len(expected) == 6
        for expert, values in enumerate(expected):
            found = made.elements(f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight")
            torch.testing.assert_close(found, values)


def test_a_base_among_spread_experts_stays_the_base(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    """It is one on purpose (expand.keep_base)."""
    experts = [Expert(name=f"c{i}", kind="checkpoint", checkpoint=i) for i in (0, 1)]
    plan = plan_of(3, experts=(*experts, Expert(name="base", kind="base")), spread=-0.25)
    made = load_model(assemble("ffn", base, checkpoints[:2], plan, tmp_path / "moe"), torch.float32)
    torch.testing.assert_close(forced_logits(made, [1, 1], 3), logits(checkpoints[1]), rtol=0, atol=1e-5)  # the last
    moved = forced_logits(made, [0, 0], 3) - logits(checkpoints[0])
    assert moved.abs().max() > 1e-3
    stays = load_model(assembled(checkpoints[1], [base] * 2, tmp_path / "alone"), torch.float32)
    torch.testing.assert_close(forced_logits(made, [2, 2], 3), forced_logits(stays, [0, 0], 2), rtol=0, atol=1e-5)


def test_experts_that_are_not_finite_are_named_also_where_all_are_copies(base: Path, tmp_path: Path) -> None:
    """In the last layer, which the comparison of logits does not reach."""
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(broken / SINGLE)
    tensors[name][3, 2] = torch.nan
    save_file(tensors, broken / SINGLE, {"format": "pt"})
    with pytest.raises(UpcycleError, match=rf"the FFN weight {re.escape(name)} holds NaN or Inf"):
        assembled(base, [broken, broken], tmp_path / "moe")


def test_what_is_rounded_with_the_ffns_is_said(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = Path(shutil.copytree(base, tmp_path / "mixed"))
    tensors = {n: t.bfloat16() if ".mlp." in n else t for n, t in load_file(mixed / SINGLE).items()}
    save_file(tensors, mixed / SINGLE, {"format": "pt"})
    assembled(mixed, [mixed, mixed], tmp_path / "moe")
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(
        r"\d+ tensors such as \S+ of \S+ have more precision than its FFNs, and are rounded to bfloat16", said
    )
    assembled(mixed, [mixed, mixed], tmp_path / "whole", dtype="float32")
    assert "more precision" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [2e-4, 1.8e-3])  # of 0.05: as it is made, and as a training with a tied head leaves it
def test_padding_rows_that_are_nearly_zero_are_no_error(size: float, tmp_path: Path) -> None:
    """Gemma 3's norms have another epsilon's share in Beam, which is all that such a row's hidden state is."""
    dense = make_dense(tmp_path / "dense", model_type="gemma3_text", head_dim=8, tie_word_embeddings=True)
    tensors = load_file(dense / SINGLE)
    tensors["model.embed_tokens.weight"][:40] = size * torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    save_file(tensors, dense / SINGLE, {"format": "pt"})
    moe = assembled(dense, [dense, dense], tmp_path / "moe")
    ids = torch.arange(40, 99)[None]
    found, expected = (load_model(folder, torch.float32)(ids).logits.detach() for folder in (moe, dense))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
