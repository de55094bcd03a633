"""Checkpoints that the user brings: what does not belong to the base is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_tokenizer
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import KINDS
from upcycle.stages.expert_preparation.checkpoints import adopt
from worlds import as_base, make_adapter


def cast(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def in_bfloat16(folder: Path) -> None:
    cast(folder, torch.bfloat16)


def in_float16(folder: Path) -> None:
    cast(folder, torch.float16)


def in_float64(folder: Path) -> None:
    cast(folder, torch.float64)


def with_another_token(folder: Path) -> None:
    make_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {**tokenizer["model"]["vocab"], "a": 66, "b": 65}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_other_eps(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_bfloat16, r"odd: its weights are torch.bfloat16, those of .* torch.float32; the rounding would be taken"),
        (in_float64, r"odd: its weights are torch.float64, those of .*checkpoint-1 torch.float32"),
        (with_another_token, r"odd/tokenizer.json: its model is not that of the base's tokenizer"),
        (with_other_eps, r"odd: rms_norm_eps is 0.1, but the base .* has 1e-06"),
    ],
)
def test_a_checkpoint_that_does_not_belong_to_the_base_is_named(
    change: Callable[[Path], None], message: str, base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(checkpoints[1], odd)
    adopt(KINDS["ffn"], as_base(base), [(checkpoints[0], "0" * 64), (odd, "1" * 64)], tmp_path)
    change(odd)
    with pytest.raises(UpcycleError, match=message):
        adopt(KINDS["ffn"], as_base(base), [(checkpoints[0], "0" * 64), (odd, "1" * 64)], tmp_path)


def test_a_base_cast_to_fewer_bits_of_mantissa_is_no_checkpoint(
    base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    """float16 and bfloat16 have the same size; the differences would be rounding alone."""
    half = Path(shutil.copytree(base, tmp_path / "half"))
    in_float16(half)
    rounded = Path(shutil.copytree(half, tmp_path / "rounded"))
    in_bfloat16(rounded)
    with pytest.raises(UpcycleError, match=r"rounded: its weights are torch.bfloat16, those of .*half torch.float16"):
        adopt(KINDS["ffn"], as_base(half), [(rounded, "0" * 64)], tmp_path)


def test_what_the_last_checkpoint_has_otherwise_is_said(
    base: Path, checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = Path(shutil.copytree(checkpoints[1], tmp_path / "last"))
    adopt(KINDS["ffn"], as_base(base), [(checkpoints[0], "0" * 64), (last, "1" * 64)], tmp_path)
    assert "the MoE gets the base's" not in capsys.readouterr().out
    (last / "chat_template.jinja").write_text("{{ messages }}")
    (last / "generation_config.json").write_text('{"eos_token_id": 7}')
    adopt(KINDS["ffn"], as_base(base), [(checkpoints[0], "0" * 64), (last, "1" * 64)], tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert f"unless data.chat_template={last / 'chat_template.jinja'}" in said
    assert "generation_config.json: eos_token_id is 7; the MoE gets the base's, 2" in said


def test_adapters_of_another_base_are_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_adapter(base, tmp_path / "a", 1)
    adopt(KINDS["lora"], as_base(base), [(folder, "0" * 64)], tmp_path)
    assert "by its own words" not in capsys.readouterr().out
    config = json.loads((folder / "adapter_config.json").read_text())
    other = {**config, "base_model_name_or_path": "owner/other-instruct"}
    (folder / "adapter_config.json").write_text(json.dumps(other))
    adopt(KINDS["lora"], as_base(base), [(folder, "0" * 64)], tmp_path)
    assert "was trained on owner/other-instruct, by its own words" in " ".join(capsys.readouterr().out.split())


def test_an_adapter_s_configuration_has_one_order(base: Path, tmp_path: Path) -> None:
    """PEFT writes a set: in another order from process to process."""
    folder = make_adapter(base, tmp_path / "a", 1)
    path = folder / "adapter_config.json"
    written = []
    for order in (["up_proj", "down_proj", "gate_proj"], ["gate_proj", "up_proj", "down_proj"]):
        path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": order}))
        KINDS["lora"].finish_checkpoint(folder, as_base(base))
        written.append(path.read_bytes())
    assert written[0] == written[1]
