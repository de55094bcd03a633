"""Recipes side by side: the same data, the same number of training tokens or FLOPs, several seeds, a paired test."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from upcycle.console import table, tell, warn
from upcycle.distributed.world import is_main, on_main
from upcycle.errors import UpcycleError, nearest
from upcycle.pipeline.run import Run
from upcycle.recipe import Recipe, parse_recipe
from upcycle.records.comparison import METRICS, Cell, Comparison, Measures
from upcycle.records.files import COMPARISON, ROUTE
from upcycle.studies.cells import Study, Variant, labels, run_cells
from upcycle.studies.statistics import Cells, filled, p_text, std_text, summary
from upcycle.weights.folders import is_here

MATCHES = ("tokens", "flops")
"""What all variants of a comparison may have alike."""
TOLERANCE = {"tokens": 0.01, "flops": 0.05}
"""Share by which they may differ: a training is a whole number of steps, and FLOPs are matched by parts of epochs."""
NEAR = 1.2
"""Ratio below which whole steps may be why."""
SCORED_WITH = (
    *(f"data.{name}" for name in ("max_validation", "max_length", "too_long", "turns")),
    *(f"data.{name}" for name in ("chat_template", "format", "columns", "max_bad")),
    "evaluate.max_answer_tokens",
    "evaluate.max_generated",
)
"""Settings that decide which rows a model is scored on, and how they are read."""


def compare(study: Study, force: bool, against: str | None = None, match: str = "tokens") -> Comparison:
    """Run every variant with every seed and write `comparison.json`; resumable.

    Args:
        force: compare even if variants saw different data or different training budgets (tokens or FLOPs).
        against: label of the variant that the others are compared with; none given: the first.
        match: `flops` scales the epochs of the others to the training FLOPs of the first.

    Raises:
        UpcycleError: no such label or match; or `force` is not given, and the variants are not comparable (of their
            tokens or FLOPs that is known after the first seed).
    """
    names = labels(study.texts)
    if against is not None and against not in names:
        raise UpcycleError(
            f"--against {against}: no such variant{nearest(against, names)}; there are {', '.join(names)}"
        )
    if match not in MATCHES:
        raise UpcycleError(f"--match is '{match}', expected one of {', '.join(MATCHES)}")
    if match == "flops":
        study = replace(study, overrides=matched(study.texts))

    def refuse(problems: Sequence[str]) -> None:
        if problems:
            raise UpcycleError(f"{'; '.join(problems)}; such a comparison says little; --force runs it anyway")

    if not force:
        on_main(lambda: refuse(_planned(study, match)))
    cells = run_cells(study, (lambda _: None) if force else lambda cells: refuse(differences(cells, match)))
    rows = summary(cells, names, against=names.index(against) if against else 0)
    found = Comparison(
        variants=cells,
        summary=rows,
        not_comparable=differences(cells, match),
        match="flops" if match == "flops" else None,
    )
    if is_main():
        study.out.mkdir(parents=True, exist_ok=True)  # all cells may have been taken from the results
        _say_fewer(study.out, found)
        COMPARISON.write(study.out, found)
    show(found)
    if match == "flops":
        share = max(_start(run) / max(run.total_flops, 1) for runs in cells.values() for run in runs)
        tell(f"FLOPs are those of all stages; the router's start, at most {share:.1%} of a variant's, is not matched")
    return found


def _say_fewer(out: Path, found: Comparison) -> None:
    """What a comparison that is replaced had more."""
    try:
        before = COMPARISON.known(out)
    except UpcycleError:
        return  # damaged: it is mended now
    if before and before.seeds > found.seeds:
        place = out / COMPARISON.name
        warn(f"{place} had {before.over}, and has {found.over} now; --seeds {before.seeds} makes it again")


def _start(run: Measures) -> int:
    """FLOPs of the router's start."""
    return (run.flops or {}).get(ROUTE, 0)


def matched(texts: Sequence[str]) -> dict[str, list[str]]:
    """Overrides that give every variant the training FLOPs of the first one: its epochs are scaled, all by one factor.

    Only FLOPs of the two trainings count; checkpoints keep their number.
    """
    runs = [Variant(text).run(0, Path()) for text in texts]
    first, *_ = work = [_work(run) for run in runs]
    return {text: _scaled(run.recipe, first / own) for text, run, own in zip(texts, runs, work, strict=True)}


def _work(run: Run) -> float:
    """Training FLOPs of a token that is seen once in each of a run's epochs, up to a factor that all share."""
    recipe, active = run.recipe, run.kind.active(run.base, run.recipe)
    return (recipe.prepare.epochs * active.dense if recipe.tunes else 0.0) + recipe.posttrain.epochs * active.moe


def _scaled(recipe: Recipe, factor: float) -> list[str]:
    names = ("prepare.epochs", "prepare.checkpoint_every", "posttrain.epochs", "posttrain.checkpoint_every")
    fields = (name.split(".") for name in names)
    return [f"{s}.{f}={getattr(getattr(recipe, s), f) * factor!r}" for s, f in fields] if factor != 1 else []


