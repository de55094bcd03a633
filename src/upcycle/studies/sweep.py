"""A grid of settings: score against data size, experts, anything."""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path

from upcycle.console import table
from upcycle.distributed.world import is_main
from upcycle.errors import UpcycleError, counted
from upcycle.records.comparison import METRICS, Sweep
from upcycle.records.files import SWEEP
from upcycle.studies.cells import Study, labels, run_cells
from upcycle.studies.statistics import std_text, summary


def sweep(recipe: str, axes: Sequence[str], seeds: int, out: Path, keep_models: bool = True) -> Sweep:
    """Every combination of settings such as `expand.num_experts=4,8,16`, with every seed; write `sweep.json`.

    Unlike `compare` it changes what a run sees, so different numbers of training tokens are shown, not refused.
    Resumable.

    Raises:
        UpcycleError: an axis without values, or a setting with two axes.
    """
    names = [axis.partition("=")[0] for axis in axes]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UpcycleError(f"{twice} is there twice; give all its values at once: {twice}=VALUE,VALUE")
    points = list(itertools.product(*(axis_values(axis) for axis in axes)))
    texts = [" ".join([shlex.quote(recipe), *map(shlex.quote, point)]) for point in points]
    cells = run_cells(Study(texts, range(seeds), out, keep_models=keep_models))
    settings = [dict(setting.split("=", 1) for setting in point) for point in points]
    rows = summary(cells, labels(texts), settings)
    found = Sweep(variants=cells, summary=rows, recipe=recipe, grid=list(axes), axes=names)
    if is_main():
        SWEEP.write(out, found)
    show_sweep(found)
    return found


def axis_values(axis: str) -> list[str]:
    """`a.b=1,2` to [`a.b=1`, `a.b=2`]; commas within brackets or braces part nothing."""
    name, equals, values = axis.partition("=")
    depth, parts = 0, [""]
    for character in values:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if not equals or not any(parts):
        raise UpcycleError(f"'{axis}' is not of the form section.field=value,value,...")
    return [f"{name}={value}" for value in parts if value]


def show_sweep(found: Sweep) -> None:
    """Settings, training tokens and scores of every point of a grid."""
    rows = []
    for row in found.summary:
        scores = ((METRICS[m], row.metric(m)) for m in found.metrics)
        cells = (" +- ".join(filter(None, (p.format(v.mean), std_text(p, v)))) for p, v in scores)
        rows.append((*(row.settings or {}).values(), f"{row.tokens:,}", *cells))
    heads = (*found.axes, "training tokens", *(metric.replace("_", " ") for metric in found.metrics))
    what = "mean and standard deviation of the MoE" if found.seeds > 1 else "the MoE"
    table(f"sweep, {counted(found.seeds, 'seed')}: {what}", heads, rows)
