"""Dense preparation and MoE post-training in one picture, over the training tokens of both."""

import math
from pathlib import Path

from upcycle.pipeline.stages import stage_names, training_tokens
from upcycle.records.files import CHECKPOINTS, LOG, PLAN, POSTTRAIN, PREPARE, SCORES
from upcycle.records.record import ALL
from upcycle.records.scores import BASE, MOE, MOE_INIT, Scores
from upcycle.records.training import TrainingRecord
from upcycle.reporting.charts import Point, axis, per_point, point_chart, thinned
from upcycle.reporting.dense import is_dense
from upcycle.reporting.page import Chart, safe

NAMES = {PREPARE: "dense preparation: training loss", POSTTRAIN: "MoE post-training: training loss"}
DENSE = "dense tuning: training loss"
HELD_OUT = "held-out loss"
Lines = dict[str, list[Point]]
"""By name."""


def course_chart(run: Path, dense: Path | None = None) -> Chart | None:
    """Loss over training tokens; None where nothing has been trained.

    Args:
        dense: a run that is dense tuning, to be drawn beside it.
    """
    lines, start = _lines(run), starts(run)
    if dense is not None:
        beside = _lines(dense)
        lines |= {DENSE: beside.get(DENSE, []), f"dense tuning: {HELD_OUT}": beside.get(HELD_OUT, [])[-1:]}
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None
    points = [point for line in lines.values() for point in line]
    ticks = [(x, count(x)) for x in axis(0, max(x for x, _, _ in points))[0]]
    upcycled = POSTTRAIN in start and not _is_dense(run)
    mark = (float(start[POSTTRAIN]), "upcycled here") if upcycled else None
    dotted = [name for name in lines if HELD_OUT in name]
    losses = [loss for _, loss, _ in points]
    logarithmic = axis(min(losses), max(losses))[1]
    steps = max(
        per_point(len(record.log)) for place in filter(None, (run, dense)) for record in _records(place).values()
    )
    svg = point_chart(list(lines.items()), ticks, dotted, mark)
    return Chart("Loss over training tokens", safe(svg), _caption(steps, bool(dotted), upcycled, logarithmic))


def starts(run: Path) -> dict[str, int]:
    """Training tokens that were seen before each stage that has trained."""
    found, seen = {}, 0
    for stage, tokens in training_tokens(run).items():
        found[stage] = seen
        seen += tokens
    return found


def count(number: float) -> str:
    """`350k`, `1.5M`"""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def _lines(run: Path) -> Lines:
    """Training loss of each stage, held-out loss of every model whose place is known, the Trainer's own evaluations."""
    lines: Lines = {}
    start, evaluated = starts(run), []
    records = _records(run)
    for stage, record in records.items():
        name = DENSE if _is_dense(run) else NAMES.get(stage, f"{stage}: training loss")
        losses = [entry.loss if entry.language_loss is None else entry.language_loss for entry in record.log]
        values = [(_at(record, n, start[stage]), loss, 0.0) for n, loss in enumerate(losses, 1)]
        lines.setdefault(name, []).extend(thinned(_drawable(values)))
        evaluated += [(_at(record, e.step, start[stage]), e.loss, 0.0) for e in record.evaluations or ()]
    if (scores := SCORES.known_of(run)) is not None and POSTTRAIN in records:
        lines[HELD_OUT] = _drawable(_held_out(run, scores, records, start[POSTTRAIN]))
    lines[f"{HELD_OUT}, as the Trainer evaluated it"] = _drawable(evaluated)
    return lines


def _records(run: Path) -> dict[str, TrainingRecord]:
    return {stage: record for stage in stage_names() if (record := LOG.known(run / stage)) is not None}


def _at(record: TrainingRecord, step: int, start: int) -> float:
    """Tokens seen after a step; steps are taken to be alike."""
    return start + record.tokens * step / max(1, len(record.log))


def _held_out(run: Path, scores: Scores, records: dict[str, TrainingRecord], upcycled: int) -> list[Point]:
    """Base, checkpoints of one training of ours, and the MoE at both ends of its own."""
    places = {BASE: 0.0}
    prepared = records.get(PREPARE)
    epochs = [entry.epoch for entry in prepared.log] if prepared else []
    if prepared and epochs == sorted(epochs):  # otherwise several trainings, one for each domain
        for checkpoint in CHECKPOINTS.read_of(run):
            places[checkpoint.name] = prepared.tokens * (checkpoint.epoch or 0.0) / epochs[-1]
    places |= {MOE_INIT: float(upcycled), MOE: upcycled + float(records[POSTTRAIN].tokens)}
    return [(x, scores[name].loss[ALL], 0.0) for name, x in places.items() if name in scores]


def _drawable(points: list[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _is_dense(run: Path) -> bool:
    plan = PLAN.known_of(run)
    return plan is not None and is_dense(plan)


def _caption(steps: int, dotted: bool, upcycled: bool, logarithmic: bool) -> str:
    return " ".join(
        [
            "From left to right: training tokens seen. Lower is better.",
            f"Lines without dots: loss of the training batches{f', averaged over up to {steps} steps' * (steps > 1)}.",
            *["Dots: loss on rows that no training saw."] * dotted,
            *["The dashed line is where the dense model became a mixture of experts."] * upcycled,
            *["The upright axis is logarithmic: equal steps are equal ratios."] * logarithmic,
        ]
    )
