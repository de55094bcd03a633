"""What `upcycle inspect` and `upcycle check` say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from upcycle.architectures.check import check
from upcycle.architectures.mapping import map_model
from upcycle.console import console
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import KINDS, kind_in, load_model
from upcycle.records.files import LOG, PLAN, SCORES
from upcycle.records.plan import Checkpoint, ExpansionPlan
from upcycle.records.scores import ModelScores
from upcycle.records.training import LogEntry, TrainingRecord
from upcycle.reporting.figures import expert_distances
from upcycle.reporting.inspect import find_plan, inspect, lineage_tree
from upcycle.settings import ExpandSettings
from upcycle.stages.expert_expansion.expand import expand
from upcycle.weights.safetensors_io import ModelReader
from worlds import as_base, assemble, plan_of


def plan_with_base(base: Path, checkpoints: list[Path], out: Path, **settings: Any) -> ExpansionPlan:
    """Six experts: three checkpoints, the base and two children."""
    chosen = ExpandSettings(num_experts=6, keep_base=True, **settings)
    named = [Checkpoint(name=f.name, path=str(f)) for f in checkpoints]
    return expand(KINDS["ffn"], as_base(base), named, checkpoints, chosen, 0, out)


@pytest.fixture
def moe(base: Path, checkpoints: list[Path], tmp_path: Path) -> Path:
    out = tmp_path / "moe"
    out.mkdir()
    plan = plan_with_base(base, checkpoints, out)
    assemble("ffn", base, checkpoints, plan, out)
    (out / "plan.json").unlink()
    return out


def test_a_moe_carries_its_lineage_with_it(moe: Path, tmp_path: Path, capsys: Any) -> None:
    inspect(moe, tmp_path / "picture.png", kind_in(moe).describe(moe))
    said = capsys.readouterr().out
    assert f"{moe}: A mixtral mixture of 6 experts, top-2" in said
    assert "lineage (dare, drop rate 0.2, seed 0)" in said
    assert "E3 base" in said
    assert " E4 child-4 = " in said
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_tree_puts_a_child_under_its_younger_parent(moe: Path) -> None:
    plan = find_plan(moe)
    with console.capture() as capture:
        console.print(lineage_tree(plan))
    lines = capture.get().splitlines()
    for index, expert in enumerate(plan.experts):
        (line,) = [i for i, text in enumerate(lines) if f"E{index} {expert.name}" in text]
        if expert.parents:
            younger = max(expert.parents)
            above = [i for i, text in enumerate(lines) if f"E{younger} {plan.experts[younger].name}" in text]
            assert above[0] < line


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_distances_are_a_metric_that_a_dendrogram_can_use(
    kind: str, base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    plan = plan_with_base(base, checkpoints, tmp_path, similarity=kind)
    distances = expert_distances(plan)
    assert np.isfinite(distances).all()
    assert (distances >= 0).all()
    np.testing.assert_allclose(distances, distances.T)
    assert (distances.diagonal() == 0).all()


def test_what_has_no_experts_says_what_was_expected(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="has no expansion plan; expected a run folder"):
        inspect(base, tmp_path / "x.png")
    with pytest.raises(UpcycleError, match="does not exist"):
        inspect(tmp_path / "nothing", tmp_path / "x.png")


def test_check_counts_what_assembly_makes(base: Path, moe: Path, capsys: Any) -> None:
    mapping = check(str(base), 6, 2, "bfloat16")
    said = capsys.readouterr().out
    assert "llama -> mixtral, 6 experts, top-2\n" in said
    assert "disk, and memory to serve it, in bfloat16 " in said
    assert "the same in float32" not in said  # it was asked for bfloat16
    assert "exact: logits with equal experts are the dense model's" in said
    model = load_model(moe, torch.float32)
    assert mapping.num_parameters() == sum(ModelReader(moe).elements(n).numel() for n in ModelReader(moe).names())
    assert mapping.num_parameters() == model.num_parameters()
    ffn = 3 * 32 * 48 * 2
    assert mapping.num_parameters(2) == mapping.num_parameters() - 4 * ffn


def test_check_says_that_checkpoints_of_a_run_are_in_float32(base: Path, tmp_path: Path, capsys: Any) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    check(str(half), 6, 2, "source")
    said = capsys.readouterr().out
    assert "the same in float32 " in said
    assert "the MoE has the dtype of its checkpoints: float32 where the run trains them" in said
    check(str(base), 6, 2, "source")
    assert "the same in float32" not in capsys.readouterr().out


def test_an_unfinished_run_is_not_taken_for_something_else(tmp_path: Path) -> None:
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "recipe.yaml").write_text("base: x\ndata: {train: y.jsonl}\n")
    with pytest.raises(UpcycleError, match=r"has not come to the stage expand yet; continue with `upcycle run '.*'`"):
        inspect(tmp_path / "a run")


def test_check_shows_what_other_choices_cost(base: Path, capsys: Any) -> None:
    check(str(base), 6, 2, "source")
    rows = [line.replace("every: ", "every:").split() for line in capsys.readouterr().out.splitlines()]
    chosen = {(row[0], *row[2:4]): row[1:] for row in rows if len(row) == 9 and row[1] == "all"}
    assert {("6", "2", "1"), ("6", "1", "2"), ("3", "1", "2")} <= chosen.keys()
    assert ("6", "1", "4") not in chosen  # 48 channels into 4 slices are 12 each, no multiple of 8
    (half,) = [row for row in rows if row[:4] == ["6", "every:2", "2", "1"]]
    mapping = map_model(base, ModelReader(base), 6, layers=(1,))
    assert float(half[6]) == pytest.approx(mapping.flops_over_dense(2), abs=6e-3)  # with 256 channels of zeros
    dense = map_model(base, ModelReader(base), 1)
    whole, ffn, router = dense.num_dense, 3 * 32 * 48 * 2, 2 * 32
    assert float(chosen["6", "2", "1"][5]) == pytest.approx((whole + ffn + 6 * router) / whole, abs=6e-3)
    assert float(chosen["6", "1", "2"][5]) == pytest.approx((whole + 12 * router) / whole, abs=6e-3)


def test_check_refuses_what_assembly_refuses(base: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(base, tmp_path / "bad")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps({**config, "mlp_bias": True}))
    with pytest.raises(UpcycleError, match="mlp_bias=True would be lost"):
        check(str(tmp_path / "bad"), 8, 2, "source")


def test_a_run_has_pictures_of_its_routing_and_load(moe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in ("expand", "evaluate", "posttrain"):
        (run / stage).mkdir(parents=True)
    PLAN.write(run / "expand", find_plan(moe))
    shares = {"all": [[0.5, 0.5]] * 5, "a": [[0.9, 0.1]] * 5}
    loss = {"all": 1.0}
    SCORES.write(run / "evaluate", {"base": ModelScores(loss=loss), "MoE": ModelScores(loss=loss, expert_share=shares)})
    log = [LogEntry(step=i, epoch=i, loss=1.0, load=[[1.5, 0.5], [1.0, 1.0]], balance_loss=1.0) for i in (1, 2)]
    LOG.write(run / "posttrain", TrainingRecord(rows=1, tokens=2, answer_tokens=1, steps=2, log=log))
    inspect(run, tmp_path / "picture.png")
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["picture-load.png", "picture-routing.png", "picture.png"]


def test_a_name_with_brackets_is_shown_as_it_is() -> None:
    plan = plan_of(1)
    odd = plan.model_copy(update={"experts": (plan.experts[0].model_copy(update={"name": "[bold]c[/bold]"}),)})
    with console.capture() as capture:
        console.print(lineage_tree(odd))
    assert "E0 [bold]c[/bold]" in capture.get()


def test_a_folder_in_a_run_that_is_no_stage_has_no_experts(tmp_path: Path) -> None:
    for name in ("expand", "posttrain", "mine"):
        (tmp_path / name).mkdir()
    PLAN.write(tmp_path / "expand", plan_of(2))
    assert find_plan(tmp_path / "posttrain") == plan_of(2)
    with pytest.raises(UpcycleError, match="mine has no expansion plan"):
        find_plan(tmp_path / "mine")


@pytest.mark.parametrize("count", [1, 3])
def test_experts_without_a_similarity_have_no_picture(count: int, tmp_path: Path, capsys: Any) -> None:
    PLAN.write(tmp_path, plan_of(count))  # copies: no task vector
    inspect(tmp_path, tmp_path / "picture.png")
    assert "picture.png is not drawn: no two of the experts have a similarity" in capsys.readouterr().out
    assert not (tmp_path / "picture.png").exists()
