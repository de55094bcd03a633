"""What an artifact is and where its experts come from: a tree of the lineage, a table and a picture of similarities."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from rich.text import Text
from rich.tree import Tree

from upcycle.console import console, table, tell
from upcycle.errors import UpcycleError, command_line
from upcycle.pipeline.manifest import read_manifest, verified
from upcycle.pipeline.run import again, is_run
from upcycle.pipeline.stages import stage_names
from upcycle.reading import MAX_BYTES
from upcycle.records.description import Description
from upcycle.records.files import DELETED, EVALUATE, EXPAND, LINEAGE, LOG, PLAN, POSTTRAIN, SCORES, RecordFile
from upcycle.records.plan import ExpansionPlan
from upcycle.records.record import read_record
from upcycle.reporting.figures import load_figure, routing_figure, similarity_figure


def inspect(path: Path, figure: Path | None = None, made: Description | None = None) -> None:
    """Print what `path` (a run, a stage's folder, a MoE, a plan) is, its experts' lineage and similarities.

    Args:
        made: what the model in `path` is, if it holds one.
        figure: where to write the picture, those of a run beside it; an existing one is replaced, and that is said.

    Raises:
        UpcycleError: nothing here has experts.
    """
    if not any(DELETED.of(folder).exists() for folder in (path, path.resolve().parent)):
        for folder in (path, *(path / stage for stage in (EXPAND, POSTTRAIN, EVALUATE))):
            verified(folder)  # what is shown is what was made
    plan = find_plan(path)
    describe(path, made)
    console.print(lineage_tree(plan))
    names = [label.split()[0] for label in plan.labels]
    rows = [(label, *map(_cell, row)) for label, row in zip(plan.labels, plan.similarities, strict=True)]
    table(f"similarity of experts ({plan.similarity} of {plan.measured})", ("", *names), rows)
    if figure is not None:
        if np.isnan(plan.similarities[~np.eye(len(names), dtype=bool)]).all():
            tell(f"{figure} is not drawn: no two of the experts have a similarity")
        else:
            draw("heat map and dendrogram", figure, partial(similarity_figure, plan))
        draw_routing(path, figure)


def draw_routing(run: Path, figure: Path) -> None:
    """Beside `figure`, of a run that has come so far: who gets which domain, and the load over training."""
    scores, record = SCORES.known_of(run), LOG.known(run / POSTTRAIN)
    if scores is not None:
        shares = [entry.expert_share for entry in scores.values() if entry.expert_share is not None]
        place = figure.with_name(f"{figure.stem}-routing.png")
        draw("share of tokens per expert, by domain and layer", place, partial(routing_figure, shares[-1]))
    if record is not None:
        place = figure.with_name(f"{figure.stem}-load.png")
        draw("load of the experts over training", place, partial(load_figure, record.log))


def draw(what: str, place: Path, write: Callable[[Path], None]) -> None:
    """Write a picture, and say where, and whether there was another."""
    replaced = " (replaced)" if place.exists() else ""
    write(place)
    tell(f"{what}: {place}{replaced}")


def find_plan(path: Path) -> ExpansionPlan:
    """The plan at, in or beside a path.

    Raises:
        UpcycleError: there is none.
    """
    if path.is_file() and path.suffix == ".json":
        found: ExpansionPlan = read_record(path, ExpansionPlan, most_bytes=MAX_BYTES)
        return found
    places: list[tuple[RecordFile[ExpansionPlan], Path]] = [
        (PLAN, path),  # the stage's own folder
        (LINEAGE, path),  # a MoE's
        (PLAN, path / PLAN.stage),  # a run
    ]
    if path.resolve().name in stage_names():
        places.append((PLAN, path.resolve().parent / PLAN.stage))  # beside a stage's
    for file, folder in places:
        if (plan := file.known(folder)) is not None:
            return plan
    if is_run(path):
        raise UpcycleError(
            f"{path} has not come to the stage {EXPAND} yet; continue with `{again(path)}`; "
            f"`{command_line('inspect', path, '--json')}` says how far it is"
        )
    what = "has no expansion plan" if path.exists() else "does not exist"
    raise UpcycleError(
        f"{path} {what}; expected a run folder, its stage folders expand, assemble or posttrain, a mixture of "
        f"experts made by upcycle (it carries {LINEAGE.name}), or a plan.json"
    )


def describe(path: Path, made: Description | None) -> None:
    """Which stage made a folder, from what; what kind of model it holds."""
    if not path.is_dir():
        return
    manifest = read_manifest(path)
    if manifest is not None:
        made_of = ", ".join(f"{name} {content[:10]}" for name, content in manifest.inputs.items())
        version = manifest.versions.get("upcycle", "of an unknown version")
        tell(f"{path}: stage {manifest.stage}, seed {manifest.seed}, upcycle {version}; from {made_of}")
    if made is not None:
        tell(f"{path}: {made.what}")


def lineage_tree(plan: ExpansionPlan) -> Tree:
    """Each expert under the younger of its parents, the sources at the root."""
    root = Tree(Text(f"lineage ({plan.merge}, drop rate {plan.drop_rate}, seed {plan.seed})"))
    branches: list[Tree] = []
    for line, expert in zip(plan.lines, plan.experts, strict=True):
        above = branches[max(expert.parents)] if expert.parents else root
        branches.append(above.add(Text(line)))  # a name may have brackets
    return root


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"
