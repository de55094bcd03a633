"""Every upcycling method is a recipe: each runs end to end, and starts from what its paper says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import make_dense
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import load_model
from upcycle.merging.perturb import add_noise, perturbed, redraw
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import parse_recipe
from upcycle.records.files import LINEAGE
from upcycle.weights.safetensors_io import ModelReader
from worlds import logits, shrunk, some_long

EXPERTS = {"sft": 1, "btx": 2}


@pytest.mark.parametrize(
    "name",
    some_long(
        ["sft", "vanilla", "vanilla-sft", "noise", "drop", "btx", "upit", "upit-paper"], {"vanilla", "btx", "upit"}
    ),
)
def test_each_method_runs_and_learns(name: str, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    count = EXPERTS.get(name, 4)
    assemble = {"num_experts_per_tok": min(2, count)}
    recipe = shrunk(name, tiny_recipe, expand={"num_experts": count}, assemble=assemble)
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    assert scores["MoE"]["loss"]["all"] < scores["base"]["loss"]["all"]
    assert load_model(run.folder / "posttrain", torch.float32).config.num_local_experts == count
    assert run.recipe.prepares == (name in ("vanilla-sft", "btx", "upit", "upit-paper"))
    if name in ("sft", "vanilla"):
        torch.testing.assert_close(logits(run.folder / "assemble"), logits(run.base.folder), rtol=0, atol=1e-5)
    if name == "btx":
        assert [e.name for e in run.plan.experts] == ["domain-copy", "domain-reverse"]


REWRITTEN: dict[str, dict[str, Any]] = {
    "glm": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "minicpm3": {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "head_dim": 8, "global_head_dim": 8, "rope_parameters": None},
}


@pytest.mark.parametrize("dense", some_long(REWRITTEN, {"glm", "gemma4_text"}))
def test_families_with_rewritten_weights_go_all_the_way(
    dense: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    """With moments, of which those are carried whose weights only change places."""
    base = make_dense(tmp_path / "base", model_type=dense, num_key_value_heads=4, **REWRITTEN[dense])
    carried = {"optimizer_state": "carry"}
    recipe = shrunk("upit", {**tiny_recipe, "base": str(base)}, expand={"num_experts": 3}, posttrain=carried)
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    assert scores["MoE"]["loss"]["all"] < scores["base"]["loss"]["all"]
    before, after = ModelReader(run.folder / "assemble"), ModelReader(run.folder / "posttrain")
    same = {name for name in before.names() if torch.equal(before.tensor(name), after.tensor(name))}
    kept = {name for name in before.names() if name.endswith("post_feedforward_layernorm_2.weight")}
    assert len(kept) == (2 if dense == "gemma4_text" else 0)
    assert kept <= same


def test_fine_grained_experts_cost_what_the_dense_model_costs(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Whole experts in plan, seed data, scores and shares; slices in the model, its router and its load."""
    fine = {"num_experts_per_tok": 1, "granularity": 2}
    recipe = shrunk("upit", tiny_recipe, expand={"num_experts": 4}, assemble=fine, posttrain={"learning_rate": 3e-3})
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    start = load_file(run.folder / "route" / "router.safetensors")
    for vectors in start.values():
        assert vectors.shape == (8, 32)
        assert torch.equal(vectors[::2], vectors[1::2])
    end = load_model(run.folder / "posttrain", torch.float32)
    trained = end.model.layers[0].mlp.gate.weight
    assert not torch.equal(trained[::2], trained[1::2])
    assert (end.config.num_local_experts, end.config.num_experts_per_tok, end.config.intermediate_size) == (8, 2, 24)
    active = run.kind.active(run.base, recipe)
    assert active.moe == active.dense + 2 * 8 * 32  # the routers of two layers
    report = json.loads((run.folder / "route" / "report.json").read_text())
    assert {sample["expert"] for sample in report["samples"]} == {0, 1, 2, 3}
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    assert scores["MoE"]["loss"]["all"] < scores["base"]["loss"]["all"]
    assert len(scores["MoE"]["expert_share"]["all"][0]) == 4
    log = json.loads((run.folder / "posttrain" / "log.json").read_text())["log"]
    assert len(log[0]["load"][0]) == 8
    lines = LINEAGE.read(run.folder / "posttrain").lines
    assert lines[0].endswith("(slices: experts 0 to 1)")
    assert lines[3].endswith("(slices: experts 6 to 7)")
    said = run.kind.describe(run.folder / "posttrain").what
    assert "4 experts of 2 slices each, top-1 (8 experts, top-2, on disk)" in said
    assert f"{active.moe / active.dense:.2f} times the dense FLOPs" in said


