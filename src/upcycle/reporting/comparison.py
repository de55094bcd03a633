"""`upcycle report` of a comparison or a sweep: which variant is better, by how much, and whether that is noise."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from upcycle.artifacts import read_manifest
from upcycle.compare import COMPARISON, METRICS, SWEEP, spread
from upcycle.console import say
from upcycle.costs import read_costs
from upcycle.reporting.charts import bar_chart, point_chart, with_error
from upcycle.reporting.page import Table, made_with, render, safe, table

SECTIONS = (("scores", "Scores"), ("detail", "Detail"), ("cost", "Cost"), ("reproduce", "Reproduce"))
TITLES = {"loss": "Held-out loss (lower is better)", "exact_match": "Exact match", "benchmark": "Mean over benchmarks"}
Found = Mapping[str, Any]
"""What `compare` and `sweep` write."""


def find_comparison(folder: Path) -> Path | None:
    """The comparison.json or sweep.json of a folder."""
    return next((folder / name for name in (COMPARISON, SWEEP) if (folder / name).is_file()), None)


def write_comparison_report(folder: Path, out: Path) -> None:
    """Write the report of a comparison or sweep as one HTML file."""
    path = find_comparison(folder)
    assert path is not None
    found = json.loads(path.read_text())
    rows, runs = found["summary"], list(found["variants"].values())
    page = render(
        "comparison.html.j2",
        title=f"{folder.resolve().name}: {len(rows)} variants, {_seeds(len(runs[0]))}",
        sections=SECTIONS,
        tables=[_against_first(rows, metric, len(runs[0])) for metric in _metrics(found)],
        details=_details(found),
        costs=_costs(folder, rows, runs),
        command=_command(found),
        versions=_versions(folder),
        data_hashes=", ".join(sorted({run["data"][:12] for group in runs for run in group})),
        **summarise(found),
    )
    out.write_text(page)
    say(f"report: {out}")


def summarise(found: Found) -> dict[str, Any]:
    """The lead sentence, why the variants are not comparable if they are not, a chart per metric."""
    draw = _lines if "axes" in found else _bars
    seeds = len(next(iter(found["variants"].values())))
    fair = "axes" not in found and not found["not_comparable"]
    return {
        "heading": "At equal training tokens" if fair else "Beside the other runs of the same folder",
        "lead": _lead(found, seeds),
        "problems": found.get("not_comparable", []),
        "charts": [{"title": TITLES[metric], "svg": safe(draw(found, metric))} for metric in _metrics(found)],
        "note": f"Of the MoE; mean ± standard deviation over {_seeds(seeds)}.",
    }


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count > 1)}"


def _metrics(found: Found) -> list[str]:
    return [metric for metric in METRICS if metric in found["summary"][0]]


def _lead(found: Found, seeds: int) -> str:
    """The best variant by loss, and whether it is better than the first one by more than noise."""
    rows = found["summary"]
    finite = [row for row in rows if math.isfinite(row["loss"]["mean"])]
    if not finite:
        return "No variant has a finite held-out loss: all of them diverged in some seed."
    best = min(finite, key=lambda row: row["loss"]["mean"])
    loss = best["loss"]
    text = f"The lowest held-out loss, {_plus_minus(loss, METRICS['loss'])}, is that of “{best['label']}”"
    if "axes" in found:
        return f"{text}. Points of a sweep may differ in training tokens."
    if best is rows[0]:
        return f"{text}, the first one, with which the others are compared."
    if math.isnan(loss["p"]):
        why = "One seed says nothing about noise." if seeds == 1 else "No paired test could be made."
        return f"{text}: {loss['difference']:+.4f} against {rows[0]['label']}. {why}"
    verdict = "more than noise" if loss["p"] < 0.05 / (len(rows) - 1) else "not more than noise"
    return (
        f"{text}: {loss['difference']:+.4f} against {rows[0]['label']} (p {loss['p']:.3f}, paired by seed; with "
        f"{len(rows) - 1} such tests that is {verdict}, after Bonferroni), {_seeds(seeds)}."
    )


def _plus_minus(value: Mapping[str, float], pattern: str) -> str:
    return with_error(pattern, value["mean"], _error(value))


def _error(value: Mapping[str, float]) -> float:
    """Standard deviation over seeds; 0, which is not drawn, for one seed."""
    return 0.0 if math.isnan(value["std"]) else value["std"]


def _best(rows: Sequence[Found], metric: str) -> int:
    """Place of the best row; a variant that diverged is none."""
    sign = 1 if metric == "loss" else -1
    return min(range(len(rows)), key=lambda i: (math.isnan(rows[i][metric]["mean"]), sign * rows[i][metric]["mean"]))


def _bars(found: Found, metric: str) -> str:
    """Bars of the variants that did not diverge."""
    rows = [row for row in found["summary"] if math.isfinite(row[metric]["mean"])]
    if not rows:
        return ""
    bars = [(row["label"], row[metric]["mean"], _error(row[metric])) for row in rows]
    return bar_chart(bars, METRICS[metric], _best(rows, metric))


def _lines(found: Found, metric: str) -> str:
    """Scores along the first axis, a line for each combination of the others."""
    first, *others = found["axes"]
    names = list(dict.fromkeys(row["settings"][first] for row in found["summary"]))
    places = _places(names)
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in (row for row in found["summary"] if math.isfinite(row[metric]["mean"])):
        label = ", ".join(f"{name}={row['settings'][name]}" for name in others) or first
        point = (places[row["settings"][first]], row[metric]["mean"], _error(row[metric]))
        lines.setdefault(label, []).append(point)
    ticks = [(place, name) for name, place in places.items()]
    return point_chart(list(lines.items()), ticks) if lines else ""


def _places(names: Sequence[str]) -> dict[str, float]:
    """Values of a setting on an axis: where they lie as numbers, or one after the other."""
    try:
        return {name: float(name) for name in names}
    except ValueError:
        return {name: float(i) for i, name in enumerate(names)}


def _against_first(rows: Sequence[Found], metric: str, seeds: int) -> Table:
    pattern, first = METRICS[metric], rows[0]["label"]
    lines = []
    for row in rows:
        value = row[metric]
        paired = [_signed(pattern, value["difference"]), _p_value(value["p"])] if "difference" in value else ["", ""]
        error = pattern.format(value["std"]) if _error(value) else ""
        lines.append([row["label"], pattern.format(value["mean"]), error, *paired])
    heads = ["variant", "mean", f"std ({_seeds(seeds)})", f"against {first}", "p (paired t-test)"]
    return table(TITLES[metric], heads, lines, [_best(rows, metric)])


def _signed(pattern: str, value: float) -> str:
    return ("+" if value > 0 else "") + pattern.format(value)


def _p_value(p: float) -> str:
    """None if there is one seed, or no difference in any."""
    return "" if math.isnan(p) else f"{p:.3f}"


def _details(found: Found) -> list[Table]:
    """By seed, by domain, and the dense models that each variant came from."""
    labels, groups = [row["label"] for row in found["summary"]], list(found["variants"].values())
    tables = []
    for metric in _metrics(found):
        pattern, name = METRICS[metric], TITLES[metric]
        rows = [[pattern.format(run[metric]["all"]) for run in group] for group in groups]
        tables.append(_labelled(f"{name}, by seed", labels, [f"seed {run['seed']}" for run in groups[0]], rows))
        domains = list(dict.fromkeys(domain for run in groups[0] for domain in run[metric]))
        rows = [[_over_seeds([run[metric].get(d) for run in group], pattern) for d in domains] for group in groups]
        tables.append(_labelled(f"{name}, by domain", labels, domains, rows))
    if all("dense" in run for group in groups for run in group):
        tables.append(_labelled(*_dense(groups, labels)))
    return tables


def _labelled(title: str, labels: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return table(title, ["variant", *heads], [[label, *row] for label, row in zip(labels, rows, strict=True)])


def _over_seeds(values: Sequence[float | None], pattern: str) -> str:
    """A seed whose rows lack a domain has no value for it."""
    known = [value for value in values if value is not None]
    return _plus_minus({"mean": fmean(known), "std": spread(known)}, pattern) if known else ""


def _dense(
    groups: Sequence[Sequence[Found]], labels: Sequence[str]
) -> tuple[str, Sequence[str], list[str], list[list[str]]]:
    """Loss of the base and of the best checkpoint, beside the MoE's."""
    rows = []
    for group in groups:
        best = [min(entry["loss"]["all"] for entry in run["dense"].values()) for run in group]
        columns = [[run["dense"]["base"]["loss"]["all"] for run in group], best, [run["loss"]["all"] for run in group]]
        rows.append([_over_seeds(values, METRICS["loss"]) for values in columns])
    title = "Held-out loss of the dense models on the way, which saw fewer training tokens"
    return title, labels, ["base", "best of base and checkpoints", "MoE"], rows


