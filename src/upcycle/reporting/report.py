"""`upcycle report`: a standalone HTML file that says what a run made, whether it helped, and what it cost."""

import html
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from upcycle.architectures.clients import commands
from upcycle.console import tell
from upcycle.disk import write_text
from upcycle.pipeline.benchmarks import read_scores
from upcycle.pipeline.costs import read_costs
from upcycle.pipeline.manifest import read_manifest
from upcycle.pipeline.stages import stage_names
from upcycle.recipe import Recipe, dump_recipe
from upcycle.records.benchmark import BenchmarkScores, score_table
from upcycle.records.cost import Cost
from upcycle.records.description import Description, RoutedText
from upcycle.records.files import LOG, PLAN, POSTTRAIN, ROUTE_REPORT, SCORES
from upcycle.records.manifest import Manifest
from upcycle.records.plan import ExpansionPlan
from upcycle.records.record import ALL, ByDomain, Shares
from upcycle.records.scores import BASE, MOE, Scores, best_checkpoint, standard_error
from upcycle.records.training import TrainingRecord
from upcycle.reporting.charts import bar_chart, line_chart
from upcycle.reporting.comparison import find_comparison, summarise
from upcycle.reporting.page import Chart, Table, made_with, render, safe

SECTIONS = (
    ("lineage", "Lineage"),
    ("scores", "Scores"),
    ("experts", "Experts"),
    ("training", "Training"),
    ("cost", "Cost"),
    ("use", "Use"),
    ("reproduce", "Reproduce"),
)
Values = dict[str, object]
"""What a template is filled with."""


def write_report(run: Path, recipe: Recipe, made: Description, texts: Sequence[RoutedText], out: Path) -> None:
    """Write the report of a finished run.

    Args:
        made: what the run made.
        texts: samples with their routing.
    """
    plan, scores, asked = PLAN.read_of(run), SCORES.read_of(run), read_scores(run)
    comparison = find_comparison(run.resolve().parent)  # of a run that is a cell of one
    page = render(
        "report.html.j2",
        title=f"{run.name}: {recipe.expand.num_experts} experts from {recipe.base}",
        sections=SECTIONS,
        recipe=dump_recipe(recipe),
        base=recipe.base,
        top_k=recipe.assemble.num_experts_per_tok,
        plan=plan,
        tree=safe(_tree(plan)),
        experts=plan.labels,
        **_scores(scores, asked),
        **_experts(plan, scores, asked, texts),
        **_training(run),
        **_cost(run),
        use=_use(run, made),
        warnings=made.warnings,
        comparison=summarise(comparison) if comparison else None,
    )
    write_text(out, page)
    tell(f"report: {out}")


def _tree(plan: ExpansionPlan) -> str:
    """Nested lists: each expert under the younger of its parents, as `upcycle inspect` prints it."""
    below: dict[int, list[int]] = {}
    for index, expert in enumerate(plan.experts):
        below.setdefault(max(expert.parents, default=-1), []).append(index)
    lines = [html.escape(line) for line in plan.lines]

    def items(parent: int) -> str:
        inner = "".join(f"<li>{lines[i]}{items(i)}</li>" for i in below.get(parent, ()))
        return f"<ul>{inner}</ul>" if inner else ""

    return items(-1)


def _scores(scores: Scores, asked: BenchmarkScores) -> Values:
    """The lead sentence, a chart per figure, a table per figure by domain."""
    losses = {name: entry.loss for name, entry in scores.items()}
    charts, tables = [_loss_chart(losses)], [_by_domain("Held-out loss", losses, "{:.3f}", min)]
    note = "Loss: mean over rows of the mean token loss of the answer."
    matches = {name: entry.exact_match for name, entry in scores.items() if entry.exact_match}
    rows = scores[MOE].exact_match_rows
    if rows and len(matches) == len(scores):
        charts.append(_match_chart(matches, rows))
        tables.append(_by_domain("Exact match", matches, "{:.1%}", max))
        note += f" Exact match: greedy answers to {rows} rows, ± one standard error."
    benchmarks = Table("Benchmarks (± one standard error; * the best)", *score_table(asked, "±")) if asked else None
    return {
        "lead": _lead(scores),
        "charts": charts,
        "score_tables": tables,
        "score_note": note,
        "benchmarks": benchmarks,
    }


def _loss_chart(losses: Mapping[str, ByDomain]) -> Chart:
    bars = [(name, values[ALL], 0.0) for name, values in losses.items() if name != BASE]
    best = min(range(len(bars)), key=lambda i: bars[i][1])
    title = "Held-out loss (lower is better; the base is left out of the picture)"
    return Chart(title, safe(bar_chart(bars, "{:.3f}", best)))


def _match_chart(matches: Mapping[str, ByDomain], rows: int) -> Chart:
    bars = [(name, values[ALL], standard_error(values[ALL], rows)) for name, values in matches.items()]
    best = max(range(len(bars)), key=lambda i: bars[i][1])
    return Chart("Exact match", safe(bar_chart(bars, "{:.1%}", best)))