def experts_of(run: Run, weight: str) -> list[torch.Tensor]:
    reader = ModelReader(run.folder / "assemble")
    names = [f"model.layers.1.block_sparse_moe.experts.{e}.{weight}.weight" for e in range(3)]
    return [reader.tensor(name) for name in names]


def test_drop_draws_the_same_channels_of_all_three_weights_anew(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = Run(shrunk("drop", tiny_recipe, expand={"num_experts": 3, "perturb_rate": 0.25}), tmp_path / "run")
    run_stages(run, ("prepare", "expand", "assemble"))
    dense = ModelReader(run.base.folder)
    changed = []
    for weight, source, across in (("w1", "gate_proj", 1), ("w3", "up_proj", 1), ("w2", "down_proj", 0)):
        old = dense.tensor(f"model.layers.1.mlp.{source}.weight")
        differs = [(new != old) for new in experts_of(run, weight)]
        assert all(torch.equal(d.all(dim=across), d.any(dim=across)) for d in differs)  # whole channels
        changed.append([d.any(dim=across).nonzero()[:, 0].tolist() for d in differs])
    assert changed[0] == changed[1] == changed[2]
    assert all(len(channels) == 12 for channels in changed[0])  # a quarter of 48
    assert changed[0][0] != changed[0][1] != changed[0][2]


def test_noise_falls_on_a_share_of_the_weights(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = Run(shrunk("noise", tiny_recipe, expand={"num_experts": 3}), tmp_path / "run")
    run_stages(run, ("prepare", "expand", "assemble"))
    old = ModelReader(run.base.folder).tensor("model.layers.1.mlp.up_proj.weight")
    noise = [new - old for new in experts_of(run, "w3")]
    assert all(0.45 < (n != 0).float().mean() < 0.55 for n in noise)
    assert all(n[n != 0].std().item() == pytest.approx(0.02, rel=0.1) for n in noise)
    assert not torch.equal(noise[0], noise[1])


def test_spread_moves_experts_along_the_line_through_the_last_checkpoint(
    tiny_recipe: dict[str, Any], checkpoints: list[Path], tmp_path: Path
) -> None:
    """Children too; the identity check of the assembly holds for each."""

    def experts(scale: float) -> list[torch.Tensor]:
        expand = {"num_experts": 4, "num_checkpoints": 2, "select": "first", "spread": scale}
        prepare = {"checkpoints": [str(folder) for folder in checkpoints]}
        run = Run(parse_recipe({**tiny_recipe, "prepare": prepare, "expand": expand}, "test"), tmp_path / str(scale))
        run_stages(run, ("prepare", "expand", "assemble"))
        return experts_of(run, "w2")

    last = ModelReader(checkpoints[-1]).tensor("model.layers.1.mlp.down_proj.weight")
    whole = experts(1)
    assert torch.equal(whole[0], ModelReader(checkpoints[0]).tensor("model.layers.1.mlp.down_proj.weight"))
    for scale in (0, 0.5, -0.5):
        for moved, expert in zip(experts(scale), whole, strict=True):
            torch.testing.assert_close(moved, last + scale * (expert - last), rtol=0, atol=1e-6)


def test_checkpoints_of_whole_ffns_alone_are_spread(tiny_recipe: dict[str, Any]) -> None:
    for sections in ({"expand": {"copies_of": "last"}}, {"prepare": {"train": "lora"}}):
        changed = {**tiny_recipe, **sections}
        changed["expand"] = {**changed["expand"], "spread": 0.5}
        with pytest.raises(UpcycleError, match=r"expand.spread is 0.5, which moves whole FFNs"):
            parse_recipe(changed, "test")


def test_what_is_drawn_has_the_mean_and_deviation_of_what_it_replaces() -> None:
    weight = 3 + 0.5 * torch.randn(2000, 30, generator=torch.Generator().manual_seed(0))
    weight[:100] = 0
    new = redraw(weight, 0, torch.arange(100, 1100), torch.Generator().manual_seed(1))
    assert torch.equal(new[:100], weight[:100])
    assert torch.equal(new[1100:], weight[1100:])
    assert new[100:1100].mean().item() == pytest.approx(3, abs=0.02)
    assert new[100:1100].std().item() == pytest.approx(0.5, abs=0.02)
    key = (7, 1, "model.layers.0.mlp.up_proj.weight.0")
    again = perturbed(weight, 0, "drop", 0.5, 0.0, key)
    assert torch.equal(again, perturbed(weight, 0, "drop", 0.5, 0.0, key))
    assert torch.equal(add_noise(weight, 0.0, 1.0, torch.Generator()), weight)


def test_only_copies_are_perturbed(tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(UpcycleError, match=r"expand.perturb is drop, .*set expand.copies_of=last or base"):
        parse_recipe({**tiny_recipe, "expand": {"perturb": "drop"}}, "test")
