"""Our reader against transformers: from the same folder both take the same weights, or ours says why not."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import make_dense, perturbed
from upcycle.architectures.check import check_source
from upcycle.architectures.mapping import map_model
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import KINDS
from upcycle.weights.folders import find_model, read_config
from upcycle.weights.safetensors_io import ModelReader
from worlds import as_base, assembled, logits

WEIGHTS = "model.safetensors"


def edited(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(source, target)
    tensors = {name: t.clone().contiguous() for name, t in change(load_file(source / WEIGHTS)).items()}
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


def sharded(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (target / WEIGHTS).unlink()
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target, max_shard_size="40KB")
    assert len(list(target.glob("model-*.safetensors"))) > 1
    return target


def as_hub_cache(source: Path, hub: Path) -> Path:
    """The folder as the hub's cache holds it: a snapshot of links to blobs."""
    repository = hub / "models--owner--model"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        blob = blobs / f"{number:040d}"
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return snapshot


def test_a_sharded_model_of_the_hub_s_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = as_hub_cache(sharded(base, tmp_path / "sharded"), tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for folder in (snapshot, find_model("owner/model")):  # by folder and by name, offline
        made = assembled(folder, [folder] * 2, tmp_path / f"moe-{folder == snapshot}")
        torch.testing.assert_close(logits(made), logits(base), rtol=0, atol=1e-5)


def test_a_single_file_counts_before_an_index_that_was_left_behind(base: Path, tmp_path: Path) -> None:
    stale = sharded(base, tmp_path / "stale")
    other = perturbed(base, tmp_path / "other", 5)
    shutil.copyfile(other / WEIGHTS, stale / WEIGHTS)
    assert torch.equal(logits(stale), logits(other))  # what transformers reads
    made = assembled(base, [stale] * 2, tmp_path / "moe")
    torch.testing.assert_close(logits(made), logits(other), rtol=0, atol=1e-5)


def test_a_tied_model_whose_file_keeps_only_the_head(base: Path, tmp_path: Path) -> None:
    names = {"model.embed_tokens.weight": "lm_head.weight"}
    lone = edited(base, tmp_path / "lone", lambda tensors: {names.get(n, n): t for n, t in tensors.items()})
    assert torch.equal(logits(lone), logits(base))
    made = assembled(lone, [lone] * 2, tmp_path / "moe")
    torch.testing.assert_close(logits(made), logits(base), rtol=0, atol=1e-5)


def test_a_tied_model_with_a_head_of_its_own_is_untied(base: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    own = edited(base, tmp_path / "own", lambda tensors: {**tensors, "lm_head.weight": tensors[name] + 0.5})
    assert not torch.equal(logits(own), logits(base))
    made = assembled(own, [own] * 2, tmp_path / "moe")
    assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(made), logits(own), rtol=0, atol=1e-5)


def test_a_compiled_model_s_names_are_those_of_the_model(base: Path, tmp_path: Path) -> None:
    compiled = edited(base, tmp_path / "c", lambda tensors: {f"_orig_mod.{name}": t for name, t in tensors.items()})
    assert ModelReader(compiled).names() == ModelReader(base).names()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vocab_size": 107},
            r"embed_tokens\.weight has shape \(99, 32\), expected \(107, 32\) by config",
        ),
        ({"vocab_size": 10**13}, r"embed_tokens\.weight has shape"),
        ({"hidden_size": 10**12}, r"embed_tokens\.weight has shape|is not a valid llama configuration"),
        ({"intermediate_size": 49}, r"mlp\.gate_proj\.weight has shape \(48, 32\), expected \(49, 32\)"),
        ({"num_hidden_layers": 10**8}, r"num_hidden_layers is 100000000, expected at most 10,000"),
        ({"num_hidden_layers": 1}, r"says num_hidden_layers=1, the file has 2"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantization_config is .* a leftover: remove it"),
    ],
)
def test_a_configuration_that_is_not_the_file_s_is_refused_at_the_start(
    change: dict[str, object], message: str, base: Path, tmp_path: Path
) -> None:
    odd = Path(shutil.copytree(base, tmp_path / "odd"))
    config = json.loads((base / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UpcycleError, match=message):
        map_model(odd, ModelReader(odd), 4)


def test_a_mistral_with_kinds_of_layers_is_the_ministral_that_transformers_makes_of_it(tmp_path: Path) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 8}
    made = make_dense(tmp_path / "m", model_type="ministral", **kinds)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    assert AutoConfig.from_pretrained(made).model_type == read_config(made)["model_type"] == "ministral"
    mapping = map_model(made, ModelReader(made), 2)
    assert mapping.family.dense == "ministral"
    check_source(mapping, ModelReader(made))