def _lead(scores: Scores) -> str:
    """Did it help, in one sentence; what the sentence cannot say is that the MoE has seen more tokens."""
    moe = scores[MOE].loss[ALL]
    start = f"The mixture of experts has a held-out loss of {moe:.3f}"
    name = best_checkpoint(scores)
    if name is None:
        return f"{start}; the base had {scores[BASE].loss[ALL]:.3f}."
    best = scores[name].loss[ALL]
    verdict = "below" if moe < best else "not below"
    return (
        f"{start}, {verdict} that of its best checkpoint ({name}, {best:.3f}), which has seen fewer training "
        "tokens; for a fair comparison see `upcycle compare`."
    )


def _by_domain(
    title: str, measured: Mapping[str, ByDomain], pattern: str, choose: Callable[[Sequence[float]], float]
) -> Table:
    domains = list(next(iter(measured.values())))
    values = [by_domain[ALL] for by_domain in measured.values()]
    rows = [[name, *(pattern.format(by_domain[d]) for d in domains)] for name, by_domain in measured.items()]
    best = [place for place, value in enumerate(values) if value == choose(values)]
    return Table(title, ["model", *domains], rows, best)


def _experts(plan: ExpansionPlan, scores: Scores, asked: BenchmarkScores, texts: Sequence[RoutedText]) -> Values:
    """Who reads what, as data for the page's script."""
    shares: dict[str, Shares] = dict(scores[MOE].expert_share or {})
    for task, found in asked.get(MOE, {}).items():
        if found.expert_share is not None:
            shares[f"{task} (benchmark)"] = found.expert_share
    rounded = {d: [[round(s, 4) for s in layer] for layer in layers] for d, layers in shares.items()}
    text = json.dumps({"experts": plan.labels, "shares": rounded, "samples": [asdict(text) for text in texts]})
    # within a script element only `<` could end it
    return {"layers": len(next(iter(shares.values()))), "data": safe(text.replace("<", "\\u003c"))}


def _training(run: Path) -> Values:
    """Loss of every training, load of the experts, the seed samples of each."""
    records = {stage: record for stage in stage_names() if (record := LOG.known(run / stage)) is not None}
    curves = [
        Chart(f"{stage}: training loss", safe(line_chart([("training loss", [e.loss for e in record.log])], "step")))
        for stage, record in records.items()
    ]
    curves.append(_load_chart(records[POSTTRAIN]))
    buckets = ROUTE_REPORT.read_of(run).buckets
    domains = sorted({domain for bucket in buckets for domain in bucket.domains})
    rows = [
        [f"E{b.expert} {b.name}", b.samples, *(b.domains.get(d, 0) for d in domains), f"{b.mean_loss:.3f}"]
        for b in buckets
    ]
    return {"curves": curves, "buckets": Table("seed samples", ["expert", "samples", *domains, "loss on all"], rows)}


def _load_chart(record: TrainingRecord) -> Chart:
    lines = {
        "max load": [entry.max_load for entry in record.log],
        "min load": [entry.min_load for entry in record.log],
        "balance loss": [entry.balance_loss for entry in record.log],
    }
    known = [(name, [value for value in values if value is not None]) for name, values in lines.items()]
    return Chart("Load of the experts (1: even)", safe(line_chart(known, "step")))


def _use(run: Path, made: Description) -> str:
    """The commands that export the result, serve it and talk to it."""
    export = f"upcycle export {shlex.quote(str(run))} {'--fold ' * made.folds}--to FOLDER"
    return f"{export}\n{commands('FOLDER')}" if made.plain or made.folds else export


Column = Callable[[Manifest, Cost | None, TrainingRecord | None], str]
COST_COLUMNS: dict[str, Column] = {
    "seconds": lambda _, cost, __: f"{cost.seconds:.0f}" if cost else "",
    "GB resident": lambda _, cost, __: f"{cost.memory_gb:.2f}" if cost else "",
    "GB on the GPU": lambda _, cost, __: f"{cost.gpu_gb:.2f}" if cost and cost.gpu_gb is not None else "",
    "training tokens": lambda _, __, record: f"{record.tokens:,}" if record else "",
    "steps": lambda _, __, record: f"{record.steps:,}" if record else "",
    "MB written": lambda manifest, _, __: f"{sum(file.bytes for file in manifest.files.values()) / 1e6:.0f}",
}


def _cost(run: Path) -> Values:
    """A row per stage, with the columns of which something is known; hashes and versions."""
    costs = read_costs(run)
    made = {stage: m for stage in stage_names() if (m := read_manifest(run / stage)) is not None}
    cells = {
        stage: [column(m, costs.get(stage), LOG.known(run / stage)) for column in COST_COLUMNS.values()]
        for stage, m in made.items()
    }
    known = [i for i in range(len(COST_COLUMNS)) if any(row[i] for row in cells.values())]
    heads = [list(COST_COLUMNS)[i] for i in known]
    rows = [[stage, *(row[i] for i in known)] for stage, row in cells.items()]
    return {
        "costs": Table("cost", ["stage", *heads], rows),
        "hashes": "\n".join(f"{stage:10} {manifest.content}" for stage, manifest in made.items()),
        "versions": made_with(made[POSTTRAIN].versions),
    }
