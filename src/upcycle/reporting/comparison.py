"""`upcycle report` of a comparison or a sweep: which variant is better, by how much, and whether that is noise."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from upcycle.console import tell, warn
from upcycle.disk import write_text
from upcycle.pipeline.costs import read_costs
from upcycle.records.comparison import METRICS, Comparison, Found, Measures, Spread, Summary, Sweep
from upcycle.records.files import COMPARISON, MANIFEST, RESULT, SCORES, SWEEP, run_of
from upcycle.records.record import ALL
from upcycle.records.scores import BASE, MOE
from upcycle.reporting.charts import Interval, bar_chart, interval_chart, point_chart, with_error
from upcycle.reporting.course import course_chart
from upcycle.reporting.dense import dense_variant
from upcycle.reporting.page import Chart, Table, made_with, render, safe
from upcycle.reporting.verdict import ONE_SEED, Verdict, of_variant
from upcycle.studies.statistics import filled, over_seeds, p_text, std_text

SECTIONS = (("scores", "Scores"), ("detail", "Detail"), ("cost", "Cost"), ("reproduce", "Reproduce"))
TITLES = {"loss": "Held-out loss (lower is better)", "exact_match": "Exact match", "benchmark": "Mean over benchmarks"}


def find_comparison(folder: Path) -> Comparison | Sweep | None:
    """What a comparison or sweep wrote into a folder; None if there was none."""
    return COMPARISON.known(folder) or SWEEP.known(folder)


def write_comparison_report(found: Comparison | Sweep, folder: Path, out: Path) -> None:
    """Write the report of a comparison or sweep as one HTML file.

    Args:
        folder: where its runs lie.
    """
    short = vars(summarise(found)) | vars(_verdict(folder, found))
    course = _course(folder, found)
    page = render(
        "comparison.html.j2",
        title=f"{folder.resolve().name}: {len(found.summary)} variants, {found.over}",
        sections=SECTIONS,
        tables=[_against_reference(found, metric) for metric in found.metrics],
        details=_details(found),
        costs=_costs(folder, found),
        command=_command(found),
        versions=_versions(folder),
        data_hashes=", ".join(sorted({run.data[:12] for runs in found.variants.values() for run in runs})),
        course=[course] if course else [],
        **short,
    )
    write_text(out, page)
    tell(f"report: {out}")


def verdict_of_run(run: Path, found: Comparison | Sweep) -> Verdict | None:
    """Of a run that is a cell, over all seeds of its variant; None if it is no cell."""
    number = _number(run, found)
    if number is None:
        return None
    runs = {run_of(run.parent, number, cell.seed): cell for cell in list(found.variants.values())[number]}
    scores = SCORES.known_of(run)
    if scores and MOE in scores and str(scores[MOE].loss) != str(runs[run].loss):  # nan too
        warn(f"{run} was made anew since it was compared, so the comparison beside it is left out; compare again")
        return None
    verdict = of_variant(found, number, dense_variant(run.parent, found), f"“{found.summary[number].label}”")
    own = f" This run alone, with seed {runs[run].seed}: {runs[run].loss[ALL]:.4f}." if len(runs) > 1 else ""
    return replace(verdict, noise=verdict.noise + own)


def dense_run_beside(run: Path, found: Comparison | Sweep) -> Path | None:
    """The run of the dense variant that has the same seed as a cell."""
    dense = dense_variant(run.parent, found)
    if dense is None or _number(run, found) in (None, dense):
        return None
    return run_of(run.parent, dense, int(run.name.rpartition("-seed")[2]))


def _number(run: Path, found: Comparison | Sweep) -> int | None:
    """Place of the variant that a run folder is of."""
    for number, runs in enumerate(found.variants.values()):
        if run in [run_of(run.parent, number, cell.seed) for cell in runs]:
            return number
    return None


def _first_seed(found: Found) -> int:
    return next(iter(found.variants.values()))[0].seed


def _subject(folder: Path, found: Comparison) -> int | None:
    """Place of the variant that the first screen is about: the best that is not the dense one."""
    dense = dense_variant(folder, found)
    means = {n: row.metric("loss").mean for n, row in enumerate(found.summary) if n != dense}
    return min((n for n in means if math.isfinite(means[n])), key=means.__getitem__, default=None)


def _verdict(folder: Path, found: Comparison | Sweep) -> Verdict:
    """Where none is known to be dense tuning, the lead is about the best of all."""
    number = _subject(folder, found) if isinstance(found, Comparison) else None
    if number is None:
        return Verdict(_lead(found), "", ())
    dense, label = dense_variant(folder, found), found.summary[number].label
    verdict = of_variant(found, number, dense, f"“{label}”")
    if dense is None:
        return replace(verdict, lead=_lead(found), noise=ONE_SEED if found.seeds == 1 else "")
    others = len(found.summary) - 2
    chosen = f" It is the best of {others + 1} variants beside the dense one, chosen by this figure." if others else ""
    return replace(verdict, lead=verdict.lead + chosen)


def _course(folder: Path, found: Comparison | Sweep) -> Chart | None:
    """Of the first seed of the variant that the first screen is about."""
    number = _subject(folder, found) if isinstance(found, Comparison) else None
    if number is None or not (run := run_of(folder, number, _first_seed(found))).is_dir():
        return None
    course = course_chart(run, dense_run_beside(run, found))
    title = f"“{found.summary[number].label}”: loss over training tokens, seed {_first_seed(found)}"
    return course and replace(course, title=title)


@dataclass(frozen=True)
class InShort:
    """A comparison at a glance."""

    heading: str
    lead: str
    problems: Sequence[str]
    """Why the variants are not comparable, if they are not."""
    charts: Sequence[Chart]
    """One per metric."""


def summarise(found: Comparison | Sweep) -> InShort:
    """The lead sentence and the charts."""
    problems = found.not_comparable if isinstance(found, Comparison) else []
    budget = found.budget if isinstance(found, Comparison) and not problems else ""
    return InShort(
        heading=f"At equal {budget}" if budget else "Beside the other runs of the same folder",
        lead=_lead(found),
        problems=problems,
        charts=[chart for metric in found.metrics for chart in _charts(found, metric)],
    )


def _lead(found: Comparison | Sweep) -> str:
    """The best variant by loss, and whether it is better than the first one by more than noise."""
    rows = found.summary
    finite = [row for row in rows if math.isfinite(row.metric("loss").mean)]
    if not finite:
        return "No variant has a finite held-out loss: all of them diverged in some seed."
    best = min(finite, key=lambda row: row.metric("loss").mean)
    loss = best.metric("loss")
    text = f"The lowest held-out loss, {_plus_minus(loss, METRICS['loss'])}, is that of “{best.label}”"
    if isinstance(found, Sweep):
        return f"{text}. Points of a sweep may differ in training tokens."
    if loss.difference is None or loss.p is None or loss.p_corrected is None:
        return f"{text}, with which the others are compared."
    if math.isnan(loss.p):
        why = "One seed says nothing about noise." if found.seeds == 1 else "No paired test could be made."
        return f"{text}: {loss.difference:+.4f} against {found.reference}. {why}"
    verdict = "more than noise" if loss.p_corrected < 0.05 else "not more than noise"
    return (
        f"{text}: {loss.difference:+.4f} against {found.reference} (p {p_text(loss.p)}, paired by seed; p "
        f"{p_text(loss.p_corrected)} after Holm for {len(rows) - 1} such tests: {verdict}), {found.over}."
    )


def _plus_minus(value: Spread, pattern: str) -> str:
    return with_error(pattern, value.mean, _error(value))


def _error(value: Spread) -> float:
    """Standard deviation over seeds; 0, which is not drawn, for one seed."""
    return 0.0 if math.isnan(value.std) else value.std


def _best(rows: Sequence[Summary], metric: str) -> int:
    """Place of the best row; a variant that diverged is none."""
    sign = 1 if metric == "loss" else -1
    means = [row.metric(metric).mean for row in rows]
    return min(range(len(rows)), key=lambda i: (math.isnan(means[i]), sign * means[i]))


def _charts(found: Comparison | Sweep, metric: str) -> list[Chart]:
    """Scores, and how sure the differences to the reference are."""
    charts = [Chart(TITLES[metric], safe(_draw(found, metric)), _how_to_read(found))]
    if drawn := differences_chart(found.summary, metric):
        title, caption = f"Difference to {found.reference}", INTERVALS.format(reference=found.reference)
        charts.append(Chart(title, safe(drawn), caption))
    return charts


INTERVALS = (
    "The upright line is {reference}. A dot is the mean difference, its bar the 95% interval. Where the bar misses the "
    "line (then it is orange), noise alone would hardly give such a difference; p after Holm counts all tests."
)


def _how_to_read(found: Comparison | Sweep) -> str:
    shown = "A dot" if isinstance(found, Sweep) else "A bar"
    spread = ", with the standard deviation over them" if found.seeds > 1 else ""
    best = "" if isinstance(found, Sweep) else " The best one is orange."
    return f"{shown} is the mean of the MoE over {found.over}{spread}.{best}"


def differences_chart(
    rows: Sequence[Summary], metric: str, draw: Callable[[Sequence[Interval], str, str], str] = interval_chart
) -> str:
    """Every variant's difference to the reference; empty where there are no intervals (one seed)."""
    found = [(row.label, row.metric(metric)) for row in rows]
    known = [
        (label, value.difference, value.interval[0], value.interval[1])
        for label, value in found
        if value.difference is not None and value.interval and math.isfinite(value.interval[0])
    ]
    reference = next((label for label, value in found if value.difference is None), "")
    return draw(known, reference, METRICS[metric].replace(":", ":+")) if known else ""


