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
from upcycle.pipeline.resume import is_worked_on
from upcycle.pipeline.run import again, is_run
from upcycle.pipeline.stages import stage_names
from upcycle.records.files import RECIPE, TRAINER_STATE
from upcycle.reporting.charts import line_chart
from upcycle.reporting.course import course_chart
from upcycle.reporting.page import Chart, Table, render, safe

IDLE = 2
"""After so many looks at a run that nobody works on, watching ends: one command of a stage may follow another."""


def watch(run: Path, seconds: int, out: Path) -> None:
    """Write the page again and again until the run is complete.

    Raises:
        UpcycleError: the folder is no run, or one that twice in a row nobody was working on.
    """
    if not is_run(run):
        raise UpcycleError(f"{run} is not a run: it has no {RECIPE.name}; start it first with `upcycle run`")
    say(f"{out} shows the progress of the run until it is complete; Ctrl-C stops watching, not the run")
    idle = 0
    while set((states := _states(run)).values()) != {"done"}:
        idle = 0 if is_worked_on(run) else idle + 1
        if idle == IDLE:
            write_text(out, _page(run, states))
            raise UpcycleError(
                f"no process works on {run} and it is not complete ({out} shows how far it is); continue with "
                f"`{again(run)}`"
            )
        write_text(out, _page(run, states, seconds))
        time.sleep(seconds)


def facts(run: Path) -> dict[str, Any]:
    """How far a run is, for scripts: whether a process works on it, and of each stage its state, cost and step.

    Raises:
        UpcycleError: the folder is no run.
    """
    if not is_run(run):
        raise UpcycleError(f"{run} is not a run: it has no {RECIPE.name}")
    states, costs = _states(run), read_costs(run)
    stages = {}
    for stage, state in states.items():
        trainer = _newest_trainer_state(partial_of(run / stage)) if state == "begun" else {}
        steps = {"step": trainer["global_step"], "steps": trainer["max_steps"]} if trainer else {}
        spent = costs[stage].model_dump(exclude_none=True) if stage in costs else {}
        stages[stage] = {"state": state, **spent, **steps}
    complete = set(states.values()) == {"done"}
    return {"run": str(run), "complete": complete, "worked_on": is_worked_on(run), "stages": stages}


def _states(run: Path) -> dict[str, str]:
    """`done`, `begun` or `pending` for each stage."""
    states = {}
    for stage in stage_names():
        began, done = partial_of(run / stage).exists(), read_manifest(run / stage) is not None
        states[stage] = "begun" if began else "done" if done else "pending"
    return states


def _page(run: Path, states: dict[str, str], seconds: int | None = None) -> str:
    current = next((stage for stage, state in states.items() if state == "begun"), None)
    trainer = _newest_trainer_state(partial_of(run / current)) if current else {}
    charts = [course_chart(run), _so_far(current, trainer) if current else None]
    done = [stage for stage, state in states.items() if state == "done"]
    costs = read_costs(run)
    rows = [[stage, state, f"{costs[stage].seconds:.0f}" if stage in costs else ""] for stage, state in states.items()]
    step = f", step {trainer['global_step']} of {trainer['max_steps']} at its last checkpoint" if trainer else ""
    again = f"and again every {seconds} seconds while this is watched" if seconds else "when no process worked on it"
    return render(
        "progress.html.j2",
        title=f"{run.resolve().name}: {len(done)} of {len(states)} stages are done",
        lead=f"{current} has begun{step}." if current else "No stage has begun and is unfinished.",
        noise=f"Written at {time.strftime('%H:%M:%S')}, {again}.",
        problems=(),
        cards=(),
        sections=(),
        **({"refresh": seconds} if seconds else {}),
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
