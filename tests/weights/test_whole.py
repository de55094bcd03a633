"""A MoE among the other parts of its base: what it computes on text and on an image, and what its folder holds."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import make_dense
from upcycle.architectures.check import check
from upcycle.errors import UpcycleError
from upcycle.experts.ffn import describe
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import parse_recipe
from upcycle.records.files import RESULT
from upcycle.reporting.card import card_text
from upcycle.stages.model_upcycling import posttrain
from upcycle.stages.model_upcycling.export import export
from upcycle.weights.folders import read_config
from upcycle.weights.safetensors_io import INDEX, SINGLE, ModelReader
from upcycle.weights.whole import check_keeps, more_bytes, source_of_others, write_whole
from worlds import IDS, assembled
from worlds import logits as text_logits
from wrapped import IMAGE_TOKEN, edit_config, make_wrapper, rewrite

TEXT_PREFIXES = ("language_model.", "model.language_model.", "lm_head.")
PATCHES, TOKENS = 4, 4
"""An image of 4 x 4 patches of 14 pixels, merged 2 x 2."""
MIXED = {"mistral3": "mixtral", "qwen3_5": "qwen3_5_moe_text", "qwen3_vl": "qwen3_moe", "gemma4": "gemma4_text"}
"""Wrappers that keep their other parts, and the MoE that their text model becomes."""
SLICED = {"granularity": 2}
CASES = [
    *((shape, settings) for shape in MIXED for settings in ({}, SLICED)),
    *((shape, {"layers": [1]}) for shape in ("mistral3", "qwen3_vl")),
]


@torch.no_grad()
def image_logits(folder: Path, seed: int = 0) -> Tensor:
    """Of a text with an image before its end."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = IDS[:1].clone().masked_fill(IDS[:1] == IMAGE_TOKEN, 7)
    ids[0, 8 : 8 + TOKENS] = IMAGE_TOKEN
    draw = torch.Generator().manual_seed(seed)
    image: dict[str, Tensor]
    if model.config.model_type == "mistral3":
        side = PATCHES * 14
        image = {"pixel_values": torch.randn(1, 3, side, side, generator=draw), "image_sizes": torch.full((1, 2), side)}
    elif model.config.model_type == "gemma4":
        eye = model.config.vision_config
        places = torch.cartesian_prod(*[torch.arange(2 * eye.pooling_kernel_size)] * 2)
        pixels = torch.rand(1, len(places), 3 * eye.patch_size**2, generator=draw)
        image = {"pixel_values": pixels, "image_position_ids": places[None]}
    else:
        image = {
            "pixel_values": torch.randn(PATCHES**2, 3 * 2 * 14**2, generator=draw),
            "image_grid_thw": torch.tensor([[1, PATCHES, PATCHES]]),
            "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        }
    found: Tensor = model(input_ids=ids, **image).logits
    return found


def others(folder: Path) -> dict[str, Tensor]:
    """What is no part of the text model."""
    return {name: t for name, t in load_file(folder / SINGLE).items() if not name.startswith(TEXT_PREFIXES)}


def kept(base: Path, text: Path, folder: Path) -> Path:
    folder.mkdir()
    write_whole(text, base, folder)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize(("shape", "settings"), CASES)
def test_with_equal_experts_it_is_the_dense_model_on_text_and_images(
    shape: str, settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    base = make_wrapper(tmp_path / "base", shape, tied)
    (base / "preprocessor_config.json").write_text('{"size": 56}')
    text = assembled(base, [base, base], tmp_path / "text", 0.5, **settings)
    whole = kept(base, text, tmp_path / "whole")
    expected = image_logits(base)
    assert not torch.allclose(expected, image_logits(base, seed=1), rtol=0, atol=1e-2)  # it does look
    torch.testing.assert_close(image_logits(whole), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(text_logits(whole), text_logits(text), rtol=0, atol=0)
    dense = text_logits(base)
    torch.testing.assert_close(text_logits(whole), dense, rtol=0, atol=1e-5 * float(dense.abs().max()))
    assert (whole / "preprocessor_config.json").read_text() == '{"size": 56}'
    found = others(whole)
    assert found.keys() == others(base).keys() != set()
    for name, tensor in others(base).items():
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("shape", MIXED)
def test_it_is_what_transformers_writes(shape: str, tied: bool, tmp_path: Path) -> None:
    """Its own copy has the same names and fields, and is read as the same model; experts may lie the other way."""
    from transformers import AutoModelForImageTextToText

    base = make_wrapper(tmp_path / "base", shape, tied)
    checkpoints = [base, make_wrapper(tmp_path / "other", shape, tied, seed=1)]
    whole = kept(base, assembled(base, checkpoints, tmp_path / "text", 0.5), tmp_path / "whole")
    copy = tmp_path / "copy"
    AutoModelForImageTextToText.from_pretrained(whole, dtype=torch.float32).save_pretrained(copy)
    ours, theirs = load_file(whole / SINGLE), load_file(copy / SINGLE)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor if ours[name].shape == tensor.shape else tensor.mT)
    torch.testing.assert_close(text_logits(copy), text_logits(whole), rtol=0, atol=0)
    torch.testing.assert_close(text_logits(whole), text_logits(tmp_path / "text"), rtol=0, atol=0)
    mine, written = (json.loads((folder / "config.json").read_text()) for folder in (whole, copy))
    for part in (None, "vision_config", "text_config"):
        pair = [config[part] if part else config for config in (mine, written)]
        assert pair[0]["model_type"] == pair[1]["model_type"]
    assert mine["architectures"] == written["architectures"]
    assert mine["text_config"]["rope_parameters"] == written["text_config"]["rope_parameters"]


def test_stacked_experts_lie_as_in_the_published_models(tmp_path: Path) -> None:
    """Qwen3-VL-MoE's, which vLLM transposes whatever their shape."""
    base = make_wrapper(tmp_path / "base", "qwen3_vl")
    text = assembled(base, [base] * 11, tmp_path / "text")
    found, own = load_file(kept(base, text, tmp_path / "whole") / SINGLE), ModelReader(text)
    layer = "layers.1.mlp.experts"
    for expert in (0, 2, 10):
        gate, up, down = (own.tensor(f"model.{layer}.{expert}.{part}_proj.weight") for part in ("gate", "up", "down"))
        assert torch.equal(found[f"model.language_model.{layer}.gate_up_proj"][expert], torch.cat([gate, up]).T)
        assert torch.equal(found[f"model.language_model.{layer}.down_proj"][expert], down.T)


def test_other_parts_are_the_last_checkpoint_s_where_it_has_them_all(tmp_path: Path, checkpoints: list[Path]) -> None:
    base = make_wrapper(tmp_path / "base")
    tuned = Path(shutil.copytree(base, tmp_path / "tuned"))
    assert source_of_others(base, tuned) == tuned
    rewrite(tuned, lambda tensors: {n: t for n, t in tensors.items() if n.startswith(TEXT_PREFIXES)})
    assert (
        source_of_others(base, tuned) == source_of_others(base, checkpoints[0]) == source_of_others(base, None) == base
    )


def test_what_predicts_further_tokens_is_no_part_of_it(tmp_path: Path) -> None:
    base = make_wrapper(tmp_path / "base", "qwen3_5")
    rewrite(base, lambda tensors: {**tensors, "mtp.layers.0.mlp.up_proj.weight": torch.ones(48, 32)})
    whole = kept(base, assembled(base, [base, base], tmp_path / "text"), tmp_path / "whole")
    assert not [name for name in load_file(whole / SINGLE) if name.startswith("mtp.")]


def test_a_published_configuration_keeps_the_axes_of_its_positions(tmp_path: Path) -> None:
    """Qwen3-VL's on the hub have them beside rope_theta, and vision of the wrapper's own type."""
    base = make_wrapper(tmp_path / "base", "qwen3_vl")
    expected = image_logits(base)

    def older(config: dict[str, Any]) -> dict[str, Any]:
        text = dict(config["text_config"])
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        return {**config, "text_config": text, "vision_config": {**config["vision_config"], "model_type": "qwen3_vl"}}

    edit_config(base, older)
    torch.testing.assert_close(image_logits(base), expected, rtol=0, atol=0)
    whole = kept(base, assembled(base, [base, base], tmp_path / "text"), tmp_path / "whole")
    torch.testing.assert_close(image_logits(whole), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_other_parts_keep_their_dtype_and_the_whole_its_fields(tmp_path: Path) -> None:
    base = make_wrapper(tmp_path / "base")
    rewrite(base, lambda tensors: {n: t if n.startswith(TEXT_PREFIXES) else t.half() for n, t in tensors.items()})
    text = assembled(base, [base, base], tmp_path / "text", dtype="bfloat16")
    whole = kept(base, text, tmp_path / "whole")
    dtypes = {n.startswith(TEXT_PREFIXES): t.dtype for n, t in load_file(whole / SINGLE).items()}
    assert dtypes == {False: torch.float16, True: torch.bfloat16}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, whole))
    assert after["text_config"] == json.loads((text / "config.json").read_text())
    assert {name for name in before if before[name] != after[name]} == {"text_config", "dtype"}


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=() if shape == "qwen3_5" else pytest.mark.long) for shape in MIXED]
)
def test_a_run_ends_in_the_whole(
    shape: str,
    tmp_path: Path,
    tiny_recipe: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(posttrain, "require_space", lambda _folder, count, *_: needed.append(count))
    base = make_wrapper(tmp_path / "base", shape)
    (base / "processor_config.json").write_text("{}")
    values = {**tiny_recipe, "base": str(base)}
    run = Run(parse_recipe({**values, "assemble": {"keep_vision": True}}, "test"), tmp_path / "kept")
    run_stages(run)
    said = " ".join(capfd.readouterr().out.split())
    assert re.search(
        rf"text part of a {shape} model: 0.0 M parameters are taken, 0.. M of vision and the like are kept", said
    )
    run_stages(Run(parse_recipe(values, "test"), tmp_path / "text"))
    assert needed[0] - needed[1] == more_bytes(run.assembled_moe, base) > 0
    made, text = RESULT.of(run.folder), RESULT.of(tmp_path / "text")
    whole = json.loads((made / "config.json").read_text())["model_type"]
    assert read_config(made)["model_type"] == MIXED[shape]
    torch.testing.assert_close(text_logits(made), text_logits(text), rtol=0, atol=0)
    assert (made / "processor_config.json").is_file()
    assert not (made / "trainer").exists()
    export(made, tmp_path / "exported", False, "source")
    torch.testing.assert_close(image_logits(tmp_path / "exported"), image_logits(made), rtol=0, atol=0)

    assert f"mixture of 4 experts, top-2, the text part of a {whole} model (0." in describe(made).what
    card = card_text(made, "moe", run.folder, run.recipe, None, describe(made))
    assert "pipeline_tag: image-text-to-text" in card
    with pytest.raises(UpcycleError, match=f"{MIXED[shape]} is a mixture of 4 experts already"):
        check(str(made), 4, 2, "source")
    said = " ".join(capfd.readouterr().out.split())
    assert re.search(rf"text part of a {whole} model: 0.. M parameters, beside 0.. M of vision and the like", said)

    run_stages(Run(parse_recipe(values, "test"), run.folder), update=True)  # of text alone after all
    assert ModelReader(RESULT.of(run.folder)).left_out == 0
    assert (RESULT.of(run.folder) / SINGLE).read_bytes() == (text / SINGLE).read_bytes()
    assert not (text / INDEX).exists()


@pytest.mark.parametrize(
    ("shape", "moe", "message"),
    [
        ("qwen2_5_vl", "qwen2_moe", r"a qwen2_5_vl model whose text model becomes qwen2_moe, which cannot take its"),
        (
            "mistral3",
            "granitemoe",
            r"granitemoe.*known: mistral3 \(mixtral or qwen2_moe\),.* text-only MoE leave",
        ),
    ],
)
def test_a_wrapper_that_cannot_take_the_moe_is_refused(shape: str, moe: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=rf"assemble.keep_vision: .*{message}"):
        check_keeps(make_wrapper(tmp_path / "base", shape), moe, 48)


@pytest.mark.parametrize("size", [16, 32])
def test_square_experts_of_which_nobody_could_tell_how_they_lie_are_refused(size: int, tmp_path: Path) -> None:
    base = make_wrapper(tmp_path / "base", "qwen3_vl")
    check_keeps(base, "qwen3_moe", 24)
    with pytest.raises(UpcycleError, match=f"{size} channels beside hidden_size=32 make square tensors.*granularity"):
        check_keeps(base, "qwen3_moe", size)


def test_the_disk_must_hold_the_whole_beside_the_text_that_it_is_made_from(tmp_path: Path) -> None:
    base = make_wrapper(tmp_path / "base")
    text = assembled(base, [base, base], tmp_path / "text", dtype="bfloat16")
    whole = kept(base, text, tmp_path / "whole")
    assert more_bytes(text, base) == sum(t.numel() * t.itemsize for t in load_file(whole / SINGLE).values())


def test_what_has_nothing_to_keep_is_refused_before_anything_runs(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    values = {**tiny_recipe, "base": str(make_dense(tmp_path / "base")), "assemble": {"keep_vision": True}}
    with pytest.raises(UpcycleError, match="is a text-only model, so there is nothing to keep; leave the setting out"):
        _ = Run(parse_recipe(values, "test"), tmp_path / "run").base
    with pytest.raises(UpcycleError, match=r"assemble.keep_vision writes a plain MoE .*set prepare.train=ffn or full"):
        parse_recipe({**values, "prepare": {**values["prepare"], "train": "lora"}}, "test")