def _draw(found: Comparison | Sweep, metric: str) -> str:
    """Of the variants that did not diverge: lines of a sweep, bars of a comparison."""
    rows = [row for row in found.summary if math.isfinite(row.metric(metric).mean)]
    if not rows:
        return ""
    if isinstance(found, Sweep):
        return _lines(found, rows, metric)
    bars = [(row.label, row.metric(metric).mean, _error(row.metric(metric))) for row in rows]
    return bar_chart(bars, METRICS[metric], _best(rows, metric))


def _lines(found: Sweep, rows: Sequence[Summary], metric: str) -> str:
    """Scores along the first axis, a line for each combination of the others."""
    first, *others = found.axes
    places = _places(list(dict.fromkeys(row.setting(first) for row in found.summary)))
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        label = ", ".join(f"{name}={row.setting(name)}" for name in others) or first
        value = row.metric(metric)
        lines.setdefault(label, []).append((places[row.setting(first)], value.mean, _error(value)))
    return point_chart(list(lines.items()), [(place, name) for name, place in places.items()], dotted=lines)


def _places(names: Sequence[str]) -> dict[str, float]:
    """Values of a setting on an axis: where they lie as numbers, or one after the other."""
    try:
        return {name: float(name) for name in names}
    except ValueError:
        return {name: float(i) for i, name in enumerate(names)}


