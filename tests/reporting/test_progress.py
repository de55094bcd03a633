"""The page of a run that goes on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from upcycle.cli import app
from upcycle.errors import UpcycleError
from upcycle.pipeline.manifest import partial_of
from upcycle.pipeline.resume import _lock, run_stages
from upcycle.pipeline.run import Run
from upcycle.pipeline.stages import stage_names
from upcycle.recipe import Recipe
from upcycle.records.cost import Cost
from upcycle.records.files import COSTS, RECIPE
from upcycle.reporting import progress


def test_it_shows_a_run_until_it_is_complete(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(recipe, tmp_path / "run")
    run_stages(run, ["prepare", "expand"])
    pages = []

    def sleep(seconds: int) -> None:
        pages.append((seconds, (run.folder / "report.html").read_text()))
        run_stages(run)

    monkeypatch.setattr(progress.time, "sleep", sleep)
    result = CliRunner().invoke(app, ["report", str(run.folder), "--watch", "7"])
    assert result.exit_code == 0, result.output
    ((seconds, page),) = pages
    assert seconds == 7
    assert '<meta http-equiv="refresh" content="7">' in page
    assert "run: 2 of 6 stages are done" in page
    assert "<td>prepare</td><td>done</td>" in page
    assert "<td>posttrain</td><td>pending</td>" in page
    assert "dense preparation: training loss" in page
    assert "upcycled here" not in page
    done = (run.folder / "report.html").read_text()
    assert "refresh" not in done
    assert "The MoE has a held-out loss of" in done


def test_a_training_is_shown_up_to_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RECIPE.of(tmp_path).write_text("base: x")
    saved = partial_of(tmp_path / "prepare") / "checkpoint-3"
    saved.mkdir(parents=True)
    history = [{"step": n, "loss": loss} for n, loss in enumerate((4.0, 3.0, 1.0), 1)] + [{"step": 3, "eval_loss": 2.0}]
    state = {"global_step": 3, "max_steps": 9, "log_history": history}
    out = tmp_path / "report.html"

    class StopError(Exception):
        pass

    def page_with(text: str) -> str:
        (saved / "trainer_state.json").write_text(text)
        with pytest.raises(StopError):
            progress.watch(tmp_path, 5, out)
        return out.read_text()

    def sleep(_: int) -> None:
        raise StopError

    monkeypatch.setattr(progress.time, "sleep", sleep)
    page = page_with(json.dumps(state))
    assert "prepare has begun, step 3 of 9 at its last checkpoint." in page
    assert "training loss: from 1 to 4" in page
    assert "prepare has begun." in page_with(json.dumps(state)[:40])  # half written


def test_watching_ends_with_a_run_that_nobody_works_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RECIPE.of(tmp_path).write_text("base: x")
    partial_of(tmp_path / "prepare").mkdir()
    looks = []
    monkeypatch.setattr(progress.time, "sleep", looks.append)
    with pytest.raises(UpcycleError, match=rf"no process works on {tmp_path} and it is not complete .* continue with"):
        progress.watch(tmp_path, 5, tmp_path / "report.html")
    assert len(looks) == progress.IDLE - 1
    page = (tmp_path / "report.html").read_text()
    assert "refresh" not in page
    assert "when no process worked on it" in page
    with _lock(tmp_path):  # as a run does

        def sleep(_: int) -> None:
            looks.append(0)
            if len(looks) == 9:
                raise KeyboardInterrupt

        monkeypatch.setattr(progress.time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            progress.watch(tmp_path, 5, tmp_path / "report.html")
        assert progress.facts(tmp_path)["worked_on"]


def test_how_far_a_run_is_can_be_read_by_scripts(tmp_path: Path) -> None:
    RECIPE.of(tmp_path).write_text("base: x")
    saved = partial_of(tmp_path / "prepare") / "checkpoint-3"
    saved.mkdir(parents=True)
    (saved / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 9, "log_history": []}')
    COSTS.write(tmp_path, {"prepare": Cost(seconds=2.5, memory_gb=1.0)})
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"])
    found = json.loads(result.output)
    assert (found["complete"], found["worked_on"]) == (False, False)
    assert list(found["stages"]) == list(stage_names())
    assert found["stages"]["prepare"] == {"state": "begun", "seconds": 2.5, "memory_gb": 1.0, "step": 3, "steps": 9}
    assert found["stages"]["evaluate"] == {"state": "pending"}


def test_what_is_no_run_is_not_watched(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--watch", "1"])
    assert "is not a run: it has no recipe.yaml" in str(result.exception)
