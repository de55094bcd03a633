"""A whole run on a tiny model of every family: preparation to evaluation, with children, router start and resume."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import ONE_OF_EACH

from conftest import make_dense
from upcycle.experts.kinds import load_model
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from worlds import shrunk

QUICK = ("granitemoehybrid", "lfm2_moe", "nemotron_h")
"""Hybrids, whose layers and FFNs differ most from Llama's."""
CASES = [
    pytest.param(dense, moe, changes, id=f"{dense}-{moe}", marks=() if moe in QUICK else pytest.mark.long)
    for dense, moe, changes in ONE_OF_EACH
]


@pytest.mark.parametrize(("dense", "moe", "changes"), CASES)
def test_a_run_goes_to_its_end_and_learns(
    dense: str, moe: str, changes: dict[str, Any], tiny_recipe: dict[str, Any], tmp_path: Path
) -> None:
    source = make_dense(tmp_path / "dense", model_type=dense, **{**changes, "max_position_embeddings": 128})
    recipe = shrunk("upit", {**tiny_recipe, "base": str(source)}, expand={"num_experts": 4})
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    assert scores["MoE"]["loss"]["all"] < scores["base"]["loss"]["all"]
    assert load_model(run.folder / "posttrain", torch.float32).config.model_type == moe
    start = json.loads((run.folder / "route" / "report.json").read_text())
    assert {sample["expert"] for sample in start["samples"]} == {0, 1, 2, 3}