def _against_reference(found: Found, metric: str) -> Table:
    rows, pattern = found.summary, METRICS[metric]
    lines = []
    for row in rows:
        value = row.metric(metric)
        gap = "" if value.difference is None else signed(pattern, value.difference)
        ps = (p_text(value.p), p_text(value.p_corrected))
        error = std_text(pattern, value)
        lines.append([row.label, pattern.format(value.mean), error, gap, interval(pattern, value), *ps])
    against = f"against {found.reference}"
    heads = ["variant", "mean", f"std ({found.over})", against, "95% interval", "p (paired t-test)", "p (Holm)"]
    return Table(TITLES[metric], *filled(heads, lines), [_best(rows, metric)])


def signed(pattern: str, value: float) -> str:
    return ("+" if value > 0 else "") + pattern.format(value)


def interval(pattern: str, value: Spread) -> str:
    """Of the difference; nothing where there is none, or one seed."""
    if value.interval is None or math.isnan(value.interval[0]):
        return ""
    return " to ".join(signed(pattern, end) for end in value.interval)


def _details(found: Found) -> list[Table]:
    """By seed, by domain, and the dense models that each variant came from."""
    labels, groups = [row.label for row in found.summary], list(found.variants.values())
    tables = []
    for metric in found.metrics:
        pattern, name = METRICS[metric], TITLES[metric]
        values = [[run.metric(metric) or {} for run in runs] for runs in groups]
        rows = [[pattern.format(by_domain[ALL]) for by_domain in cells] for cells in values]
        tables.append(_labelled(f"{name}, by seed", labels, [f"seed {run.seed}" for run in groups[0]], rows))
        domains = list(dict.fromkeys(domain for by_domain in values[0] for domain in by_domain))
        rows = [[_over_seeds([cell.get(d) for cell in cells], pattern) for d in domains] for cells in values]
        tables.append(_labelled(f"{name}, by domain", labels, domains, rows))
    if all(run.dense for runs in groups for run in runs):
        title = "Held-out loss of the dense models on the way, which saw fewer training tokens"
        heads = ["base", "best of base and checkpoints", "MoE"]
        tables.append(_labelled(title, labels, heads, [_dense(runs) for runs in groups]))
    return tables


