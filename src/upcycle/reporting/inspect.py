"""What an artifact is and where its experts come from: a tree of the lineage, a table and a picture of similarities."""

import json
from pathlib import Path

import numpy as np
from rich.tree import Tree

from upcycle.artifacts import ExpansionPlan, Expert, read_manifest
from upcycle.console import console, say, table
from upcycle.errors import UpcycleError
from upcycle.expert_expansion.expand import PLAN, merged_from
from upcycle.expert_expansion.plan import expert_similarities
from upcycle.models.folders import LINEAGE
from upcycle.reporting.figures import load_figure, routing_figure, similarity_figure

PLACES = (PLAN, LINEAGE, f"expand/{PLAN}", f"../expand/{PLAN}")
"""Where a plan lies: in the stage's folder, in a MoE's, in a run's, beside a stage's."""


def inspect(path: Path, figure: Path) -> None:
    """Print what `path` (a run, a stage's folder, a MoE, a plan) is, its experts' lineage and similarities.

    Args:
        figure: where to write the picture, a PNG; an existing one is replaced.

    Raises:
        UpcycleError: nothing here has experts.
    """
    file = find_plan(path)
    describe(path)
    plan = ExpansionPlan.load(file)
    similarity = expert_similarities(plan)
    console.print(lineage_tree(plan))
    names = [f"E{i}" for i in range(len(plan.experts))]
    rows = [
        (f"{name} {e.name}", *map(_cell, row)) for name, e, row in zip(names, plan.experts, similarity, strict=True)
    ]
    table(f"similarity of experts ({plan.similarity} of FFN task vectors)", ("", *names), rows)
    similarity_figure(plan, figure)
    say(f"heat map and dendrogram: {figure}")
    draw_routing(path, figure)


def draw_routing(run: Path, figure: Path) -> None:
    """Beside `figure`, of a run that has come so far: who gets which domain, and the load over training."""
    scores, log = run / "evaluate" / "scores.json", run / "posttrain" / "log.json"
    if scores.is_file():
        shares = {
            name: entry["expert_share"]
            for name, entry in json.loads(scores.read_text()).items()
            if "expert_share" in entry
        }
        place = figure.with_name(f"{figure.stem}-routing.png")
        routing_figure(shares[list(shares)[-1]], place)
        say(f"share of tokens per expert, by domain and layer: {place}")
    if log.is_file():
        place = figure.with_name(f"{figure.stem}-load.png")
        load_figure(json.loads(log.read_text())["log"], place)
        say(f"load of the experts over training: {place}")


def find_plan(path: Path) -> Path:
    """The plan at, in or beside a path.

    Raises:
        UpcycleError: there is none.
    """
    if path.is_file() and path.suffix == ".json":
        return path
    found = [path / place for place in PLACES if (path / place).is_file()]
    if not found:
        what = "has no expansion plan" if path.exists() else "does not exist"
        raise UpcycleError(
            f"{path} {what}; expected a run folder, its stage folders expand, assemble or posttrain, a mixture of "
            f"experts made by upcycle (it carries {LINEAGE}), or a plan.json"
        )
    return found[0]


def describe(path: Path) -> None:
    """Which stage made a folder, from what; what kind of model it holds."""
    if not path.is_dir():
        return
    manifest = read_manifest(path)
    if manifest is not None:
        made_of = ", ".join(f"{name} {content[:10]}" for name, content in manifest.inputs.items())
        version = manifest.versions["upcycle"]
        say(f"{path}: stage {manifest.stage}, seed {manifest.seed}, upcycle {version}; from {made_of}")
    config = path / "config.json"
    if config.is_file():
        fields = json.loads(config.read_text())
        experts = fields.get("num_local_experts") or fields.get("num_experts")
        say(f"{path}: {fields['model_type']}, {experts} experts, top-{fields.get('num_experts_per_tok')}")


def lineage_tree(plan: ExpansionPlan) -> Tree:
    """Each expert under the younger of its parents, the sources at the root."""
    root = Tree(f"lineage ({plan.merge}, drop rate {plan.drop_rate}, seed {plan.seed})")
    branches: list[Tree] = []
    for index, expert in enumerate(plan.experts):
        above = branches[max(expert.parents)] if expert.parents else root
        branches.append(above.add(expert_line(index, expert)))
    return root


def expert_line(index: int, expert: Expert) -> str:
    """`E5 child-5 = 0.26 E0 + 0.74 E1 (their similarity 0.65)`."""
    line = f"E{index} {expert.name}"
    if not expert.parents:
        return line
    return f"{line} = {merged_from(expert)} (their similarity {expert.similarity:.3f})"


def _cell(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"
