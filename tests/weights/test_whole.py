"""A MoE among the other parts of its base: what it computes on text and on an image, and what its folder holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conftest import make_dense
from upcycle.errors import UpcycleError
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import parse_recipe
from upcycle.records.files import RESULT
from upcycle.stages.model_upcycling.export import export
from upcycle.weights.folders import read_config
from upcycle.weights.safetensors_io import INDEX, SINGLE, ModelReader
from upcycle.weights.whole import check_keeps, write_whole
from worlds import IDS, assembled
from worlds import logits as text_logits
from wrapped import IMAGE_TOKEN, make_wrapper, rewrite

VISION = ("vision_tower.", "multi_modal_projector.")
SIDE, TOKENS = 56, 4
"""Of an image: 4 x 4 patches of 14 pixels, merged 2 x 2."""


@torch.no_grad()
def image_logits(folder: Path, seed: int = 0) -> Tensor:
    """Of a text with an image before its end."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = IDS[:1].clone().masked_fill(IDS[:1] == IMAGE_TOKEN, 7)
    ids[0, 8 : 8 + TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    found: Tensor = model(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([[SIDE, SIDE]])).logits
    return found


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("settings", [{}, {"layers": [1]}, {"granularity": 2}], ids=["mixtral", "qwen2_moe", "slices"])
def test_with_equal_experts_it_is_the_dense_model_on_text_and_images(
    settings: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    base = make_wrapper(tmp_path / "base", tied=tied)
    (base / "preprocessor_config.json").write_text('{"size": 56}')
    text = assembled(base, [base, base], tmp_path / "text", 0.5, **settings)
    whole = tmp_path / "whole"
    whole.mkdir()
    write_whole(text, base, whole)
    expected = image_logits(base)
    assert not torch.allclose(expected, image_logits(base, seed=1), rtol=0, atol=1e-2)  # it does look
    torch.testing.assert_close(image_logits(whole), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(text_logits(whole), text_logits(text), rtol=0, atol=0)
    assert (whole / "preprocessor_config.json").read_text() == '{"size": 56}'
    found, dense = load_file(whole / SINGLE), load_file(base / SINGLE)
    kept = [name for name in dense if name.startswith(VISION)]
    assert kept
    assert {name for name in found if not name.startswith("language_model.")} == set(kept)
    for name in kept:
        assert torch.equal(found[name], dense[name])


def test_other_parts_keep_their_dtype_and_the_whole_its_fields(tmp_path: Path) -> None:
    base = make_wrapper(tmp_path / "base")
    rewrite(base, lambda tensors: {n: t.half() if n.startswith(VISION) else t for n, t in tensors.items()})
    text = assembled(base, [base, base], tmp_path / "text", dtype="bfloat16")
    (tmp_path / "whole").mkdir()
    write_whole(text, base, tmp_path / "whole")
    dtypes = {n.startswith(VISION): t.dtype for n, t in load_file(tmp_path / "whole" / SINGLE).items()}
    assert dtypes == {True: torch.float16, False: torch.bfloat16}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "whole"))
    assert after["text_config"] == json.loads((text / "config.json").read_text())
    assert {name for name in before if before[name] != after[name]} == {"text_config", "dtype"}


def test_a_run_ends_in_the_whole(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    base = make_wrapper(tmp_path / "base")
    (base / "processor_config.json").write_text("{}")
    values = {**tiny_recipe, "base": str(base)}
    kept = Run(parse_recipe({**values, "assemble": {"keep_vision": True}}, "test"), tmp_path / "kept")
    run_stages(kept)
    run_stages(Run(parse_recipe(values, "test"), tmp_path / "text"))
    made, text = RESULT.of(kept.folder), RESULT.of(tmp_path / "text")
    assert json.loads((made / "config.json").read_text())["model_type"] == "mistral3"
    assert read_config(made)["model_type"] == "mixtral"
    torch.testing.assert_close(text_logits(made), text_logits(text), rtol=0, atol=0)
    assert (made / "processor_config.json").is_file()
    assert not (made / "trainer").exists()
    export(made, tmp_path / "exported", False, "source")
    torch.testing.assert_close(image_logits(tmp_path / "exported"), image_logits(made), rtol=0, atol=0)

    run_stages(Run(parse_recipe(values, "test"), kept.folder), update=True)  # of text alone after all
    assert ModelReader(RESULT.of(kept.folder)).left_out == 0
    assert (RESULT.of(kept.folder) / SINGLE).read_bytes() == (text / SINGLE).read_bytes()
    assert not (text / INDEX).exists()


@pytest.mark.parametrize(
    ("shape", "moe", "message"),
    [
        ("qwen3_vl", "qwen3_moe", r"a qwen3_vl model whose text model becomes qwen3_moe, which cannot take its place"),
        ("mistral3", "granitemoe", r"granitemoe.*known: mistral3 \(mixtral or qwen2_moe\). For a MoE of text leave"),
    ],
)
def test_a_wrapper_that_cannot_take_the_moe_is_refused(shape: str, moe: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=rf"assemble.keep_vision: .*{message}"):
        check_keeps(make_wrapper(tmp_path / "base", shape), moe)


def test_what_has_nothing_to_keep_is_refused_before_anything_runs(tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    values = {**tiny_recipe, "base": str(make_dense(tmp_path / "base")), "assemble": {"keep_vision": True}}
    with pytest.raises(UpcycleError, match="is a model of text alone, it has nothing to keep; leave the setting out"):
        _ = Run(parse_recipe(values, "test"), tmp_path / "run").base
    with pytest.raises(UpcycleError, match=r"assemble.keep_vision writes a plain MoE .*set prepare.train=ffn or full"):
        parse_recipe({**values, "prepare": {**values["prepare"], "train": "lora"}}, "test")
