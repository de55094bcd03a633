"""A stage is a row: a new one between two others takes its place everywhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from upcycle.cli import app
from upcycle.pipeline import stages
from upcycle.pipeline.manifest import read_manifest
from upcycle.pipeline.resume import run_stages, status
from upcycle.pipeline.run import Run
from upcycle.pipeline.stage import Stage
from upcycle.pipeline.stages import stage_names, training_tokens
from upcycle.recipe import parse_recipe
from upcycle.records.files import POSTTRAIN, PREPARE, ROUTE

REST = Stage(
    name="rest",
    help="Does nothing.",
    needs=(ROUTE,),
    run=lambda _, out: (out / "done.txt").touch(),
    settings=lambda recipe: {"alpha": recipe.route.alpha},
    tokens=lambda _: 7,
)


@pytest.fixture
def with_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that does nothing, between route and posttrain, which needs it."""
    before, after = (
        stages.STAGES[: stage_names().index(POSTTRAIN)],
        [replace(s, needs=(*s.needs, "rest")) if s.name == POSTTRAIN else s for s in stages.STAGES],
    )
    monkeypatch.setattr(stages, "STAGES", (*before, REST, *after[len(before) :]))


@pytest.fixture
def values(tiny_recipe: dict[str, Any], checkpoints: list[Path]) -> dict[str, Any]:
    given = {"prepare": {"checkpoints": [str(c) for c in checkpoints]}}
    return {**tiny_recipe, **given, "evaluate": {"models": "ends", "exact_match": False}}


def test_what_one_schedule_spans_decides_both_stages(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """A longer post-training leaves other checkpoints, unless it has a schedule of its own."""

    def settings(epochs: float, schedule: str | None) -> tuple[Any, ...]:
        posttrain = {**tiny_recipe["posttrain"], "epochs": epochs, "schedule": schedule}
        run = Run(parse_recipe({**tiny_recipe, "posttrain": posttrain}, "test"), tmp_path)
        return tuple(run.settings(stage) for stage in stages.STAGES if stage.name in (PREPARE, POSTTRAIN))

    assert settings(1, "continue") == settings(1, None)
    assert settings(1, None)[0] != settings(2, None)[0]
    assert settings(1, "restart")[0] == settings(2, "restart")[0] != settings(1, None)[0]
    assert settings(1, "restart")[1] != settings(1, None)[1]


@pytest.mark.usefixtures("with_rest")
def test_a_new_stage_is_one_row(values: dict[str, Any], tmp_path: Path) -> None:
    run = Run(parse_recipe(values, "test"), tmp_path / "run")
    assert [name for name, _ in status(run)] == [
        "prepare",
        "expand",
        "assemble",
        "route",
        "rest",
        "posttrain",
        "evaluate",
    ]
    run_stages(run)
    made = read_manifest(run.folder / "rest")
    assert made is not None
    assert list(made.files) == ["done.txt"]
    assert read_manifest(run.folder / "posttrain").inputs["rest"] == made.content
    assert training_tokens(run.folder)["rest"] == 7
    result = CliRunner().invoke(app, ["report", str(run.folder)])
    assert result.exit_code == 0, result.output
    assert "<td>rest</td>" in (run.folder / "report.html").read_text()


@pytest.mark.usefixtures("with_rest")
def test_what_decides_a_new_stage_runs_it_and_what_follows_again(values: dict[str, Any], tmp_path: Path) -> None:
    run_stages(Run(parse_recipe(values, "test"), tmp_path / "run"))
    changed = {**values, "route": {**values["route"], "alpha": 0.25}}
    todo = dict(status(Run(parse_recipe(changed, "test"), tmp_path / "run")))
    assert todo["assemble"] == "done"
    assert todo["rest"] == todo["posttrain"] == "run again (an earlier stage changed)"
