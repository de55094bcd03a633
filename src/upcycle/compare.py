"""Recipes side by side: the same data, the same number of training tokens, several seeds, a paired test."""

import itertools
import json
import math
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.artifacts import write_json
from upcycle.console import say, table
from upcycle.errors import UpcycleError
from upcycle.pipeline import MOE, Run, run_stages
from upcycle.recipe import load_recipe

COMPARISON, SWEEP = "comparison.json", "sweep.json"
METRICS = {"loss": "{:.4f}", "exact_match": "{:.1%}"}


@dataclass(frozen=True)
class Variant:
    """A recipe with overrides, as it was written: `quickstart route.start=ridge`."""

    text: str

    def run(self, seed: int, out: Path, number: int) -> Run:
        recipe, *overrides = shlex.split(self.text)
        return Run(load_recipe(recipe, [*overrides, f"seed={seed}"]), out / f"{number}-seed{seed}")


def compare(texts: Sequence[str], seeds: int, out: Path, force: bool) -> dict[str, Any]:
    """Run every variant with every seed and write `comparison.json` and `comparison.png`; resumable.

    A stage that another cell has made from the same inputs is taken from there.

    Raises:
        UpcycleError: the variants saw other data or another number of training tokens, and `force` is not given.
    """
    cells = run_cells(texts, seeds, out)
    problems = differences(cells)
    if problems and not force:
        raise UpcycleError(f"{'; '.join(problems)}; such a comparison says little (--force makes it all the same)")
    found = {"variants": cells, "summary": summary(cells), "not_comparable": problems}
    write_json(out / COMPARISON, found)
    show(found)
    return found


def run_cells(texts: Sequence[str], seeds: int, out: Path) -> dict[str, list[dict[str, Any]]]:
    """Each variant's measures, a row per seed; a run folder per cell."""
    cells: dict[str, list[dict[str, Any]]] = {text: [] for text in texts}
    folders: list[Path] = []
    for seed in range(seeds):
        for number, text in enumerate(texts):
            run = Variant(text).run(seed, out, number)
            say(f"{text}, seed {seed}: {run.folder}")
            run_stages(run, donors=folders)
            folders.append(run.folder)
            cells[text].append(measure(run))
    return cells


def sweep(recipe: str, axes: Sequence[str], seeds: int, out: Path) -> dict[str, Any]:
    """Every combination of settings such as `expand.num_experts=4,8,16`, with every seed; write `sweep.json`.

    Unlike `compare` it changes what a run sees, so other numbers of training tokens are shown, not refused. Resumable.

    Raises:
        UpcycleError: an axis without values.
    """
    grid = [axis_values(axis) for axis in axes]
    points = list(itertools.product(*grid))
    texts = [" ".join([shlex.quote(recipe), *map(shlex.quote, point)]) for point in points]
    cells = run_cells(texts, seeds, out)
    rows = summary(cells)
    for row, point in zip(rows, points, strict=True):
        row["settings"] = dict(setting.split("=", 1) for setting in point)
    found = {"axes": [axis.partition("=")[0] for axis in axes], "variants": cells, "summary": rows}
    write_json(out / SWEEP, found)
    show_sweep(found, seeds)
    return found


def axis_values(axis: str) -> list[str]:
    """`a.b=1,2` to [`a.b=1`, `a.b=2`]; commas within brackets part nothing."""
    name, equals, values = axis.partition("=")
    parts = [value for value in re.split(r",(?![^\[]*\])", values) if value]
    if not equals or not parts:
        raise UpcycleError(f"'{axis}' is not of the form section.field=value,value,...")
    return [f"{name}={value}" for value in parts]


def measure(run: Run) -> dict[str, Any]:
    """The MoE's scores, by domain, and what the run spent."""
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    logs = {stage: run.folder / stage / "log.json" for stage in ("prepare", "posttrain")}
    tokens = {stage: json.loads(path.read_text())["tokens"] for stage, path in logs.items() if path.exists()}
    return {
        "seed": run.recipe.seed,
        "data": run.data_hash,
        "tokens": tokens,
        **{metric: scores[MOE][metric] for metric in METRICS if metric in scores[MOE]},
    }


def differences(cells: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What makes the variants not comparable: other data, or another number of training tokens for a seed."""
    problems = []
    for rows in zip(*cells.values(), strict=True):
        seed = rows[0]["seed"]
        if len({row["data"] for row in rows}) > 1:
            problems.append(f"seed {seed}: the variants saw other data")
        totals = {text: sum(row["tokens"].values()) for text, row in zip(cells, rows, strict=True)}
        if len(set(totals.values())) > 1:
            listed = ", ".join(f"{text}: {total:,}" for text, total in totals.items())
            problems.append(f"seed {seed}: other numbers of training tokens ({listed})")
    return problems


def summary(cells: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each variant; against the first one, paired by seed."""
    rows = []
    first = next(iter(cells.values()))
    for (text, runs), label in zip(cells.items(), labels(list(cells)), strict=True):
        row: dict[str, Any] = {"variant": text, "label": label, "tokens": sum(runs[0]["tokens"].values())}
        for metric in METRICS:
            if metric in runs[0]:
                values = [run[metric]["all"] for run in runs]
                row[metric] = {"mean": statistics.fmean(values), "std": spread(values)}
                row[metric] |= paired(values, [run[metric]["all"] for run in first]) if runs is not first else {}
        rows.append(row)
    return rows


def labels(texts: Sequence[str]) -> list[str]:
    """What tells each variant from the others: its words without those that all have."""
    words = [shlex.split(text) for text in texts]
    common = set.intersection(*map(set, words))
    return [" ".join(w for w in own if w not in common) or text for own, text in zip(words, texts, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1), nan for one seed."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def paired(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Mean difference to the reference with the same seeds, and the p-value of a paired t-test (two-sided)."""
    gaps = [a - b for a, b in zip(values, reference, strict=True)]
    if len(gaps) < 2 or len(set(gaps)) == 1:
        return {"difference": statistics.fmean(gaps), "p": math.nan}
    from scipy.stats import ttest_rel

    return {"difference": statistics.fmean(gaps), "p": float(ttest_rel(values, reference).pvalue)}


def show_sweep(found: dict[str, Any], seeds: int) -> None:
    """Settings, training tokens and scores of every point of a grid."""
    metrics = [metric for metric in METRICS if metric in found["summary"][0]]
    rows = [
        (
            *row["settings"].values(),
            f"{row['tokens']:,}",
            *(f"{METRICS[m].format(row[m]['mean'])} +- {METRICS[m].format(row[m]['std'])}" for m in metrics),
        )
        for row in found["summary"]
    ]
    heads = (*found["axes"], "training tokens", *(metric.replace("_", " ") for metric in metrics))
    table(f"sweep, {seeds} seeds: mean and standard deviation of the MoE", heads, rows)


def show(found: dict[str, Any]) -> None:
    """The table on the terminal."""
    rows = found["summary"]
    seeds = len(next(iter(found["variants"].values())))
    for metric, pattern in METRICS.items():
        if metric not in rows[0]:
            continue
        lines = []
        for row in rows:
            value = row[metric]
            against = (pattern.format(value["difference"]), f"{value['p']:.3f}") if "difference" in value else ("", "")
            lines.append((row["label"], pattern.format(value["mean"]), pattern.format(value["std"]), *against))
        title = f"{metric.replace('_', ' ')} of the MoE, {seeds} seeds, {rows[0]['tokens']:,} training tokens each"
        table(title, ("variant", "mean", "std", "against the first", "p (paired)"), lines)
    for problem in found["not_comparable"]:
        say(f"NOT COMPARABLE: {problem}")
