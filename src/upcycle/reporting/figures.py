"""Pictures, as PNG, drawn without a display."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from upcycle.errors import counted
from upcycle.records.benchmark import BenchmarkScores
from upcycle.records.comparison import Comparison, Summary, Sweep
from upcycle.records.files import BENCHMARK_PICTURE
from upcycle.records.plan import ExpansionPlan, Gram
from upcycle.records.record import ALL, Shares
from upcycle.records.training import LogEntry

NAMES_AS_THEY_ARE = {"text.parse_math": False}
"""A `$` in a name begins no mathematics."""
MAX_LABELLED = 16
"""Experts up to which the cells of the heat map carry their numbers."""


@mpl.rc_context(NAMES_AS_THEY_ARE)
def similarity_figure(plan: ExpansionPlan, path: Path) -> None:
    """A heat map of the similarity of all experts, and a dendrogram (average linkage) of what is near to what."""
    names = plan.labels
    side = max(4.0, 0.42 * len(names))
    figure = Figure(figsize=(2 * side + 2.5, side + 1.2), layout="constrained")
    heat, tree = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _heat_map(heat, plan)
    _dendrogram(tree, plan)
    figure.suptitle(
        f"{counted(len(names), 'expert')} from {len(plan.sources)} ({plan.merge}, drop rate {plan.drop_rate})"
    )
    figure.savefig(path, dpi=120)


@mpl.rc_context(NAMES_AS_THEY_ARE)
def comparison_figure(found: Comparison, path: Path) -> None:
    """The loss (and exact match) of each variant: a dot per seed, its mean and standard deviation."""
    rows, metrics = found.summary, found.metrics
    labels = 0.09 * max(len(row.label) for row in rows)
    figure = Figure(figsize=(4.5 * len(metrics) + labels, 0.45 * len(rows) + 1.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
        for place, row in enumerate(rows):
            value = row.metric(metric)
            by_domain = [run.metric(metric) for run in found.variants[row.variant]]
            axes.errorbar(value.mean, place, xerr=value.std, fmt="D", color="black", capsize=3)
            axes.plot([entry[ALL] for entry in by_domain if entry], [place] * len(by_domain), "o", alpha=0.5)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_xlabel(metric.replace("_", " "))
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    budget = f"equal {found.budget}" if found.match else f"{rows[0].tokens:,} training tokens each"
    figure.suptitle(budget + " (NOT COMPARABLE)" * bool(found.not_comparable))
    figure.savefig(path, dpi=120)


@mpl.rc_context(NAMES_AS_THEY_ARE)
def sweep_figure(found: Sweep, path: Path) -> None:
    """Scores along the first axis, a line for each combination of the others (UpIT, figures 3 and 4)."""
    first, *others = found.axes
    figure = Figure(figsize=(5 * len(found.metrics), 4), layout="constrained")
    lines: dict[str, list[Summary]] = {}
    for row in found.summary:
        lines.setdefault(", ".join(f"{name}={row.setting(name)}" for name in others), []).append(row)
    for axes, metric in zip(figure.subplots(1, len(found.metrics), squeeze=False)[0], found.metrics, strict=True):
        for label, rows in lines.items():
            names = [row.setting(first) for row in rows]
            places = [float(name) for name in names] if all(map(_is_number, names)) else list(range(len(names)))
            values = [row.metric(metric) for row in rows]
            errors = np.nan_to_num([value.std for value in values])
            axes.errorbar(places, [v.mean for v in values], yerr=errors, fmt="o-", capsize=3, label=label or None)
        axes.set_xticks(places, names)
        axes.set_xlabel(first)
        axes.set_ylabel(metric.replace("_", " "))
        axes.grid(alpha=0.3)
    if others:
        figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@mpl.rc_context(NAMES_AS_THEY_ARE)
def routing_figure(shares: Mapping[str, Shares], path: Path, kind: str = "domain") -> None:
    """Share of tokens per expert by domain or benchmark, a heat map for each layer (UpIT, figure 5).

    Args:
        shares: domain or benchmark to (layers, experts).
        kind: what they are called.
    """
    domains = list(shares)
    table = np.array([shares[domain] for domain in domains])  # (domains, layers, experts)
    width, height = 0.4 * table.shape[2] + 0.6, 0.35 * len(domains) + 0.8
    columns = min(table.shape[1], max(1, round((table.shape[1] * height / width) ** 0.5)))  # about a square in all
    rows = -(-table.shape[1] // columns)
    figure = Figure(figsize=(columns * width + 2, rows * height + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for layer, axes in enumerate(grid):
        if layer >= table.shape[1]:
            axes.set_visible(False)
            continue
        image = axes.imshow(table[:, layer], cmap="magma", vmin=0, vmax=table.max(), aspect="auto")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.set_yticks(range(len(domains)), domains)
        axes.set_xticks(range(table.shape[2]), [f"E{e}" for e in range(table.shape[2])])
    figure.colorbar(image, ax=figure.axes, shrink=0.8, aspect=40, label="share of routed tokens")
    figure.suptitle(f"which expert gets which {kind} (even: {1 / table.shape[2]:.0%})")
    figure.savefig(path, dpi=120)


def draw_benchmarks(found: BenchmarkScores, out: Path) -> None:
    """In a benchmark's folder: the scores, and for each MoE which expert gets which benchmark."""
    benchmark_figure(found, out / BENCHMARK_PICTURE.name)
    for model, scores in found.items():
        shares = {task: entry.expert_share for task, entry in scores.items() if entry.expert_share is not None}
        if shares:
            name = re.sub(r"[^A-Za-z0-9]+", "-", model)
            routing_figure(shares, out / f"routing-{name}.png", "benchmark")


