"""A run that goes on: how far it has come, as a page that loads itself again."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from upcycle.console import say
from upcycle.disk import write_text
from upcycle.errors import UpcycleError
from upcycle.pipeline.costs import read_costs
from upcycle.pipeline.manifest import partial_of, read_manifest
from upcycle.pipeline.run import is_run
from upcycle.pipeline.stages import stage_names
from upcycle.records.files import RECIPE, TRAINER_STATE
from upcycle.reporting.charts import line_chart
from upcycle.reporting.course import course_chart
from upcycle.reporting.page import Chart, Table, render, safe


def watch(run: Path, seconds: int, out: Path) -> None:
    """Write the page again and again until the run is complete.

    Raises:
        UpcycleError: the folder is no run.
    """
    if not is_run(run):
        raise UpcycleError(f"{run} is not a run: it has no {RECIPE.name}; start it first with `upcycle run`")
    say(f"{out} shows the progress of the run until it is complete; Ctrl-C stops watching, not the run")
    while set((states := _states(run)).values()) != {"done"}:
        write_text(out, _page(run, states, seconds))
        time.sleep(seconds)


def _states(run: Path) -> dict[str, str]:
    """`done`, `begun` or `pending` for each stage."""
    states = {}
    for stage in stage_names():
        began, done = partial_of(run / stage).exists(), read_manifest(run / stage) is not None
        states[stage] = "begun" if began else "done" if done else "pending"
    return states


def _page(run: Path, states: dict[str, str], seconds: int) -> str:
    current = next((stage for stage, state in states.items() if state == "begun"), None)
    trainer = _newest_trainer_state(partial_of(run / current)) if current else {}
    charts = [course_chart(run), _so_far(current, trainer) if current else None]
    done = [stage for stage, state in states.items() if state == "done"]
    costs = read_costs(run)
    rows = [[stage, state, f"{costs[stage].seconds:.0f}" if stage in costs else ""] for stage, state in states.items()]
    step = f", step {trainer['global_step']} of {trainer['max_steps']} at its last checkpoint" if trainer else ""
    return render(
        "progress.html.j2",
        title=f"{run.resolve().name}: {len(done)} of {len(states)} stages are done",
        lead=f"{current} has begun{step}." if current else "No stage has begun and is unfinished.",
        noise=f"Written at {time.strftime('%H:%M:%S')}, and again every {seconds} seconds while this is watched.",
        problems=(),
        cards=(),
        sections=(),
        refresh=seconds,
        table=Table("stages", ["stage", "", "seconds"], rows, [list(states).index(current)] if current else []),
        charts=[chart for chart in charts if chart],
    )


def _newest_trainer_state(working: Path) -> dict[str, Any]:
    """What the Trainer saved with its last checkpoint; nothing if there is none, or it is being written."""
    with suppress(OSError, ValueError):
        paths = sorted(working.rglob(TRAINER_STATE.name), key=lambda path: path.stat().st_mtime)
        found = json.loads(paths[-1].read_bytes()) if paths else {}
        if isinstance(found, dict) and {"global_step", "max_steps", "log_history"} <= set(found):
            return found
    return {}


def _so_far(stage: str, trainer: dict[str, Any]) -> Chart | None:
    losses = [entry["loss"] for entry in trainer.get("log_history", ()) if "loss" in entry]
    if not losses:
        return None
    drawn = safe(line_chart([("training loss", losses)], "step"))
    return Chart(f"{stage}: training loss", drawn, "Over the steps up to the last checkpoint. Lower is better.")
