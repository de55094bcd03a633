"""`assemble.layers`: some layers get experts, the others keep one FFN."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_families import FIRST_DENSE, PARTIAL

from conftest import make_dense, perturbed
from upcycle.architectures.families import family_of
from upcycle.architectures.layouts import moe_layers
from upcycle.architectures.mapping import map_model, with_layers
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import load_model
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import load_recipe, parse_recipe
from upcycle.settings import AssembleSettings
from upcycle.weights.folders import read_config
from upcycle.weights.safetensors_io import ModelReader
from worlds import assemble, forced_logits, logits, plan_of, shrunk


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("dense", "moe", "changes", "layers"),
    [
        *((*case, [3, 7] if case[0] == "nemotron_h" else [1, 3]) for case in PARTIAL),
        *((*case, [2, 3]) for case in FIRST_DENSE),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_equal_experts_give_the_dense_logits(
    dense: str, moe: str, changes: dict[str, Any], layers: list[int], tied: bool, tmp_path: Path
) -> None:
    shape = {"num_hidden_layers": 4, "intermediate_size": 96}  # more than the check's copy has
    source = make_dense(tmp_path / "dense", model_type=dense, tie_word_embeddings=tied, **{**shape, **changes})
    made = assemble("ffn", source, [source] * 3, plan_of(3), tmp_path / "moe", layers=layers)
    assert json.loads((made / "config.json").read_text())["model_type"] == moe
    assert moe_layers(read_config(made)) == layers
    names = ModelReader(made).names()
    assert {int(name.split(".")[2]) for name in names if ".experts." in name} == set(layers)
    torch.testing.assert_close(logits(made), logits(source), rtol=0, atol=1e-5)


def test_a_forced_expert_is_its_checkpoint_where_that_keeps_the_other_layers(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", model_type="qwen3", num_hidden_layers=4)
    kept = load_model(source, torch.float32).state_dict()
    folders = []
    for number in (1, 2, 3):
        folder = perturbed(source, tmp_path / f"c{number}", number)
        model = load_model(folder, torch.float32)
        for layer in (0, 2):
            for name, parameter in model.model.layers[layer].mlp.named_parameters():
                parameter.data = kept[f"model.layers.{layer}.mlp.{name}"]
        model.save_pretrained(folder)
        folders.append(folder)
    made = assemble("ffn", source, folders, plan_of(3), tmp_path / "moe", layers={"every": 2}, granularity=2)
    model = load_model(made, torch.float32)
    for expert, folder in enumerate(folders):
        torch.testing.assert_close(forced_logits(model, [expert] * 2, 3), logits(folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("train", ["ffn", "full"])
def test_a_run_leaves_the_other_layers_ffns_as_they_are(
    train: str, tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    source = make_dense(tmp_path / "dense", num_hidden_layers=3, intermediate_size=64)
    changes = {"prepare": {**tiny_recipe["prepare"], "train": train}, "base": str(source)}
    fine = {"layers": {"every": 2}, "num_experts_per_tok": 1, "granularity": 4}
    recipe = shrunk("upit", {**tiny_recipe, **changes}, expand={"num_experts": 4}, assemble=fine)
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    before, dense = ModelReader(source), ModelReader(run.checkpoint_folders[-1])
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(before.tensor(name), dense.tensor(name)) == (layer != 1)
    assert [vectors.shape for vectors in load_file(run.folder / "route" / "router.safetensors").values()] == [(16, 32)]
    active = run.kind.active(run.base, recipe)
    zeros = 3 * 256 * 32 + 32 + 3 * (32 + 2 * 16)  # the shared expert and the biases that Qwen2-MoE insists on
    assert active.moe == active.dense + 16 * 32 + zeros
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    assert scores["MoE"]["loss"]["all"] < scores["base"]["loss"]["all"]
    said = run.kind.describe(run.folder / "posttrain").what
    assert "4 experts of 4 slices each, top-1" in said
    assert f"{active.moe / active.dense:.2f} times the dense FLOPs" in said


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", None), ({"every": 2}, (1, 3)), ({"every": 1}, None), ([3, 0], (0, 3))]
)
def test_layers_are_chosen(layers: Any, expected: tuple[int, ...] | None) -> None:
    assert AssembleSettings(layers=layers).chosen_layers(range(4), 4) == expected


@pytest.mark.parametrize(
    "layers", [[[1]], {"every": "x"}, {"every": 0}, {"evry": 2}, "some", [1.5], True, None, [True], [], {}]
)
def test_other_forms_are_refused_in_a_line(layers: Any, tiny_recipe: dict[str, Any]) -> None:
    with pytest.raises(UpcycleError, match=r"\n  assemble\.layers: expected all, \{every: N\} .* such as \[1, 3\]$"):
        parse_recipe({**tiny_recipe, "assemble": {"layers": layers}}, "test")


@pytest.mark.parametrize("layers", [[4], [-1], [0, 0], {"every": 5}])
def test_layers_out_of_range_are_refused(layers: Any, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe({**tiny_recipe, "assemble": {"layers": layers}}, "test")
    with pytest.raises(UpcycleError, match=r"assemble\.layers is .*, but the model has FFNs in the layers 0 to 1"):
        run_stages(Run(recipe, tmp_path / "run"), ("prepare",))


def test_where_all_layers_have_experts_or_none_it_is_refused(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    source = make_dense(tmp_path / "dense", model_type="olmo2")
    with pytest.raises(UpcycleError, match=r"assemble\.layers: no mixture that a olmo2 model becomes"):
        map_model(source, ModelReader(source), 2, layers=(1,))
    with pytest.raises(UpcycleError, match=r"adapters are experts in all layers"):
        parse_recipe({**tiny_recipe, "assemble": {"layers": [0]}, "prepare": {"train": "lora"}}, "test")
    config = read_config(make_dense(tmp_path / "llama"))
    assert family_of(config, "x").moe.model_type == "mixtral"
    assert family_of(with_layers(config, (1,)), "x").moe.model_type == "qwen2_moe"


def test_layers_are_an_input_of_preparation(tiny_recipe: dict[str, Any]) -> None:
    recipe = load_recipe("upit", ["assemble.layers={every: 2}"])
    assert recipe.kind_settings == {"layers": {"every": 2}}
    assert load_recipe("upit").kind_settings == {}
