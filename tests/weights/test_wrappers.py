"""Folders of more than text: their text model, and it alone, as transformers itself computes it within the whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from upcycle.architectures.agreement import check_agreement
from upcycle.architectures.check import check
from upcycle.architectures.mapping import with_own_head
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import KINDS
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import parse_recipe
from upcycle.records.files import RESULT
from upcycle.stages.model_upcycling.export import export
from upcycle.weights.folders import load_dense, read_config
from upcycle.weights.safetensors_io import SINGLE, ModelReader
from upcycle.weights.wrappers import WRAPPERS
from worlds import IDS, as_base, assemble, assembled, assert_experts_are, plan_of
from worlds import logits as logits_of
from wrapped import AXES, ROPE, SHAPES, edit_config, make_wrapper, renamed, rewrite

LLAVA, INNER, QWEN2 = "language_model.model.", "model.language_model.", "model."
FORMS = {
    "mistral3": (LLAVA, INNER),
    "mistral3 of ministral3": (LLAVA, INNER),
    "gemma3": (LLAVA, INNER),
    "gemma4": (INNER,),
    "qwen2_5_vl": (QWEN2, INNER),
    "qwen2_5_vl with yarn": (QWEN2,),
    "qwen3_vl": (INNER,),
    "qwen3_5": (INNER,),
}
"""What stands before the names of text tensors, in folders of any age."""
TWINS = {
    "qwen2_5_vl": "qwen2_moe",
    "qwen3_vl": "qwen3_moe",
    "mistral3": "mixtral",
    "gemma3": "beam",
    "gemma4": "gemma4_text",
    "qwen3_5": "qwen3_5_moe_text",
}
WITHOUT_ROW = {"mistral3 of ministral3": "llama_4_scaling_beta"}


@torch.no_grad()
def wrapper_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found: Tensor = model(input_ids=IDS).logits
    return found


def same(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def compare(folder: Path) -> None:
    reader = ModelReader(folder)
    check_agreement(reader, with_own_head(reader, read_config(folder)))


def in_form(source: Path, folder: Path, form: str) -> Path:
    """A copy with another prefix."""
    own = next(p for p in (LLAVA, INNER, QWEN2) if f"{p}norm.weight" in names(source))

    def rename(name: str) -> str:
        text = name.removeprefix(own)
        if name.startswith(own) and not text.startswith("visual"):
            return form + text
        return "lm_head.weight" if name.endswith("lm_head.weight") and form != LLAVA else name

    return renamed(source, folder, rename)


def names(folder: Path) -> set[str]:
    return set(load_file(folder / SINGLE))


@pytest.mark.parametrize("shape", FORMS)
def test_a_wrapper_as_it_is_has_the_names_in_its_file(shape: str, tmp_path: Path) -> None:
    folder = make_wrapper(tmp_path / "folder", shape)
    assert ModelReader(folder, whole=True).names() == sorted(names(folder))


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize(("shape", "form"), [(shape, form) for shape, forms in FORMS.items() for form in forms])
def test_the_text_model_is_what_the_whole_computes_on_text(shape: str, form: str, tied: bool, tmp_path: Path) -> None:
    written = make_wrapper(tmp_path / "written", shape, tied)
    folder = in_form(written, tmp_path / "folder", form)
    expected = wrapper_logits(folder)
    assert same(expected, wrapper_logits(written))
    assert same(logits_of(folder), expected)
    compare(folder)
    found = ModelReader(folder)
    assert {name.partition(".")[0] for name in found.names()} == {"model", *([] if tied else ["lm_head"])}
    whole = sum(tensor.numel() for tensor in load_file(folder / SINGLE).values())
    assert found.num_parameters + found.left_out == whole > found.num_parameters


def test_every_wrapper_that_is_known_is_tried() -> None:
    made = {whole for own in WRAPPERS.values() for whole in own.keeps.values() if whole != own.model_type}
    assert {SHAPES[shape][0] for shape in FORMS} == WRAPPERS.keys() - made  # those are in tests/weights/test_whole.py


@pytest.mark.parametrize("shape", TWINS)
def test_a_text_part_becomes_a_moe_of_text_that_is_exact(
    shape: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = make_wrapper(tmp_path / "base", shape)
    (base / "preprocessor_config.json").write_text("{}")
    made = check(str(base), 4, 2, "source")
    assert made.family.moe.model_type == TWINS[shape]
    said = " ".join(capfd.readouterr().out.split())
    assert f"text part of a {shape} model: 0.0 M parameters are taken, 0." in said
    moe = assemble("ffn", base, [base, base], plan_of(2), tmp_path / "moe")
    assert same(logits_of(moe), wrapper_logits(base))
    assert not (moe / "preprocessor_config.json").exists()
    assert {name.split(".")[0] for name in ModelReader(moe).names()} == {"model", "lm_head"}
    assert json.loads((moe / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize(("shape", "reason"), WITHOUT_ROW.items())
def test_a_text_model_without_a_row_is_refused_as_it_is_elsewhere(shape: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=reason):
        check(str(make_wrapper(tmp_path / "base", shape)), 4, 2, "source")


def test_checkpoints_of_a_wrapper_may_be_wrappers_or_their_text_models(tmp_path: Path) -> None:
    base = make_wrapper(tmp_path / "base")
    text = load_dense(base, torch.float32)
    text.save_pretrained(tmp_path / "text")
    assert {name.split(".")[0] for name in names(tmp_path / "text")} == {"model", "lm_head"}
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    rewrite(whole, lambda tensors: {name: t + 0.01 * (".mlp." in name) for name, t in tensors.items()})
    for checkpoint in (tmp_path / "text", whole):
        KINDS["ffn"].check_checkpoint(as_base(base), checkpoint, checkpoint)
    assert_experts_are([whole, tmp_path / "text"], assembled(base, [whole, tmp_path / "text"], tmp_path / "moe"))


def test_fields_of_the_whole_count_where_transformers_takes_them_from_there(tmp_path: Path) -> None:
    folder = make_wrapper(tmp_path / "folder", "gemma3", tied=True)
    edit_config(folder, lambda config: {**config, "eos_token_id": [1, 2]})
    config = read_config(folder)
    assert config["eos_token_id"] == [1, 2]
    assert config["tie_word_embeddings"] is True
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    edit_config(folder, lambda c: {**c, "tie_word_embeddings": False, "text_config": {**c["text_config"]}})
    assert read_config(folder)["tie_word_embeddings"] is False


def test_a_flat_configuration_of_the_hub_is_read(tmp_path: Path) -> None:
    """Qwen2.5-VL's on the hub have the text model's fields beside `vision_config`, and the axes as a kind of rope."""
    written = make_wrapper(tmp_path / "written", "qwen2_5_vl")

    def flat(config: dict[str, Any]) -> dict[str, Any]:
        text = {k: v for k, v in config["text_config"].items() if k not in ("model_type", "rope_parameters", "dtype")}
        scaling = {"type": "mrope", "mrope_section": AXES["mrope_section"]}
        others = {k: v for k, v in config.items() if k != "text_config"}
        return {**text, **others, "rope_scaling": scaling, "rope_theta": ROPE["rope_theta"]}

    folder = Path(shutil.copytree(written, tmp_path / "folder"))
    edit_config(folder, flat)
    assert read_config(folder)["rope_parameters"] == ROPE
    assert same(logits_of(folder), wrapper_logits(written))
    compare(folder)
    check(str(folder), 4, 2, "source")


def test_what_predicts_further_tokens_is_left_out(tmp_path: Path) -> None:
    folder = make_wrapper(tmp_path / "folder", "qwen3_5")
    before = ModelReader(folder)
    rewrite(folder, lambda tensors: {**tensors, "mtp.layers.0.mlp.up_proj.weight": torch.ones(48, 32)})
    after = ModelReader(folder)
    assert after.names() == before.names()
    assert after.left_out == before.left_out + 48 * 32
    compare(folder)


def test_an_unknown_wrapper_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_wrapper(tmp_path / "folder")
    edit_config(folder, lambda config: {**config, "model_type": "llava"})
    message = r"config.json: 'llava' is a multimodal model \(text_config\).*mistral3.*qwen3_5_moe; give a folder"
    with pytest.raises(UpcycleError, match=message):
        read_config(folder)
    with pytest.raises(UpcycleError, match=message):
        check(str(folder), 4, 2, "source")


def test_a_text_tensor_that_is_missing_is_found(tmp_path: Path) -> None:
    folder = make_wrapper(tmp_path / "folder")
    lost = f"{LLAVA}layers.1.self_attn.q_proj.weight"
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost})
    with pytest.raises(UpcycleError, match=r"missing keys: .*model.layers.1.self_attn.q_proj.weight"):
        load_dense(folder, torch.float32)
    with pytest.raises(UpcycleError, match=r"model.layers.1.self_attn.q_proj.weight"):
        compare(folder)


def test_a_prefix_that_transformers_does_not_read_is_no_text(tmp_path: Path) -> None:
    written = make_wrapper(tmp_path / "written", "qwen3_vl")
    folder = renamed(written, tmp_path / "folder", lambda name: name.replace(INNER, "text."))
    with pytest.raises(UpcycleError, match="the file has 0"):
        check(str(folder), 4, 2, "source")


def test_a_misread_wrapper_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is the whole that transformers loads: not what is read here, loaded a second time."""
    folder = make_wrapper(tmp_path / "folder")
    right = ModelReader.elements

    def elements(self: ModelReader, name: str, begin: int = 0, count: int | None = None) -> Tensor:
        return right(self, name.replace("layers.1.", "layers.0."), begin, count)

    monkeypatch.setattr(ModelReader, "elements", elements)
    with pytest.raises(UpcycleError, match=r"transformers reads model.layers.1"):
        compare(folder)


@pytest.mark.parametrize("train", ["ffn", "lora"])
def test_a_run_on_a_wrapper_gives_a_moe_of_text(train: str, tmp_path: Path, tiny_recipe: dict[str, Any]) -> None:
    base = make_wrapper(tmp_path / "base", "qwen3_vl")
    tiny_recipe["prepare"] = {**tiny_recipe["prepare"], "train": train}
    run = Run(parse_recipe({**tiny_recipe, "base": str(base)}, "test"), tmp_path / "run")
    run_stages(run)
    made = RESULT.of(run.folder)
    target = tmp_path / "plain"
    export(made, target, train == "lora", "source")
    assert read_config(target)["model_type"] == "qwen3_moe"
    assert ModelReader(target).left_out == 0
    assert logits_of(target).isfinite().all()
