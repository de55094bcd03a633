"""Recipes side by side: the same data, the same number of training tokens, several seeds, a paired test."""

import itertools
import json
import math
import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from upcycle.artifacts import digest, write_json
from upcycle.console import say, table
from upcycle.errors import UpcycleError
from upcycle.pipeline import STAGE_NAMES, run_stages
from upcycle.recipe import dump_recipe, load_recipe
from upcycle.run import DELETED, MOE, Run

COMPARISON, SWEEP = "comparison.json", "sweep.json"
MEASURES = "measures.json"
METRICS = {"loss": "{:.4f}", "exact_match": "{:.1%}", "benchmark": "{:.1%}"}
Measures = dict[str, Any]
"""Of a cell: its seed, the hash of its data, training tokens by stage, and a metric's name to values by domain."""


@dataclass(frozen=True)
class Variant:
    """A recipe with overrides, as written: `quickstart route.start=ridge`, or with a name before it: `ridge: ...`."""

    text: str

    @property
    def name(self) -> str | None:
        return self._parts()[0]

    @property
    def words(self) -> list[str]:
        """
        Raises:
            UpcycleError: no recipe, or an open quote.
        """
        try:
            words = shlex.split(self._parts()[1])
        except ValueError as error:
            raise UpcycleError(f"variant '{self.text}': {error}") from None
        if not words:
            raise UpcycleError(f"variant '{self.text}' names no recipe")
        return words

    def _parts(self) -> tuple[str | None, str]:
        named = re.fullmatch(r"([^:=]+):\s(.+)", self.text, re.DOTALL)
        return (named[1], named[2]) if named else (None, self.text)

    def run(self, seed: int, out: Path, number: int) -> Run:
        recipe, *overrides = self.words
        return Run(load_recipe(recipe, [*overrides, f"seed={seed}"]), out / f"{number}-seed{seed}")


def compare(
    texts: Sequence[str],
    seeds: int,
    out: Path,
    force: bool,
    keep_models: bool = True,
    more: Callable[[Run], Measures] | None = None,
) -> dict[str, Any]:
    """Run every variant with every seed and write `comparison.json`; resumable.

    A stage that another cell has made from the same inputs is taken from there.

    Args:
        keep_models: without, the weights of a seed's runs are deleted once all of them are measured.
        more: further measures of a finished run, such as its mean over benchmarks.

    Raises:
        UpcycleError: the variants saw other data or another number of training tokens, and `force` is not given.
    """
    cells = run_cells(texts, seeds, out, keep_models, more, refuse=not force)
    found = {"variants": cells, "summary": summary(cells), "not_comparable": differences(cells)}
    write_json(out / COMPARISON, found)
    show(found)
    return found


def run_cells(
    texts: Sequence[str],
    seeds: int,
    out: Path,
    keep_models: bool = True,
    more: Callable[[Run], Measures] | None = None,
    refuse: bool = False,
) -> dict[str, list[Measures]]:
    """Each variant's measures, a row per seed; a run folder per cell.

    Args:
        refuse: whether to stop after the first seed of which the variants are not comparable.

    Raises:
        UpcycleError: two variants are the same, or have the same name; or what `refuse` asks for.
    """
    if twice := [text for text in (*texts, *_names(texts)) if [*texts, *_names(texts)].count(text) > 1]:
        raise UpcycleError(f"there are two variants '{twice[0]}'")
    cells: dict[str, list[Measures]] = {text: [] for text in texts}
    donors: list[Path] = []
    for seed in range(seeds):
        runs = [Variant(text).run(seed, out, number) for number, text in enumerate(texts)]
        for run, text in zip(runs, texts, strict=True):
            say(f"{text}, seed {seed}: {run.folder}")
            deleted = (run.folder / DELETED).exists()
            if deleted and keep_models:
                raise UpcycleError(
                    f"the models of {run.folder} were deleted; go on with --no-keep-models, or elsewhere"
                )
            measures = _known(run) if deleted else None
            if measures is None:
                run_stages(run, donors=donors)
                donors.append(run.folder)
                measures = measure(run) | (more(run) if more else {})
                write_json(run.folder / MEASURES, {"recipe": digest(dump_recipe(run.recipe)), **measures})
            cells[text].append(measures)
        if refuse and (problems := differences(cells)):
            raise UpcycleError(f"{'; '.join(problems)}; such a comparison says little (--force makes it all the same)")
        if not keep_models:
            donors = []
            for run in runs:
                _delete_weights(run.folder)
    return cells


