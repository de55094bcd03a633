"""Whole runs: killed and resumed, changed, damaged, with the user's own checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from conftest import make_dense, write_rows
from upcycle.cli import app
from upcycle.errors import UpcycleError
from upcycle.evaluation.evaluate import against_dense
from upcycle.experts.kinds import load_model
from upcycle.pipeline.manifest import read_manifest
from upcycle.pipeline.resume import run_stages, status
from upcycle.pipeline.run import Run, open_run
from upcycle.pipeline.stages import STAGES, stage_names
from upcycle.recipe import dump_recipe, is_dump, load_recipe, parse_recipe
from upcycle.records.files import SCORES
from upcycle.reporting.progress import facts
from upcycle.weights.safetensors_io import ModelReader

NOT_REPRODUCED = ("costs.json", ".lock")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in NOT_REPRODUCED
    }


def make(values: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Run:
    changed = {**values, **{name: {**values[name], **fields} for name, fields in sections.items()}}
    return Run(parse_recipe(changed, "test"), folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path, rows: Path) -> tuple[dict[str, Any], Path]:
    """A complete run that tests copy."""
    training = {"epochs": 1, "checkpoint_every": 0.5, "learning_rate": 1e-3, "batch_size": 16, "micro_batch_size": 16}
    values = {
        "base": str(base),
        "data": {"train": str(rows), "max_length": 64},
        "prepare": training,
        "expand": {"num_experts": 3},
        "route": {"min_samples_per_expert": 3, "epochs": 1, "start": "random"},
        "posttrain": training,
        "evaluate": {"models": "ends", "exact_match": False},
    }
    folder = tmp_path_factory.mktemp("finished")
    run_stages(make(values, folder))
    return values, folder


@pytest.fixture
def copy(finished: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    values, folder = finished
    return values, Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_complete_run_does_nothing_again(copy: tuple[dict[str, Any], Path], capsys: Any) -> None:
    values, folder = copy
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")}
    run_stages(make(values, folder))
    assert capsys.readouterr().out.count("already done") == len(stage_names())
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("model.safetensors")}
    assert [todo for _, todo in status(make(values, folder))] == ["done"] * len(stage_names())


def test_manifests_say_what_made_them(finished: tuple[dict[str, Any], Path]) -> None:
    _, folder = finished
    for stage in stage_names():
        manifest = read_manifest(folder / stage)
        assert manifest is not None
        assert manifest.seed == 0
        assert manifest.versions["torch"]
        assert {"settings", "seed", "base"} <= manifest.inputs.keys()
    assert read_manifest(folder / "posttrain").inputs["route"] == read_manifest(folder / "route").content


def test_a_folder_of_another_recipe_is_refused_and_named(copy: tuple[dict[str, Any], Path]) -> None:
    values, folder = copy
    with pytest.raises(UpcycleError, match=r"made by a different recipe:\n  posttrain\.epochs: 1\.0 -> 2\.0\n"):
        run_stages(make(values, folder, posttrain={"epochs": 2}))


def test_a_run_that_made_nothing_takes_another_recipe(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """It was refused before anything was made: the recipe is mended without --update, and nothing is set aside."""
    folder = tmp_path / "run"
    refused = make(tiny_recipe, folder, route={"min_samples_per_expert": 20})
    with pytest.raises(UpcycleError, match="more than half"):
        run_stages(refused, ("prepare",))
    assert [path.name for path in (folder / "prepare.partial").iterdir()] == ["inputs.json"]
    run_stages(make(tiny_recipe, folder, prepare={"learning_rate": 1e-4}), ("prepare",))
    assert sorted(path.name for path in folder.glob("prepare*")) == ["prepare"]


def test_what_a_given_up_update_left_is_set_aside(copy: tuple[dict[str, Any], Path], capsys: Any) -> None:
    """A complete run is complete, whatever was begun beside it."""
    values, folder = copy
    (folder / "posttrain.partial").mkdir()
    (folder / "posttrain.partial" / "work").write_text("hours")
    (folder / "evaluate.partial").mkdir()
    run_stages(make(values, folder))
    assert facts(folder)["complete"]
    assert (folder / "posttrain.partial.old-1" / "work").read_text() == "hours"
    assert "set aside as posttrain.partial.old-1" in capsys.readouterr().out
    assert not list(folder.glob("evaluate.partial*"))


def test_update_runs_only_what_the_change_concerns(copy: tuple[dict[str, Any], Path], capsys: Any) -> None:
    values, folder = copy
    changed = make(values, folder, posttrain={"router_aux_loss_coef": 0.02})
    todo = dict(status(changed))
    assert [todo[s] for s in ("prepare", "expand", "assemble", "route")] == ["done"] * 4
    assert todo["posttrain"] == "run again (settings changed)"
    assert todo["evaluate"] == "run again (an earlier stage changed)"
    run_stages(changed, update=True)
    printed = capsys.readouterr().out
    assert printed.count("already done") == 4
    assert read_manifest(folder / "posttrain").settings["posttrain"]["router_aux_loss_coef"] == 0.02


def test_changed_data_are_noticed_by_their_content(
    copy: tuple[dict[str, Any], Path], rows: Path, tmp_path: Path
) -> None:
    values, folder = copy
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows.read_bytes())
    run_stages(make(values, folder, data={"train": str(moved)}), update=True)  # same content: nothing runs
    moved.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    todo = dict(status(make(values, folder, data={"train": str(moved)})))
    assert todo["prepare"] == "run again (data changed)"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"), "has other content"),
        (lambda p: p.write_bytes(b""), "has 0 bytes, expected"),
        (lambda p: p.unlink(), "is missing"),
    ],
)
def test_a_damaged_artifact_is_named_and_not_used(damage: Any, message: str, copy: tuple, capsys: Any) -> None:
    values, folder = copy
    damage(folder / "assemble" / "model.safetensors")
    with pytest.raises(UpcycleError, match=rf"assemble/model\.safetensors {message}.*--update"):
        run_stages(make(values, folder))
    run_stages(make(values, folder), update=True)
    assert "rebuilding" in capsys.readouterr().out
    # rebuilt from the same inputs: the same bytes, so nothing that follows runs again
    assert [todo for _, todo in status(make(values, folder))] == ["done"] * len(stage_names())


def test_a_stage_without_its_predecessor_is_refused(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="assemble needs prepare, which has not been run"):
        run_stages(make(tiny_recipe, tmp_path), ("assemble",))


def test_two_processes_cannot_work_in_one_folder(copy: tuple[dict[str, Any], Path]) -> None:
    import fcntl

    values, folder = copy
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UpcycleError, match="another process is working"):
            run_stages(make(values, folder))


def test_a_verb_does_not_build_on_an_outdated_or_damaged_stage(copy: tuple[dict[str, Any], Path]) -> None:
    values, folder = copy
    changed = make(values, folder, route={"init_std": 0.03})
    with pytest.raises(UpcycleError, match=r"needs assemble, which is outdated \(settings changed\): run it first"):
        run_stages(changed, ("posttrain",), update=True)
    (folder / "recipe.yaml").unlink()
    (folder / "route" / "router.safetensors").write_bytes(b"")
    with pytest.raises(UpcycleError, match=r"router\.safetensors has 0 bytes"):
        run_stages(make(values, folder), ("evaluate",))


def test_a_lost_recipe_is_not_replaced_by_another_one(copy: tuple[dict[str, Any], Path]) -> None:
    values, folder = copy
    (folder / "recipe.yaml").unlink()
    with pytest.raises(UpcycleError, match=r"has no recipe\.yaml, and another recipe made .* \(assemble: run again"):
        run_stages(make(values, folder, route={"init_std": 0.03}))
    assert not (folder / "recipe.yaml").exists()
    run_stages(make(values, folder))
    assert (folder / "recipe.yaml").exists()


def test_work_left_with_other_inputs_is_set_aside_not_deleted(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = make(tiny_recipe, tmp_path / "run")
    import upcycle.stages.expert_preparation.prepare as prepare

    def left_something(*arguments: Any) -> None:
        (arguments[-2] / "work").write_text("hours")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "tune", left_something)
        with pytest.raises(KeyboardInterrupt):
            run_stages(run, ("prepare",))
    other = make(tiny_recipe, tmp_path / "run", prepare={"learning_rate": 1e-4})
    with pytest.raises(UpcycleError, match="made by a different recipe"):
        run_stages(other, ("prepare",))
    rows = Path(tiny_recipe["data"]["train"])
    more = tmp_path / "more.jsonl"
    more.write_text(rows.read_text() + rows.read_text().splitlines()[0] + "\n")
    (tmp_path / "run" / "recipe.yaml").unlink()
    longer = make(tiny_recipe, tmp_path / "run", data={"train": str(more)})
    with pytest.raises(UpcycleError, match=r"prepare\.partial was left .* with different inputs \(data changed\)"):
        run_stages(longer, ("prepare",))
    run_stages(longer, ("prepare",), update=True)
    assert (tmp_path / "run" / "prepare.partial.old-1" / "work").read_text() == "hours"
    assert "set aside as prepare.partial.old-1" in capsys.readouterr().out


def test_settings_concern_only_the_stages_that_they_decide(copy: tuple[dict[str, Any], Path]) -> None:
    values, folder = copy
    only = dict(status(make(values, folder, data={"max_validation": 1})))
    assert [s for s, todo in only.items() if todo != "done"] == ["evaluate"]
    own = {**values, "route": {**values["route"], "seed_from": "train"}}
    before = make(own, folder).settings(STAGES[0])
    assert before == make(own, folder, expand={"num_experts": 5}).settings(STAGES[0])
    assert before != make(values, folder).settings(STAGES[0])  # held-out seed data are missing from training
    given = {"prepare": {"checkpoints": ["a", "b"]}}  # nothing is trained: the held-out rows do not matter
    more = make(values, folder, expand={"num_experts": 5}, **given).settings(STAGES[0])
    assert make(values, folder, **given).settings(STAGES[0]) == more


def test_a_checkpoint_that_changes_in_place_is_noticed(
    tiny_recipe: dict[str, Any], checkpoints: list[Path], tmp_path: Path
) -> None:
    given = [str(shutil.copytree(c, tmp_path / c.name)) for c in checkpoints[:2]]
    values = {**tiny_recipe, "prepare": {"checkpoints": given}}
    run_stages(make(values, tmp_path / "run"), ("prepare", "expand", "assemble"))
    before = read_manifest(tmp_path / "run" / "assemble")
    shutil.copyfile(checkpoints[2] / "model.safetensors", Path(given[1]) / "model.safetensors")
    run_stages(make(values, tmp_path / "run"), ("prepare", "expand", "assemble"), update=True)
    assert read_manifest(tmp_path / "run" / "assemble").content != before.content


def test_the_template_in_force_ends_up_in_the_model(
    tiny_recipe: dict[str, Any], checkpoints: list[Path], tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    values = {**tiny_recipe, "prepare": {"checkpoints": [str(c) for c in checkpoints[:2]]}}
    for text in ("{{ messages }}", "{{ messages }}!"):
        template.write_text(text)
        run = make(values, tmp_path / "run", data={"chat_template": str(template)})
        run_stages(run, ("prepare", "expand", "assemble"), update=True)
        assert (tmp_path / "run" / "assemble" / "chat_template.jinja").read_text() == text


@pytest.mark.parametrize("form", ["list", "folder"])
def test_the_users_own_checkpoints_need_no_training(
    form: str, tiny_recipe: dict[str, Any], checkpoints: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / "trainer"
    shutil.copytree(checkpoints[0], parent / "checkpoint-90")
    shutil.copytree(checkpoints[1], parent / "checkpoint-100")
    (parent / "checkpoint-best").mkdir()
    given = str(parent) if form == "folder" else [str(c) for c in checkpoints[:2]]
    run = make(tiny_recipe, tmp_path / "run", prepare={"checkpoints": given})
    import upcycle.stages.expert_preparation.prepare as prepare

    monkeypatch.setattr(prepare, "fine_tune", None)  # would fail if called
    run_stages(run, ("prepare", "expand", "assemble"))
    names = [e.name for e in run.plan.experts]
    assert names[:2] == (["checkpoint-90", "checkpoint-100"] if form == "folder" else ["checkpoint-1", "checkpoint-2"])
    assert (tmp_path / "run" / "assemble" / "model.safetensors").exists()


def test_a_folder_that_is_not_ours_is_never_replaced(copy: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    values, _ = copy
    run = Run(parse_recipe(values, "test"), tmp_path / "other")
    precious = run.folder / "prepare" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    for update in (False, True):
        with pytest.raises(UpcycleError, match="prepare exists but was not made by upcycle"):
            run_stages(run, ("prepare",), update)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize(("dense", "moe"), [("qwen2", "qwen2_moe"), ("granite", "granitemoe"), ("phi3", "mixtral")])
def test_the_whole_path_for_other_layouts(
    dense: str, moe: str, tiny_recipe: dict[str, Any], rows: Path, tmp_path: Path
) -> None:
    """Fused projections in the dense model, experts in one tensor, a shared expert of zeros that stays zero."""
    base = make_dense(tmp_path / "base", model_type=dense)
    run = make({**tiny_recipe, "base": str(base)}, tmp_path / "run", evaluate={"models": "ends", "exact_match": False})
    run_stages(run)
    made, initial = ModelReader(run.folder / "posttrain"), ModelReader(run.folder / "assemble")
    model = load_model(run.folder / "posttrain", torch.float32)  # refuses missing and unexpected keys
    assert model.config.model_type == moe
    moved = {name for name in made.names() if not torch.equal(made.tensor(name), initial.tensor(name))}
    assert any("expert" in name or "linear" in name for name in moved)
    assert any("gate" in name or "router" in name for name in moved)
    shared = [name for name in made.names() if "shared_expert" in name]
    assert bool(shared) == (dense == "qwen2")
    assert not any(made.elements(name).any() for name in shared)
    routing = json.loads((run.folder / "evaluate" / "routing.json").read_text())
    assert set(routing) == {"MoE before post-training", "MoE", "step_0", "against_best_expert"}
    assert set(against_dense(SCORES.read_of(run.folder), one_run=False)) == {"against_best_expert"}
    assert set(routing["against_best_expert"]) == {"all", "copy", "reverse"}
    assert routing["MoE"]["agreement"]["chance"] == 0.25
    assert len(routing["MoE"]["by_domain"]["copy"]["entropy"]) == 2
    router = load_file(run.folder / "route" / "router.safetensors")
    assert router.keys() <= set(initial.names())


def test_a_domain_without_a_seed_sample_is_named(
    tiny_recipe: dict[str, Any], checkpoints: list[Path], tmp_path: Path, capsys: Any
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 120).read_text().splitlines()
    rare = {**json.loads(rows[0]), "domain": "rare"}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(rare), *rows[1:]]))
    given = {"checkpoints": [str(c) for c in checkpoints]}
    run = make(tiny_recipe, tmp_path / "run", data={"train": str(tmp_path / "rows.jsonl")}, prepare=given)
    run_stages(run, ("prepare", "expand", "assemble", "route"))
    seen = {sample.domain for sample in run.splits.seed.fit}
    said = " ".join(capsys.readouterr().out.split())
    assert ("no seed sample is of rare" in said) == ("rare" not in seen)
    assert "rare" not in seen


def test_a_working_folder_that_a_kill_left_unmarked_is_new(copy: tuple[dict[str, Any], Path]) -> None:
    """Between the folder and its stamp, or while the stamp is written."""
    values, folder = copy
    before = contents(folder / "evaluate")
    for left in ((), (".inputs.json.tmp",)):
        shutil.rmtree(folder / "evaluate")
        (folder / "evaluate.partial").mkdir()
        for name in left:
            (folder / "evaluate.partial" / name).write_text("{")
        run_stages(make(values, folder))
        assert contents(folder / "evaluate") == before


@pytest.mark.parametrize("stamp", ["", '{"settings": ', "[]"])
def test_a_stamp_that_is_cut_short_is_named_and_set_aside(stamp: str, copy: tuple[dict[str, Any], Path]) -> None:
    values, folder = copy
    shutil.rmtree(folder / "evaluate")
    (folder / "evaluate.partial").mkdir()
    (folder / "evaluate.partial" / "inputs.json").write_text(stamp)
    (folder / "evaluate.partial" / "work").write_text("hours")
    with pytest.raises(UpcycleError, match=r"evaluate\.partial was left by a run with different inputs"):
        run_stages(make(values, folder))
    run_stages(make(values, folder), update=True)
    assert (folder / "evaluate.partial.old-1" / "work").read_text() == "hours"


def test_a_file_that_was_being_written_is_no_part_of_a_stage(copy: tuple[dict[str, Any], Path]) -> None:
    values, folder = copy
    before = contents(folder / "route")
    (folder / "route").rename(folder / "route.partial")
    manifest = read_manifest(folder / "route.partial")
    (folder / "route.partial" / "inputs.json").write_text(json.dumps(manifest.inputs, indent=1) + "\n")
    (folder / "route.partial" / ".manifest.json.tmp").write_text("{")
    (folder / "route.partial" / "manifest.json").unlink()
    run_stages(make(values, folder))
    run_stages(make(values, folder))  # and what was sealed is complete
    assert contents(folder / "route") == before


def test_a_kill_after_the_renaming_leaves_nothing_behind(copy: tuple[dict[str, Any], Path]) -> None:
    values, folder = copy
    before = contents(folder / "route")
    (folder / "route" / "inputs.json").write_text("{}")
    run_stages(make(values, folder))
    assert contents(folder / "route") == before


def test_a_stage_that_was_half_taken_from_another_run_is_taken_whole(
    copy: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, folder = copy
    taken = tmp_path / "taken"
    left = [3]

    def killed(source: str, target: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        shutil.copyfile(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("upcycle.pipeline.resume._link_or_copy", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stages(make(values, taken), ("prepare",), donors=[folder])
    run_stages(make(values, taken), ("prepare",), donors=[folder])
    assert contents(taken / "prepare") == contents(folder / "prepare")
    assert sorted(path.name for path in taken.iterdir()) == [".lock", "prepare", "recipe.yaml"]


def test_an_outdated_stage_is_replaced_at_once(
    copy: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, folder = copy
    changed = {**values, "evaluate": {**values["evaluate"], "models": "all"}}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("upcycle.pipeline.manifest.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stages(make(changed, folder), update=True)
    assert [todo for _, todo in status(make(changed, folder))] == ["done"] * len(stage_names())
    run_stages(make(changed, folder))
    assert not list(folder.glob(".evaluate*"))


@pytest.mark.parametrize(
    ("stage", "place"),
    [
        ("posttrain", "model.safetensors"),
        ("posttrain", "log.json"),
        ("prepare", "checkpoint-3/model.safetensors"),
    ],
)
def test_what_is_cut_in_a_working_folder_is_made_again(
    stage: str, place: str, copy: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By no kill, as it was on the disk before the next step began: but nobody can trust every disk."""
    values, folder = copy
    before = contents(folder / stage)
    shutil.rmtree(folder / stage)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("upcycle.pipeline.resume.seal", killed)
        with pytest.raises(KeyboardInterrupt):
            run_stages(make(values, folder))
    path = folder / f"{stage}.partial" / place
    path.write_bytes(path.read_bytes()[:-9])
    run_stages(make(values, folder))
    assert contents(folder / stage) == before