@mpl.rc_context(NAMES_AS_THEY_ARE)
def benchmark_figure(found: BenchmarkScores, path: Path) -> None:
    """Score of each model on each benchmark, a heat map; the best models of a benchmark are framed (UpIT, figure 2).

    Args:
        found: model to benchmark to scores.
    """
    models, tasks = list(found), list(next(iter(found.values())))
    values = np.array([[found[model][task].main[0] for task in tasks] for model in models])
    figure = Figure(figsize=(0.9 * len(tasks) + 4, 0.4 * len(models) + 2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=max(values.max(), 1e-9), aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > 0.6 * values.max() else "white"
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=8, color=colour)
    best = (values == values.max(axis=0)) & (values.min(axis=0) < values.max(axis=0))
    for row, column in np.argwhere(best):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_yticks(range(len(models)), models)
    figure.colorbar(image, ax=axes, label="accuracy, exact match or pass@1")
    figure.suptitle("which model is best at which benchmark")
    figure.savefig(path, dpi=120)


@mpl.rc_context(NAMES_AS_THEY_ARE)
def load_figure(log: Sequence[LogEntry], path: Path) -> None:
    """Over training: the load of each expert (mean over layers), the balance loss, the largest load of each layer."""
    load = np.array([entry.load for entry in log])  # (steps, layers, experts)
    steps = [entry.step for entry in log]
    figure = Figure(figsize=(12, 4), layout="constrained")
    lines, layers = figure.subplots(1, 2)
    for expert, values in enumerate(load.mean(axis=1).T):
        lines.plot(steps, values, label=f"E{expert}", linewidth=1)
    lines.plot(steps, [entry.balance_loss for entry in log], label="balance loss", color="black", linestyle=":")
    lines.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    lines.set_xlabel("step")
    lines.set_ylabel("load, mean over layers (1: even)")
    if load.shape[2] <= MAX_LABELLED:
        lines.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    edges = (steps[0] - 0.5, steps[-1] + 0.5, load.shape[1] - 0.5, -0.5)
    image = layers.imshow(
        load.max(axis=2).T, cmap="magma", vmin=1, aspect="auto", interpolation="nearest", extent=edges
    )
    layers.set_xlabel("step")
    layers.set_ylabel("layer")
    layers.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=layers, label="load of the most loaded expert")
    figure.suptitle("load of the experts while post-training")
    figure.savefig(path, dpi=120)


def _heat_map(axes: Axes, plan: ExpansionPlan) -> None:
    similarity, names, cosine = plan.similarities, plan.labels, plan.similarity == "cosine"
    others = similarity[~np.eye(len(names), dtype=bool)]
    image = axes.imshow(similarity, cmap="viridis", vmin=np.nanmin(others), vmax=np.nanmax(similarity))
    axes.set_xticks(range(len(names)), [name.split()[0] for name in names])
    axes.set_yticks(range(len(names)), names)
    axes.set_title("similarity: " + ("cosine" if cosine else "-L2²") + f" of {plan.measured}")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    if len(names) <= MAX_LABELLED:
        middle = (np.nanmin(others) + np.nanmax(similarity)) / 2
        for (row, column), value in np.ndenumerate(similarity):
            colour = "black" if value > middle else "white"
            if not np.isnan(value):
                text = f"{value:.2f}" if cosine else f"{value:.2g}"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _dendrogram(axes: Axes, plan: ExpansionPlan) -> None:
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    pairs = squareform(expert_distances(plan), checks=False)
    dendrogram(linkage(pairs, "average"), labels=plan.labels, orientation="left", ax=axes)
    axes.set_title("which experts are near to each other")
    axes.set_xlabel("1 - cosine" if plan.similarity == "cosine" else "L2 distance")


def expert_distances(plan: ExpansionPlan) -> Gram:
    """(m, m): 1 - cosine, or the L2 distance; a base among the experts, which has no direction, is at 1 from all."""
    if plan.similarity == "cosine":
        distances = 1 - np.nan_to_num(plan.similarities, nan=0.0)
    else:
        distances = np.sqrt(np.maximum(-plan.similarities, 0))
    np.fill_diagonal(distances, 0)
    return np.maximum(distances, 0)
