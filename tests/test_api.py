"""The Python interface does what the commands do."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import upcycle
from upcycle.cli import app
from upcycle.errors import UpcycleError
from upcycle.hashes import VERIFY
from upcycle.pipeline.manifest import read_manifest
from upcycle.pipeline.stages import stage_names
from upcycle.recipe import load_recipe


def contents(run: Path) -> dict[str, str]:
    """The hash of what each stage made."""
    found = {name: read_manifest(run / name) for name in stage_names()}
    return {name: manifest.content for name, manifest in found.items() if manifest}


def test_stages_from_python_make_what_the_command_makes(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    app(["run", str(path), "--run", str(tmp_path / "typed"), "expand.num_experts=3"], standalone_mode=False)
    run = upcycle.Run(upcycle.make_recipe(path, expand={"num_experts": 3}), tmp_path / "called")
    checkpoints = upcycle.prepare(run)
    assert [checkpoint.name for checkpoint in checkpoints] == [c.name for c in run.checkpoints]
    plan = upcycle.expand(run)
    assert len(plan.experts) == 3
    assert isinstance(AutoModelForCausalLM.from_pretrained(upcycle.assemble(run)), MixtralForCausalLM)
    assert sum(bucket.samples for bucket in upcycle.route(run).buckets) > 0
    assert upcycle.posttrain(run) == run.result == tmp_path / "called" / "posttrain"
    assert upcycle.evaluate(run)["MoE"].loss["all"] > 0
    assert contents(run.folder) == contents(tmp_path / "typed")
    assert set(contents(run.folder)) == set(stage_names())

    again = upcycle.run(path, out=run.folder, base=tiny_recipe["base"], expand={"num_experts": 3})
    assert again.recipe == run.recipe
    assert again.scores == run.scores
    assert upcycle.open_run(str(run.folder)).scores == run.scores
    assert upcycle.report(again).read_text().startswith("<!DOCTYPE html>")
    exported = upcycle.export(again, tmp_path / "exported")
    assert os.environ.get(VERIFY, "0") == "0"
    assert (exported / "README.md").is_file()
    assert isinstance(AutoModelForCausalLM.from_pretrained(exported), MixtralForCausalLM)


def test_a_run_ends_where_it_is_told_to(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    given = {section: tiny_recipe[section] for section in ("prepare", "posttrain", "route", "evaluate")}
    made = upcycle.run(
        "upit", out=tmp_path / "run", base=Path(tiny_recipe["base"]), data=tiny_recipe["data"], until="expand", **given
    )
    assert list(contents(made.folder)) == ["prepare", "expand"]
    with pytest.raises(UpcycleError, match=r"until is 'all', expected one of prepare, .*, evaluate"):
        upcycle.run("upit", out=tmp_path / "run", base=made.recipe.base, data=tiny_recipe["data"], until="all")
    with pytest.raises(UpcycleError, match="is not finished"):
        upcycle.report(made)


def test_settings_are_merged_into_a_recipe(tmp_path: Path) -> None:
    files = (tmp_path / "a.jsonl", "b.jsonl")
    expected = load_recipe(
        "upit", ["base=m", f"data.train=[{tmp_path}/a.jsonl,b.jsonl]", "seed=3", "prepare.trainer.max_grad_norm=2"]
    )
    trainer = {"trainer": {"max_grad_norm": 2}}
    assert upcycle.make_recipe("upit", base=Path("m"), data=files, seed=3, prepare=trainer) == expected
    assert upcycle.make_recipe(expected) == expected
    changed = upcycle.make_recipe(expected, data={"max_length": 64})
    assert changed.data.train == expected.data.train
    assert changed.data.max_length == 64
    with pytest.raises(UpcycleError, match=r"expand\.num_expert: unknown setting.*num_experts"):
        upcycle.make_recipe(expected, expand={"num_expert": 3})
    with pytest.raises(UpcycleError, match="unknown setting"):
        upcycle.make_recipe(expected, exapnd={})


def test_every_public_name_is_there_and_documented() -> None:
    for name in upcycle.__all__:
        assert getattr(upcycle, name).__doc__, name


def test_a_run_without_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UpcycleError, match="out is empty, expected the name of a folder"):
        upcycle.run("quickstart", out="")
    assert not list(tmp_path.iterdir())


def test_a_run_may_be_named_by_its_folder_and_a_recipe_by_its_name(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe))
    run = upcycle.Run(tmp_path / "recipe.yaml", tmp_path / "run")
    assert len(upcycle.prepare(run)) > 1
    assert len(upcycle.expand(str(run.folder)).experts) == run.recipe.expand.num_experts
    with pytest.raises(UpcycleError, match="gone is not a run"):
        upcycle.expand("gone")
    with pytest.raises(UpcycleError, match=r"gone\.yaml does not exist"):
        upcycle.load_recipe(Path("gone.yaml"))
    for names in (["posttrian"], "posttrian"):
        with pytest.raises(UpcycleError, match=r"a stage to run is 'posttrian', expected one of prepare"):
            upcycle.run_stages(run, names)