def _costs(folder: Path, rows: Sequence[Found], groups: Sequence[Sequence[Found]]) -> Table:
    """Training tokens by stage; seconds and memory where a run made its stages itself."""
    lines = []
    for number, (row, group) in enumerate(zip(rows, groups, strict=True)):
        tokens = [fmean(run["tokens"].get(stage, 0) for run in group) for stage in ("prepare", "posttrain")]
        costs = [read_costs(folder / f"{number}-seed{run['seed']}").values() for run in group]
        seconds = fmean(sum(cost["seconds"] for cost in cell) for cell in costs)
        memory = max((cost["memory_gb"] for cell in costs for cost in cell), default=0.0)
        lines.append([row["label"], *(f"{n:,.0f}" for n in tokens), f"{seconds:,.0f}", f"{memory:.2f}"])
    return table("cost", ["variant", "tokens, dense", "tokens, MoE", "seconds", "most GB resident"], lines)


def _command(found: Found) -> str:
    seeds = len(next(iter(found["variants"].values())))
    words = ["sweep", found["recipe"], *found["grid"]] if "axes" in found else ["compare", *found["variants"]]
    return " \\\n  ".join(
        ["upcycle " + shlex.quote(words[0]), *map(shlex.quote, words[1:]), f"--seeds {seeds} --out FOLDER"]
    )


def _versions(folder: Path) -> str:
    """Of the first run; nothing if its folder is gone."""
    manifest = read_manifest(folder / "0-seed0" / "posttrain")
    return made_with(manifest.versions) if manifest else ""