def differences(cells: Cells, match: str = "tokens") -> list[str]:
    """What makes the variants not comparable: different data, or different training tokens (or FLOPs) for a seed.

    Tokens of all stages count, the router's start to the last; FLOPs of the two trainings, which are what is matched.
    """
    problems = []
    for runs in zip(*cells.values(), strict=True):
        seed = runs[0].seed
        known = [(cell, parse_recipe(cell.recipe, "of a cell")) for cell in runs if isinstance(cell, Cell)]
        given = [(cell.inputs or {}).get("checkpoints", _named(recipe)) for cell, recipe in known]
        unlike = _unlike([recipe for _, recipe in known], [run.data for run in runs], given)
        problems += [f"seed {seed}: the variants {said}" for said in unlike]
        if match == "tokens":
            totals, unit = [run.total_tokens for run in runs], "numbers of training tokens"
            starts = [run.tokens.get(ROUTE, 0) for run in runs]
            trained = [total - start for total, start in zip(totals, starts, strict=True)]
            alike = len(set(totals)) == 1 or (len(set(starts)) == 1 and _near(trained, match))
        else:
            totals, unit = [run.total_flops - _start(run) for run in runs], "training FLOPs"
            alike = _near(totals, match)
        if not alike:
            named = zip(labels(list(cells)), totals, strict=True)
            listed = ", ".join(f"{label}: {total:,}" for label, total in named)
            near = "; a training is a whole number of steps: more rows or smaller batches come closer"
            close = max(totals) < NEAR * min(totals)
            problems.append(f"seed {seed}: different {unit} ({listed}{near * close})")
    return problems


def _planned(study: Study, match: str) -> list[str]:
    """What makes the variants not comparable, as far as it is known before any of them runs."""
    runs = [study.run(number, study.seeds[0]) for number in range(len(study.texts))]
    recipes = [run.recipe for run in runs]
    unlike = _unlike(recipes, [run.data_hash for run in runs], [_named(recipe) for recipe in recipes])
    return [f"the variants {said}" for said in unlike] or _unequal_rows(study.texts, runs, match)


def _unequal_rows(texts: Sequence[str], runs: Sequence[Run], match: str) -> list[str]:
    """Variants that hold out different numbers of seed rows, and so train on different ones."""
    routes = [run.recipe.route for run in runs]
    held = [
        (r.seed_from == "held_out") * r.min_samples_per_expert * run.recipe.expand.num_experts
        for r, run in zip(routes, runs, strict=True)
    ]
    if len(set(held)) == 1 or not all(is_here(run.recipe.base) for run in runs):
        return []
    rows = [len(run.splits.train) for run in runs]
    epochs = [run.recipe.posttrain.epochs + run.recipe.tunes * run.recipe.prepare.epochs for run in runs]
    seen = [round(count * times) for count, times in zip(rows, epochs, strict=True)]
    # epochs that are matched by FLOPs differ on purpose
    if _near(rows if match == "flops" else seen, match) or len({route.seed_fraction for route in routes}) > 1:
        return []
    said = ", ".join(f"{label}: {count:,}" for label, count in zip(labels(texts), rows, strict=True))
    most = max(held)
    return [
        f"the variants train on different numbers of rows ({said}), as rows for the router's start are held out, so "
        f"many for each expert; set route.min_samples_per_expert to {most} divided by a variant's expand.num_experts"
    ]


def _named(recipe: Recipe) -> str:
    """The checkpoints that it is given, by name."""
    return str(recipe.prepare.checkpoints)


def _unlike(recipes: Sequence[Recipe], data: Sequence[str], given: Sequence[str]) -> list[str]:
    """What the variants of a seed do differently besides what is trained.

    Args:
        data: the hash of what each sees.
        given: that of the checkpoints that each starts from, or their names.
    """
    found = ["saw different data"] if len(set(data)) > 1 else []
    found += [f"are scored on different rows ({said})" for said in _scored(recipes)]
    if len(set(given)) > 1:
        found.append("start from different checkpoints (prepare.checkpoints), whose training is not counted")
    return found


def _near(totals: Sequence[int], match: str) -> bool:
    return max(totals) <= (1 + TOLERANCE[match]) * min(totals)


def _scored(recipes: Sequence[Recipe]) -> list[str]:
    """Settings of `SCORED_WITH` that are not alike, with their values."""
    found = []
    for name in SCORED_WITH:
        section, field = name.split(".")
        values = [getattr(getattr(recipe, section), field) for recipe in recipes]
        if any(value != values[0] for value in values):
            found.append(f"{name}: {', '.join(map(str, values))}")
    return found


def show(found: Comparison) -> None:
    """The table on the terminal."""
    for metric in found.metrics:
        pattern, lines = METRICS[metric], []
        for row in found.summary:
            value = row.metric(metric)
            gap = "" if value.difference is None else pattern.format(value.difference)
            ps = (p_text(value.p), p_text(value.p_corrected))
            flops = "" if row.flops is None else f"{row.flops:.3g}"
            spent = (f"{row.tokens:,}", flops)
            lines.append((row.label, pattern.format(value.mean), std_text(pattern, value), gap, *ps, *spent))
        heads = ("variant", "mean", "std", f"against {found.reference}", "p (paired)", "p (Holm)", "tokens", "FLOPs")
        table(f"{metric.replace('_', ' ')} of the MoE, {found.over}", *filled(heads, lines))
    for problem in found.not_comparable:
        tell(f"NOT COMPARABLE: {problem}")
