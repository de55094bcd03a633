"""`upcycle report`: one HTML file that stands alone and says what a run made, whether it helped, and what it cost."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upcycle.artifacts import ExpansionPlan, read_manifest
from upcycle.console import say
from upcycle.costs import read_costs
from upcycle.evaluation.benchmark import SHARE, read_scores, score_table
from upcycle.evaluation.evaluate import best_checkpoint
from upcycle.models.clients import CLIENTS, commands, limits
from upcycle.recipe import Recipe, dump_recipe
from upcycle.reporting.charts import bar_chart, line_chart
from upcycle.reporting.comparison import find_comparison, summarise
from upcycle.reporting.inspect import expert_line
from upcycle.reporting.page import Table, made_with, render, safe, table

STAGES = ("prepare", "expand", "assemble", "route", "posttrain", "evaluate")
COST_COLUMNS = {
    "seconds": ("seconds", ".0f"),
    "memory_gb": ("GB resident", ".2f"),
    "gpu_gb": ("GB on the GPU", ".2f"),
    "tokens": ("training tokens", ",.0f"),
    "steps": ("steps", ",.0f"),
    "written": ("MB written", ".0f"),
}
SECTIONS = (
    ("lineage", "Lineage"),
    ("scores", "Scores"),
    ("experts", "Experts"),
    ("training", "Training"),
    ("cost", "Cost"),
    ("use", "Use"),
    ("reproduce", "Reproduce"),
)


def write_report(run: Path, recipe: Recipe, samples: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Write the report of a finished run.

    Args:
        samples: texts with their routing, as `evaluation.tokens.routed_tokens` gives them.
    """
    asked = read_scores(run)
    page = render(
        "report.html.j2",
        title=f"{run.name}: {recipe.expand.num_experts} experts from {recipe.base}",
        sections=SECTIONS,
        recipe=dump_recipe(recipe),
        base=recipe.base,
        top_k=recipe.assemble.num_experts_per_tok,
        **_lineage(run),
        **_scores(run, asked),
        **_experts(run, asked.get("MoE", {}), samples),
        **_training(run),
        **_cost(run),
        **_use(run),
        comparison=_comparison(run),
    )
    out.write_text(page)
    say(f"report: {out}")


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _lineage(run: Path) -> dict[str, Any]:
    plan = ExpansionPlan.load(run / "expand" / "plan.json")
    return {"plan": plan, "tree": safe(_tree(plan)), "experts": [f"E{i} {e.name}" for i, e in enumerate(plan.experts)]}


def _tree(plan: ExpansionPlan) -> str:
    """Nested lists: each expert under the younger of its parents, as `upcycle inspect` prints it."""
    import html

    below: dict[int, list[int]] = {}
    for index, expert in enumerate(plan.experts):
        below.setdefault(max(expert.parents, default=-1), []).append(index)

    def items(parent: int) -> str:
        if parent not in below:
            return ""
        inner = (f"<li>{html.escape(expert_line(i, plan.experts[i]))}{items(i)}</li>" for i in below[parent])
        return f"<ul>{''.join(inner)}</ul>"

    return items(-1)


