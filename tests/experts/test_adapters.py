"""Adapters as PEFT saves them: what they add, and what cannot be an expert."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from upcycle.errors import UpcycleError
from upcycle.experts.adapter_files import CONFIG, WEIGHTS, merged_weight, read_adapter
from upcycle.experts.kinds import load_model
from upcycle.weights.folders import read_config
from worlds import make_adapter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"target_modules": ["down_proj"]},
        {"lora_alpha": None},
    ],
    ids=str,
)
def test_what_an_adapter_adds_is_what_peft_merges(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    without = [name for name, value in options.items() if value is None]  # then PEFT's default holds
    folder = make_adapter(base, tmp_path, 1, rank=10, **{name: options[name] for name in options.keys() - without})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({name: config[name] for name in config.keys() - without}))
    adapter = read_adapter(folder, read_config(base))
    dense, merged = (load_model(f, torch.float32, base=base).state_dict() for f in (base, folder))
    changed = {name for name in dense if not torch.equal(dense[name], merged[name])}
    assert changed == {f"{name}.weight" for name in adapter}
    for name, update in adapter.items():
        torch.testing.assert_close(merged_weight(dense[f"{name}.weight"], update), merged[f"{name}.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which Upcycle does not support"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changed the base too"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changed the base too"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        (
            {"target_modules": ["q_proj", "up_proj"]},
            "q_proj.lora_A.weight is not a LoRA factor of gate_proj.* or merge the adapter",
        ),
        ({"modules_to_save": ["norm"]}, r"modules_to_save is \['norm'\]"),
    ],
)
def test_an_adapter_of_anything_else_is_refused(
    options: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UpcycleError, match=message):
        read_adapter(make_adapter(base, tmp_path, 1, **options), read_config(base))


def test_damage_is_named(base: Path, tmp_path: Path) -> None:
    config = read_config(base)
    folder = make_adapter(base, tmp_path, 1)
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(UpcycleError, match="the base's weight is not there; the adapter belongs to a different model"):
        read_adapter(folder, {**config, "num_hidden_layers": 1})
    with pytest.raises(
        UpcycleError, match=r"factors .* the base's weight is \(32, 64\); the adapter belongs to a different"
    ):
        read_adapter(folder, {**config, "intermediate_size": 64})
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, folder / WEIGHTS)
    with pytest.raises(UpcycleError, match=f"{name} holds NaN or Inf"):
        read_adapter(folder, config)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / WEIGHTS)
    with pytest.raises(UpcycleError, match="up_proj has only lora_B"):
        read_adapter(folder, config)
    (folder / WEIGHTS).write_bytes(b"garbage")
    with pytest.raises(UpcycleError, match="not a readable safetensors file"):
        read_adapter(folder, config)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UpcycleError, match="adapters must be safetensors"):
        read_adapter(folder, config)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UpcycleError, match="peft_type is 'IA3', expected 'LORA'"):
        read_adapter(folder, config)


@pytest.mark.parametrize(
    "factor",
    [
        torch.zeros(0),
        torch.zeros(3),
        torch.tensor(1.0),
        torch.zeros(0, 32),
        torch.zeros(4, 32, dtype=torch.int32),
        torch.zeros(4, 32, dtype=torch.float8_e4m3fn),
    ],
    ids=lambda factor: f"{factor.dtype}{tuple(factor.shape)}",
)
def test_factors_that_are_no_matrices_of_floats_are_refused(factor: torch.Tensor, base: Path, tmp_path: Path) -> None:
    """As DeepSpeed ZeRO-3 leaves them, for one."""
    folder = make_adapter(base, tmp_path, 1)
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors | {name: factor}, folder / WEIGHTS)
    with pytest.raises(UpcycleError, match=rf"{name} is \w+ of shape .*, expected a matrix of floats; under DeepSpeed"):
        read_adapter(folder, read_config(base))
    save_file({}, folder / WEIGHTS)
    with pytest.raises(UpcycleError, match="holds no tensor"):
        read_adapter(folder, read_config(base))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": "8"}, r"lora_alpha: expected a number \(found '8'\)"),
        ({"lora_alpha": 1e308}, "lora_alpha: expected 1000000 or less"),
        ({"lora_alpha": float("nan")}, "lora_alpha: "),
        ({"use_rslora": "no"}, r"use_rslora: expected true or false \(found 'no'\)"),
        ({"alpha_pattern": "x"}, "alpha_pattern: expected fields with values"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: '\(' is not a regular expression"),
        ({"alpha_pattern": {"up_proj": None}}, r"alpha_pattern\.up_proj: expected a number"),
    ],
)
def test_a_scale_that_is_none_is_named(changes: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path, 1)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(UpcycleError, match=rf"adapter_config\.json: {message}"):
        read_adapter(folder, read_config(base))


def test_a_field_that_nobody_here_knows_is_refused_if_it_is_on(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path, 1)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "use_newlora": False, "newlora_config": None}))
    read_adapter(folder, read_config(base))
    (folder / CONFIG).write_text(json.dumps({**config, "use_newlora": True}))
    with pytest.raises(UpcycleError, match="use_newlora is True, which Upcycle does not support"):
        read_adapter(folder, read_config(base))
