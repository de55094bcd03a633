"""The run-time comparison with PEFT: an adapter that is misread is found, whatever the way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_dense
from upcycle.errors import UpcycleError
from upcycle.experts import adapter_files
from upcycle.experts.adapter_files import WEIGHTS, read_adapter
from upcycle.experts.kinds import KINDS, load_model
from upcycle.experts.lora import check_checkpoint
from upcycle.merging.low_rank import LowRank
from upcycle.weights.folders import read_config
from worlds import as_base, make_adapter

MLP = "model.layers.1.mlp."
Updates = dict[str, LowRank]


def compare(base: Path, folder: Path) -> None:
    check_checkpoint(as_base(base), folder, folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": r".*self_attn.*"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_an_adapter_of_peft_s_is_read_as_peft_reads_it(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    compare(base, make_adapter(base, tmp_path, 1, **options))


def test_gate_and_up_in_one_layer_have_its_a_and_halves_of_its_b(base: Path, tmp_path: Path) -> None:
    phi3 = make_dense(tmp_path / "phi3", model_type="phi3")
    scaled = {"alpha_pattern": {"layers.1.mlp.gate_up_proj": 3}}
    folder = make_adapter(phi3, tmp_path / "adapter", 1, target_modules=["gate_up_proj"], **scaled)
    compare(phi3, folder)
    gate, up = (read_adapter(folder, read_config(phi3))[f"{MLP}{name}"] for name in ("gate_proj", "up_proj"))
    factors = load_file(folder / WEIGHTS)
    a, b = (f"base_model.model.{MLP}gate_up_proj.lora_{factor}.weight" for factor in "AB")
    assert torch.equal(gate.a, factors[a])
    assert torch.equal(up.a, factors[a])
    assert torch.equal(torch.cat([gate.b, up.b]), factors[b])
    assert gate.scaling == up.scaling == 0.75
    with pytest.raises(UpcycleError, match=r"gate_up_proj has factors .*, the base's weight is not there; the adapter"):
        compare(base, folder)  # which has gate and up apart
    apart = {a.replace("gate_up", "up"): gate.a, b.replace("gate_up", "up"): gate.b}
    save_file({**factors, **apart}, folder / WEIGHTS)
    with pytest.raises(UpcycleError, match=r"layers\.1\.mlp\.up_proj has factors .*, the base's weight is not there"):
        compare(phi3, folder)


@pytest.mark.parametrize(("dense", "linear"), [("starcoder2", "c_fc"), ("apertus", "up_proj"), ("phi", "fc1")])
def test_without_a_gate_the_layer_under_its_own_name_is_up_proj(
    dense: str, linear: str, base: Path, tmp_path: Path
) -> None:
    ungated = make_dense(tmp_path / dense, model_type=dense)
    scaled = {"alpha_pattern": {f"layers.1.mlp.{linear}": 3}}
    folder = make_adapter(ungated, tmp_path / "adapter", 1, **scaled)
    compare(ungated, folder)
    updates = read_adapter(folder, read_config(ungated))
    assert {name.rpartition(".")[2] for name in updates} == {"up_proj", "down_proj"}
    assert updates[f"{MLP}up_proj"].scaling == 0.75
    assert torch.equal(
        updates[f"{MLP}up_proj"].b, load_file(folder / WEIGHTS)[f"base_model.model.{MLP}{linear}.lora_B.weight"]
    )
    with pytest.raises(UpcycleError, match=rf"is not a LoRA factor of {linear} or .* target_modules=\['{linear}', "):
        compare(ungated, make_adapter(ungated, tmp_path / "attention", 1, target_modules=["q_proj"]))
    if dense != "apertus":  # whose names a gated FFN has too
        with pytest.raises(UpcycleError, match=r"the base's weight is not there; the adapter belongs to a different"):
            compare(base, folder)


@pytest.mark.parametrize("name", ["base_model.model._orig_mod.", "default"])
def test_names_of_compiled_models_and_of_state_dictionaries(name: str, base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path, 1)
    right = load_model(folder, torch.float32, base=base).state_dict()
    renamed = {
        key.replace("base_model.model.", name, 1) if "orig" in name else key.replace(".weight", ".default.weight"): t
        for key, t in load_file(folder / WEIGHTS).items()
    }
    save_file(renamed, folder / WEIGHTS)
    compare(base, folder)
    found = load_model(folder, torch.float32, base=base).state_dict()  # what is scored is the adapter, not the base
    assert all(torch.equal(right[key], found[key]) for key in right)


def swapped(updates: Updates) -> Updates:
    return {**updates, f"{MLP}gate_proj": updates[f"{MLP}up_proj"], f"{MLP}up_proj": updates[f"{MLP}gate_proj"]}


def rescaled(updates: Updates) -> Updates:
    return {**updates, f"{MLP}up_proj": replace(updates[f"{MLP}up_proj"], scaling=0.5)}


def rounded(updates: Updates) -> Updates:
    update = updates[f"{MLP}down_proj"]
    return {**updates, f"{MLP}down_proj": replace(update, b=update.b.bfloat16())}


def without_one(updates: Updates) -> Updates:
    return {name: update for name, update in updates.items() if name != f"{MLP}up_proj"}


@pytest.mark.parametrize(
    ("misread", "message"),
    [
        (swapped, r"PEFT reads model\.layers\.1\.mlp\.gate_proj\.lora_A as .* at one place, upcycle as"),
        (
            rescaled,
            r"PEFT reads the scaling of model\.layers\.1\.mlp\.up_proj as 2, upcycle as 0\.5; the folder would be",
        ),
        (rounded, r"PEFT reads model\.layers\.1\.mlp\.down_proj\.lora_B as .* at one place"),
        (
            without_one,
            r"PEFT reads model\.layers\.1\.mlp\.up_proj\.lora_B\.default\.weight as a tensor, upcycle as nothing",
        ),
    ],
)
def test_an_adapter_that_is_misread_is_found(
    misread: Callable[[Updates], Updates], message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(base, tmp_path, 1)
    monkeypatch.setattr("upcycle.experts.lora.read_adapter", lambda *given: misread(read_adapter(*given)))
    with pytest.raises(UpcycleError, match=message):
        KINDS["lora"].check_checkpoint(as_base(base), folder, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, r"PEFT reads the base's .*proj\.weight as .* at one place, upcycle as"),
        ({"init_lora_weights": "olora"}, r"PEFT reads the base's .*proj\.weight as .* at one place, upcycle as"),
        ({"use_dora": True}, r"PEFT reads .*lora_magnitude_vector\.default\.weight as a tensor, upcycle as nothing"),
        (
            {"modules_to_save": ["norm"]},
            r"PEFT reads .*modules_to_save\.default\.weight as a tensor, upcycle as nothing",
        ),
        ({"use_rslora": True}, r"PEFT reads the scaling of .* as 4, upcycle as 2"),
        (
            {"target_modules": ["q_proj", "up_proj"]},
            r"PEFT reads .*q_proj\.lora_B\.default.* as a tensor, upcycle as nothing",
        ),
    ],
    ids=str,
)
def test_what_our_own_reader_would_overlook_is_found(
    options: dict[str, Any], message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its fields and tensors were not refused by name: PEFT's model tells too."""
    folder = make_adapter(base, tmp_path, 1, **options)
    ours = {n: t for n, t in adapter_files.read_tensors(folder).items() if adapter_files.NAME.fullmatch(n)}
    config = adapter_files.read_adapter_config(folder)
    monkeypatch.setattr(adapter_files, "read_tensors", lambda _: ours)
    monkeypatch.setattr(adapter_files, "_check_kind", lambda *_: None)
    monkeypatch.setattr(adapter_files, "read_adapter_config", lambda _: {**config, "use_rslora": False})
    with pytest.raises(UpcycleError, match=message):
        compare(base, folder)


def test_an_adapter_that_peft_cannot_load_is_not_taken(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path, 1)
    text = (folder / adapter_files.CONFIG).read_text()
    (folder / adapter_files.CONFIG).write_text(text.replace('"r": 4', '"r": 8'))
    with pytest.raises(UpcycleError, match="cannot be loaded by PEFT, so it is refused"):
        compare(base, folder)