@pytest.mark.parametrize(
    ("verb", "place"),
    [
        (("export", "{}", "--to", "{}/out"), "posttrain/model.safetensors"),
        (("export", "{}/posttrain", "--to", "{}/out"), "posttrain/model.safetensors"),
        (("export", "{}", "--to", "{}/out"), "evaluate/scores.json"),
        (("report", "{}"), "posttrain/model.safetensors"),
        (("report", "{}"), "route/report.json"),
        (("inspect", "{}", "--figure", "{}/x.png"), "expand/plan.json"),
        (("inspect", "{}/posttrain", "--figure", "{}/x.png"), "posttrain/model.safetensors"),
        (("benchmark", "{}", "--tasks", "arc_easy"), "posttrain/model.safetensors"),
        (("benchmark", "{}", "--tasks", "arc_easy", "--experts"), "assemble/model.safetensors"),
    ],
    ids=lambda value: "-".join(value).replace("{}", "") if isinstance(value, tuple) else value,
)
def test_damage_is_named_by_every_verb(verb: tuple[str, ...], place: str, copy: tuple[dict[str, Any], Path]) -> None:
    _, folder = copy
    content = bytearray((folder / place).read_bytes())
    content[-3] ^= 1
    (folder / place).write_bytes(content)
    result = CliRunner().invoke(app, [word.format(folder) for word in verb])
    assert f"{place} has other content than when it was written" in str(result.exception)
    assert not (folder / "out").exists()