@pytest.mark.parametrize(
    ("model_type", "field"),
    [
        ("llama", "attention_dropout"),
        ("cohere", "attention_dropout"),
        ("phi3", "attention_bias"),
    ],
)
def test_a_switch_that_is_null_is_off(model_type: str, field: str, tmp_path: Path) -> None:
    made = make_dense(tmp_path / "m", model_type=model_type, tie_word_embeddings=False)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, field: None}))
    assert not AutoConfig.from_pretrained(made).to_dict()[field]
    check_source(map_model(made, ModelReader(made), 2), ModelReader(made))


def test_what_transformers_cannot_compute_is_refused(tmp_path: Path) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 8}
    made = make_dense(tmp_path / "m", model_type="ministral", **kinds)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    with pytest.raises(TypeError):
        AutoModelForCausalLM.from_pretrained(made)(torch.arange(3, 40)[None])
    with pytest.raises(UpcycleError, match=r"transformers cannot compute with this config\.json: TypeError"):
        check_source(map_model(made, ModelReader(made), 2), ModelReader(made))


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def of_a_variant(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def of_a_classifier(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return rename


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pointer, "it is a pointer of Git LFS, not the file: run `git lfs pull`"),
        (pickled, r"there is pytorch_model\.bin: pickled weights are not read; load the folder once with transformers"),
        (of_a_variant, r"there is model\.fp16\.safetensors: transformers reads model\.safetensors alone; rename it"),
        (with_an_adapter, "holds both a model and an adapter .* remove the adapter's files, else the model's"),
        (of_a_classifier, r"architectures is \['LlamaForSequenceClassification'\], a classifier"),
        (renamed(lambda name: f"module.{name}"), r"called module\.model\.layers\..* with 'module\.' ahead of what"),
        (
            renamed(lambda name: name.replace("gate_proj.weight", "gate_proj.base_layer.weight")),
            "its adapter was not merged before it was saved: use merge_and_unload",
        ),
    ],
)
def test_folders_as_people_have_them_are_told_what_to_do(
    change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    made = make_dense(tmp_path / "m")
    change(made)
    with pytest.raises(UpcycleError, match=said):
        check_source(map_model(made, ModelReader(made), 2), ModelReader(made))


def test_nan_in_a_base_is_named(tmp_path: Path) -> None:
    base = make_dense(tmp_path / "base", tie_word_embeddings=False)
    broken = edited(base, tmp_path / "n", lambda t: {**t, "lm_head.weight": t["lm_head.weight"] * float("nan")})
    reader = ModelReader(broken)
    with pytest.raises(UpcycleError, match=r"n: lm_head\.weight holds NaN or Inf, so this model is damaged"):
        check_source(map_model(broken, reader, 4), reader)


def test_a_head_that_only_a_checkpoint_or_only_the_base_has_is_refused(base: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    own = edited(base, tmp_path / "own", lambda tensors: {**tensors, "lm_head.weight": tensors[name] + 0.5})
    for of, checkpoint in ((base, own), (own, base)):
        with pytest.raises(UpcycleError, match=r"a head of its own \(lm_head\.weight\), but .* would be lost"):
            KINDS["ffn"].check_checkpoint(as_base(of), checkpoint, checkpoint)
    KINDS["ffn"].check_checkpoint(as_base(own), own, own)