def _scores(run: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The lead sentence, a chart per figure, a table per figure by domain."""
    scores = _read(run / "evaluate" / "scores.json")
    losses = [(name, entry["loss"]["all"], 0.0) for name, entry in scores.items() if name != "base"]
    best = min(range(len(losses)), key=lambda i: losses[i][1])
    title = "Held-out loss (lower is better; the base is left out of the picture)"
    charts = [{"title": title, "svg": safe(bar_chart(losses, "{:.3f}", best))}]
    tables = [_by_domain("Held-out loss", scores, "loss", "{:.3f}", min)]
    note = "Loss: mean over rows of the mean token loss of the answer."
    if all(entry.get("exact_match") for entry in scores.values()):
        rows = next(iter(scores.values()))["exact_match_rows"]
        bars = [
            (name, e["exact_match"]["all"], standard_error(e["exact_match"]["all"], rows)) for name, e in scores.items()
        ]
        best = max(range(len(bars)), key=lambda i: bars[i][1])
        charts.append({"title": "Exact match", "svg": safe(bar_chart(bars, "{:.1%}", best))})
        tables.append(_by_domain("Exact match", scores, "exact_match", "{:.1%}", max))
        note += f" Exact match: greedy answers to {rows} rows, ± one standard error."
    benchmarks = table("Benchmarks (± one standard error; * the best)", *score_table(asked, "±")) if asked else None
    return {
        "lead": _lead(scores),
        "charts": charts,
        "score_tables": tables,
        "score_note": note,
        "benchmarks": benchmarks,
    }


def standard_error(share: float, rows: int) -> float:
    """Of a share of that many rows."""
    return math.sqrt(share * (1 - share) / rows) if rows else 0.0


def _lead(scores: Mapping[str, Any]) -> str:
    """Did it help, in one sentence; what the sentence cannot say is that the MoE has seen more tokens."""
    moe = scores["MoE"]["loss"]["all"]
    start = f"The mixture of experts has a held-out loss of {moe:.3f}"
    name = best_checkpoint(dict(scores))
    if name is None:
        return f"{start}; the base had {scores['base']['loss']['all']:.3f}."
    best = scores[name]["loss"]["all"]
    verdict = "below" if moe < best else "not below"
    return (
        f"{start}, {verdict} that of its best checkpoint ({name}, {best:.3f}), which has seen fewer training "
        "tokens; for a fair comparison see `upcycle compare`."
    )


def _by_domain(title: str, scores: Mapping[str, Any], metric: str, pattern: str, choose: Any) -> Table:
    domains = list(next(iter(scores.values()))[metric])
    values = [entry[metric]["all"] for entry in scores.values()]
    rows = [[name, *(pattern.format(e[metric][d]) for d in domains)] for name, e in scores.items()]
    best = [place for place, value in enumerate(values) if value == choose(values)]
    return table(title, ["model", *domains], rows, best)


def _comparison(run: Path) -> dict[str, Any] | None:
    """Of a run that is a cell of a comparison: how all variants fare."""
    path = find_comparison(run.resolve().parent)
    return summarise(_read(path)) if path else None


def _experts(run: Path, asked: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shares = _read(run / "evaluate" / "scores.json")["MoE"]["expert_share"]
    shares |= {f"{task} (benchmark)": figures[SHARE] for task, figures in asked.items() if SHARE in figures}
    plan = ExpansionPlan.load(run / "expand" / "plan.json")
    names = [f"E{i} {expert.name}" for i, expert in enumerate(plan.experts)]
    rounded = {d: [[round(s, 4) for s in layer] for layer in layers] for d, layers in shares.items()}
    text = json.dumps({"experts": names, "shares": rounded, "samples": list(samples)})
    # within a script element only `<` could end it
    return {"layers": len(next(iter(shares.values()))), "data": safe(text.replace("<", "\\u003c"))}


def _training(run: Path) -> dict[str, Any]:
    curves = []
    for stage, title in (("prepare", "Dense model: loss"), ("posttrain", "Mixture of experts: loss")):
        log = run / stage / "log.json"
        if log.is_file():
            losses = [entry["loss"] for entry in _read(log)["log"]]
            curves.append({"title": title, "svg": safe(line_chart([("training loss", losses)], "step"))})
    log = _read(run / "posttrain" / "log.json")["log"]
    balance = [
        (name.replace("_", " "), [entry[name] for entry in log]) for name in ("max_load", "min_load", "balance_loss")
    ]
    curves.append({"title": "Load of the experts (1: even)", "svg": safe(line_chart(balance, "step"))})
    report = _read(run / "route" / "report.json")
    domains = sorted({domain for bucket in report["buckets"] for domain in bucket["domains"]})
    rows = [
        [
            f"E{b['expert']} {b['name']}",
            b["samples"],
            *(b["domains"].get(d, 0) for d in domains),
            f"{b['mean_loss']:.3f}",
        ]
        for b in report["buckets"]
    ]
    return {"curves": curves, "buckets": table("seed samples", ["expert", "samples", *domains, "loss on all"], rows)}


def _use(run: Path) -> dict[str, Any]:
    """The commands that serve the result and talk to it, and which of the programs compute something else."""
    config = run / "posttrain" / "config.json"
    compact = not config.is_file()
    export = f"upcycle export {shlex.quote(str(run))} {'--fold ' * compact}--to FOLDER"
    found = [] if compact else limits(_read(config))
    return {
        "use": f"{export}\n{commands('FOLDER')}",
        "warnings": [f"{CLIENTS[limit.client]} and this {limit.moe}: {limit.what}." for limit in found],
    }


def _cost(run: Path) -> dict[str, Any]:
    """A row per stage, with the columns of which something is known; hashes and versions."""
    costs, manifests = read_costs(run), {stage: read_manifest(run / stage) for stage in STAGES}
    made = {stage: manifest for stage, manifest in manifests.items() if manifest}
    known = {}
    for stage, manifest in made.items():
        log = run / stage / "log.json"
        written = sum(entry["bytes"] for entry in manifest.files.values()) / 1e6
        known[stage] = {**costs.get(stage, {}), **(_read(log) if log.is_file() else {}), "written": written}
    columns = {key: column for key, column in COST_COLUMNS.items() if any(key in cost for cost in known.values())}
    rows = [
        [stage, *(format(cost[key], form) if key in cost else "" for key, (_, form) in columns.items())]
        for stage, cost in known.items()
    ]
    return {
        "costs": table("cost", ["stage", *(head for head, _ in columns.values())], rows),
        "hashes": "\n".join(f"{stage:10} {manifest.content}" for stage, manifest in made.items()),
        "versions": made_with(made["posttrain"].versions),
    }