def _known(run: Run) -> Measures:
    """What was measured, if it was of the same recipe and data.

    Raises:
        UpcycleError: the folder had another recipe or other data, of which the models are gone.
    """
    found: Measures = json.loads((run.folder / MEASURES).read_text())
    if found.pop("recipe") != digest(dump_recipe(run.recipe)) or found["data"] != run.data_hash:
        raise UpcycleError(f"{run.folder} was made by another recipe or from other data; take another --out")
    return found


def _names(texts: Sequence[str]) -> list[str]:
    return [name for text in texts if (name := Variant(text).name)]


def _delete_weights(folder: Path) -> None:
    (folder / DELETED).touch()
    for stage in STAGE_NAMES:
        for path in (folder / stage).rglob("*.safetensors"):
            path.unlink()


def sweep(recipe: str, axes: Sequence[str], seeds: int, out: Path, keep_models: bool = True) -> dict[str, Any]:
    """Every combination of settings such as `expand.num_experts=4,8,16`, with every seed; write `sweep.json`.

    Unlike `compare` it changes what a run sees, so other numbers of training tokens are shown, not refused. Resumable.

    Raises:
        UpcycleError: an axis without values.
    """
    grid = [axis_values(axis) for axis in axes]
    points = list(itertools.product(*grid))
    texts = [" ".join([shlex.quote(recipe), *map(shlex.quote, point)]) for point in points]
    cells = run_cells(texts, seeds, out, keep_models)
    rows = summary(cells)
    for row, point in zip(rows, points, strict=True):
        row["settings"] = dict(setting.split("=", 1) for setting in point)
    names = [axis.partition("=")[0] for axis in axes]
    found = {"recipe": recipe, "grid": list(axes), "axes": names, "variants": cells, "summary": rows}
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


def measure(run: Run) -> Measures:
    """The MoE's scores, by domain, and what the run spent; beside them the base's and the checkpoints'."""
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    logs = {stage: run.folder / stage / "log.json" for stage in ("prepare", "posttrain")}
    tokens = {stage: json.loads(path.read_text())["tokens"] for stage, path in logs.items() if path.exists()}
    return {
        "seed": run.recipe.seed,
        "data": run.data_hash,
        "tokens": tokens,
        **_scores(scores[MOE]),
        "dense": {name: _scores(entry) for name, entry in scores.items() if "expert_share" not in entry},
    }


def _scores(entry: dict[str, Any]) -> Measures:
    return {metric: entry[metric] for metric in METRICS if entry.get(metric)}  # no short answers: none


def differences(cells: dict[str, list[Measures]]) -> list[str]:
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


def summary(cells: dict[str, list[Measures]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each variant, for what all have; against the first, paired by seed."""
    rows = []
    first = next(iter(cells.values()))
    metrics = [m for m in METRICS if all(m in run for runs in cells.values() for run in runs)]
    for (text, runs), label in zip(cells.items(), labels(list(cells)), strict=True):
        row: dict[str, Any] = {"variant": text, "label": label, "tokens": sum(runs[0]["tokens"].values())}
        for metric in metrics:
            values = [run[metric]["all"] for run in runs]
            row[metric] = {"mean": statistics.fmean(values), "std": spread(values)}
            row[metric] |= paired(values, [run[metric]["all"] for run in first]) if runs is not first else {}
        rows.append(row)
    return rows


def labels(texts: Sequence[str]) -> list[str]:
    """The name of each variant; or what tells it from the others: its words without those that all have."""
    variants = [Variant(text) for text in texts]
    common = set.intersection(*(set(variant.words) for variant in variants))
    return [v.name or " ".join(word for word in v.words if word not in common) or v.text for v in variants]


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds (n - 1), nan for one seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan  # nan too if a run diverged


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
        tokens = " or ".join(f"{count:,}" for count in sorted({row["tokens"] for row in rows}))
        title = f"{metric.replace('_', ' ')} of the MoE, {seeds} seeds, {tokens} training tokens each"
        table(title, ("variant", "mean", "std", "against the first", "p (paired)"), lines)
    for problem in found["not_comparable"]:
        say(f"NOT COMPARABLE: {problem}")