def test_a_device_out_of_memory_is_said_with_what_helps(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    from upcycle.stages.expert_preparation import prepare

    run = Run(parse_recipe(tiny_recipe, "test"), tmp_path / "run")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    expected = r"prepare: the device is out of memory \(CUDA out of memory\); set prepare.micro_batch_size=1 and"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "tune", full)
        with pytest.raises(UpcycleError, match=expected):
            run_stages(run, ("prepare",))


def test_stages_that_do_not_belong_together_are_not_opened(copy: tuple[dict[str, Any], Path]) -> None:
    """A model with the scores of another, or with a recipe that made nothing of it."""
    values, folder = copy
    open_run(folder)
    changed = make(values, folder, posttrain={"learning_rate": 0.01})
    run_stages(changed, ("expand",), update=True)
    said = (
        r"copy: stage posttrain was made with posttrain\.learning_rate=0\.001 \(recipe\.yaml has 0\.01\); make it again"
    )
    with pytest.raises(UpcycleError, match=said):
        open_run(folder)
    run_stages(changed, stage_names()[:-1], update=True)
    with pytest.raises(
        UpcycleError, match=r"stage evaluate was made from another posttrain than is there now; .*--update"
    ):
        open_run(folder)
    run_stages(changed, update=True)
    assert open_run(folder).recipe.posttrain.learning_rate == 0.01


