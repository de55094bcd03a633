"""`upcycle report`: a standalone HTML file that says what a run made, whether it helped, and what it cost."""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from upcycle.architectures.clients import commands
from upcycle.console import tell
from upcycle.disk import write_text
from upcycle.errors import command_line, counted
from upcycle.pipeline.benchmarks import read_scores
from upcycle.pipeline.costs import read_costs
from upcycle.pipeline.manifest import read_manifest
from upcycle.pipeline.stages import stage_names, training_tokens
from upcycle.recipe import Recipe, dump_recipe
from upcycle.records.benchmark import BenchmarkScores, score_table
from upcycle.records.comparison import Dense, Measures
from upcycle.records.cost import Cost
from upcycle.records.description import Description, RoutedText
from upcycle.records.files import LOG, PLAN, POSTTRAIN, ROUTE_REPORT, SCORES
from upcycle.records.manifest import Manifest
from upcycle.records.plan import ExpansionPlan
from upcycle.records.record import ALL, ByDomain, Shares
from upcycle.records.scores import BASE, MOE, Scores, standard_error
from upcycle.records.training import TrainingRecord
from upcycle.reporting.charts import bar_chart, line_chart
from upcycle.reporting.comparison import dense_run_beside, find_comparison, summarise, verdict_of_run
from upcycle.reporting.course import course_chart
from upcycle.reporting.dense import comparing_command, is_dense
from upcycle.reporting.page import Chart, Table, made_with, render, safe
from upcycle.reporting.verdict import Verdict, of_run

SECTIONS = (
    ("scores", "Scores"),
    ("lineage", "Lineage"),
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
    place = run.resolve()
    comparison = find_comparison(place.parent)  # of a run that is a cell of one
    short = summarise(comparison) if comparison else None
    verdict = verdict_of_run(place, comparison) if comparison else None
    course = course_chart(run, dense_run_beside(place, comparison) if comparison else None)
    page = render(
        "report.html.j2",
        title=f"{run.name}: {_what(plan)} {recipe.base}",
        sections=SECTIONS,
        **vars(verdict or _verdict(run, recipe, plan, scores)),
        course=[course] if course else [],
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
        comparison=short,
        problems=short.problems if short else (),
    )
    write_text(out, page)
    tell(f"report: {out}")


def _what(plan: ExpansionPlan) -> str:
    return "dense tuning of" if is_dense(plan) else f"{counted(len(plan.experts), 'expert')} from"


def _verdict(run: Path, recipe: Recipe, plan: ExpansionPlan, scores: Scores) -> Verdict:
    """Of a run that is part of no comparison."""
    moe = scores[MOE]
    dense = {n: Dense(loss=e.loss, exact_match=e.exact_match or None) for n, e in scores.items() if not e.expert_share}
    measures = Measures(
        seed=recipe.seed,
        data="",
        tokens=training_tokens(run),
        loss=moe.loss,
        exact_match=moe.exact_match or None,
        dense=dense,
        by_domain=recipe.prepare.by_domain or None,
    )
    return of_run(measures, is_dense(plan), comparing_command(run, recipe))


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
    """A chart per figure, a table per figure by domain."""
    losses = {name: entry.loss for name, entry in scores.items()}
    charts, tables = [_loss_chart(losses)], [_by_domain("Held-out loss", losses, "{:.4f}", min)]
    matches = {name: entry.exact_match for name, entry in scores.items() if entry.exact_match}
    rows = scores[MOE].exact_match_rows
    if rows and len(matches) == len(scores):
        charts.append(_match_chart(matches, rows))
        tables.append(_by_domain("Exact match", matches, "{:.1%}", max))
    benchmarks = Table("Benchmarks (± one standard error; * the best)", *score_table(asked, "±")) if asked else None
    return {"charts": charts, "score_tables": tables, "benchmarks": benchmarks}


def _loss_chart(losses: Mapping[str, ByDomain]) -> Chart:
    bars = [(name, values[ALL], 0.0) for name, values in losses.items() if name != BASE]
    best = min(range(len(bars)), key=lambda i: bars[i][1])
    caption = (
        "A bar for each model, in the order of training: the mean over rows of the mean token loss of the answer. "
        f"Shorter is better, the best one is orange. The base, {losses[BASE][ALL]:.4f}, is left out."
    )
    return Chart("Held-out loss", safe(bar_chart(bars, "{:.4f}", best)), caption)


def _match_chart(matches: Mapping[str, ByDomain], rows: int) -> Chart:
    bars = [(name, values[ALL], standard_error(values[ALL], rows)) for name, values in matches.items()]
    best = max(range(len(bars)), key=lambda i: bars[i][1])
    caption = (
        f"Share of {rows} held-out rows whose greedy answer is right, ± one standard error (the thin line): what other "
        "rows would change. Longer is better, the best one is orange."
    )
    return Chart("Exact match", safe(bar_chart(bars, "{:.1%}", best)), caption)


def _by_domain(
    title: str, measured: Mapping[str, ByDomain], pattern: str, choose: Callable[[Sequence[float]], float]
) -> Table:
    domains = list(next(iter(measured.values())))
    values = [by_domain[ALL] for by_domain in measured.values()]
    rows = [
        [name, *(pattern.format(by_domain[d]) if d in by_domain else "" for d in domains)]
        for name, by_domain in measured.items()
    ]
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
    """Load of the experts, the seed samples of each."""
    buckets = ROUTE_REPORT.read_of(run).buckets
    domains = sorted({domain for bucket in buckets for domain in bucket.domains})
    rows = [
        [f"E{b.expert} {b.name}", b.samples, *(b.domains.get(d, 0) for d in domains), f"{b.mean_loss:.3f}"]
        for b in buckets
    ]
    heads = ["expert", "samples", *domains, "loss on all"]
    return {"curves": [_load_chart(LOG.read(run / POSTTRAIN))], "buckets": Table("seed samples", heads, rows)}


def _load_chart(record: TrainingRecord) -> Chart:
    lines = {
        "load of the most loaded expert": [entry.max_load for entry in record.log],
        "load of the least loaded expert": [entry.min_load for entry in record.log],
        "balance loss": [entry.balance_loss for entry in record.log],
    }
    known = [(name, [value for value in values if value is not None]) for name, values in lines.items()]
    caption = (
        "Over the steps of post-training. At 1 all experts of a layer read as many tokens; at 2 an expert reads twice "
        "its share, at 0 none. Of all layers the extreme ones are shown."
    )
    return Chart("Load of the experts", safe(line_chart(known, "step")), caption)


def _use(run: Path, made: Description) -> str:
    """The commands that export the result, serve it and talk to it."""
    export = command_line("export", run, *(["--fold"] if made.folds else []), "--to", "FOLDER")
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
