"""Recipes side by side: the same data, the same number of training tokens, several seeds, a paired test."""

import json
import math
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

COMPARISON = "comparison.json"
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
    variants = [Variant(text) for text in texts]
    cells: dict[str, list[dict[str, Any]]] = {text: [] for text in texts}
    folders: list[Path] = []
    for seed in range(seeds):
        for number, variant in enumerate(variants):
            run = variant.run(seed, out, number)
            say(f"compare: {variant.text}, seed {seed}: {run.folder}")
            run_stages(run, donors=folders)
            folders.append(run.folder)
            cells[variant.text].append(measure(run))
    problems = differences(cells)
    if problems and not force:
        raise UpcycleError(f"{'; '.join(problems)}; such a comparison says little (--force makes it all the same)")
    found = {"variants": cells, "summary": summary(cells), "not_comparable": problems}
    write_json(out / COMPARISON, found)
    show(found)
    return found


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