def test_ones_own_recipe_is_never_replaced(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    path, run = tmp_path / "recipe.yaml", Run(parse_recipe(tiny_recipe, "test"), tmp_path)
    own = "# mine\n" + dump_recipe(run.recipe)
    path.write_text(own)
    with pytest.raises(UpcycleError, match=r"recipe\.yaml is there already, .* name a new folder with --run"):
        run_stages(run, ("prepare",))
    assert path.read_text() == own
    assert load_recipe(str(path)) == run.recipe


def test_a_run_of_an_earlier_version_does_not_split_its_rows_anew(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """System messages were part of a question: other rows would be held out than were before."""
    lines = [json.loads(line) for line in Path(tiny_recipe["data"]["train"]).read_text().splitlines()]
    for row in lines[:5]:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = make(tiny_recipe, tmp_path / "run", data={"train": str(tmp_path / "rows.jsonl")})
    assert run.splits.has_system_messages
    assert not make(tiny_recipe, tmp_path / "other").splits.has_system_messages
    run.forget()
    vars(run)["format"] = 2
    with pytest.raises(UpcycleError, match=r"begun by an earlier version, .* start anew with a new --run"):
        _ = run.splits


def test_a_recipe_that_a_run_wrote_may_be_replaced(tiny_recipe: dict[str, Any]) -> None:
    written = dump_recipe(parse_recipe(tiny_recipe, "test"))
    assert is_dump(written)
    assert is_dump(written.replace("  decontaminate_with: []\n", ""))  # of a version that did not have it
    assert not is_dump("# mine\n" + written)
    assert not is_dump("base: x\ndata:\n  train: y\n")
    assert not is_dump("")


def test_data_that_change_within_a_session_are_noticed(
    copy: tuple[dict[str, Any], Path], rows: Path, tmp_path: Path
) -> None:
    values, folder = copy
    own = Path(shutil.copy(rows, tmp_path / "own.jsonl"))
    run = make(values, folder, data={"train": str(own)})
    run_stages(run, update=True)
    own.write_text("\n".join(own.read_text().splitlines()[:-1]))
    with pytest.raises(UpcycleError, match="data changed"):
        run_stages(run)
