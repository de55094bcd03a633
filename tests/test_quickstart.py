"""The embedded default: its size, its data, and a shortened run of its recipe."""

import json
from pathlib import Path

import torch

from upcycle.data.splits import load_splits
from upcycle.experts.kinds import load_model
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import load_recipe
from upcycle.weights.base import load_tokenizer
from upcycle.weights.folders import BUILTIN_BASE, find_model

SHORT = [
    "data.fraction=0.05",
    "data.max_validation=24",
    "prepare.epochs=1",
    "posttrain.epochs=1",
    "route.min_samples_per_expert=3",
    "evaluate.models=ends",
]


def test_the_base_is_small_and_complete() -> None:
    folder = find_model(BUILTIN_BASE)
    model = load_model(folder, torch.float32)  # refuses missing and unexpected keys
    assert 1e6 <= model.num_parameters() <= 6e6
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 12e6


def test_training_and_held_out_rows_share_no_question() -> None:
    splits = load_splits(load_recipe("quickstart"), load_tokenizer(find_model(BUILTIN_BASE), None), 256)
    parts = [{s.question for s in p} for p in (splits.train, splits.seed.fit, splits.seed.test, splits.validation)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert len({s.domain for s in splits.validation}) >= 5
    assert max(len(s.answer) for s in splits.validation) <= 12


def test_a_shortened_quickstart_learns(tmp_path: Path) -> None:
    run_stages(Run(load_recipe("quickstart", SHORT), tmp_path))
    scores = json.loads((tmp_path / "evaluate" / "scores.json").read_text())
    assert list(scores) == ["base", "checkpoint-9", "MoE before post-training", "MoE"]
    assert scores["MoE"]["loss"]["all"] < scores["checkpoint-9"]["loss"]["all"] < scores["base"]["loss"]["all"] / 2