def _labelled(title: str, labels: Sequence[str], heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return Table(title, ["variant", *heads], [[label, *row] for label, row in zip(labels, rows, strict=True)])


def _over_seeds(values: Sequence[float | None], pattern: str) -> str:
    """A seed whose rows lack a domain has no value for it."""
    known = [value for value in values if value is not None]
    return _plus_minus(over_seeds(dict(enumerate(known))), pattern) if known else ""


def _dense(runs: Sequence[Measures]) -> list[str]:
    """Loss of the base, of the best dense model and of the MoE."""
    dense = [run.dense or {} for run in runs]
    best = [min(entry.loss[ALL] for entry in models.values()) for models in dense]
    columns = [[models[BASE].loss[ALL] for models in dense], best, [run.loss[ALL] for run in runs]]
    return [_over_seeds(values, METRICS["loss"]) for values in columns]


def _costs(folder: Path, found: Found) -> Table:
    """Training tokens by stage, of those that train in any run; FLOPs; seconds and memory of what a run made itself."""
    trained = (tokens for runs in found.variants.values() for run in runs for tokens in run.tokens.items())
    stages = list(dict.fromkeys(stage for stage, count in trained if count))
    lines = []
    for number, (row, runs) in enumerate(zip(found.summary, found.variants.values(), strict=True)):
        tokens = [fmean(run.tokens.get(stage, 0) for run in runs) for stage in stages]
        costs = [read_costs(run_of(folder, number, run.seed)).values() for run in runs]
        kept = [sum((run.seconds or {}).values()) for run in runs]
        seconds = fmean(sum(cost.seconds for cost in cell) or known for cell, known in zip(costs, kept, strict=True))
        memory = max((cost.memory_gb for cell in costs for cost in cell), default=0.0)
        flops = fmean(run.total_flops for run in runs)
        spent = [f"{flops:.3g}" if flops else "", f"{seconds:,.0f}", f"{memory:.2f}" if memory else ""]
        lines.append([row.label, *(f"{n:,.0f}" for n in tokens), *spent])
    heads = [f"training tokens, {stage}" for stage in stages]
    return Table("cost", ["variant", *heads, "training FLOPs", "seconds", "most GB resident"], lines)


def _command(found: Comparison | Sweep) -> str:
    words = ["sweep", found.recipe, *found.grid] if isinstance(found, Sweep) else ["compare", *found.variants]
    options = f"--seeds {found.seeds} --out FOLDER"
    if isinstance(found, Comparison):
        options += _fairness(found)
    return " \\\n  ".join([f"upcycle {words[0]}", *map(shlex.quote, words[1:]), options])


def _fairness(found: Comparison) -> str:
    """Options that say what a comparison is against and what its variants have alike."""
    against = found.summary[0].metric("loss").difference is not None
    return "".join(
        [
            f" --against {shlex.quote(found.reference)}" * against,
            f" --match {found.match}" if found.match else "",
            " --force" * bool(found.not_comparable),
        ]
    )


def _versions(folder: Path) -> str:
    """Of the first run; nothing if its folder is gone."""
    manifest = MANIFEST.known(RESULT.of(run_of(folder, 0, 0)))
    return made_with(manifest.versions) if manifest else ""
