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
from worlds import as_base


def cast(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def in_bfloat16(folder: Path) -> None:
    cast(folder, torch.bfloat16)


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
