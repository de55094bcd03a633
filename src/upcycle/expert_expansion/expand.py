"""Stage 2 as the pipeline calls it: compare, plan, show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from upcycle.artifacts import Checkpoint, ExpansionPlan, Expert
from upcycle.console import say, table
from upcycle.expert_expansion.gram import task_vector_gram
from upcycle.expert_expansion.plan import Gram, expert_similarities, make_plan
from upcycle.merging.lineage import Child
from upcycle.recipe import ExpandSettings

PLAN = "plan.json"


def expand(
    base: Path,
    checkpoints: Sequence[Checkpoint],
    folders: Sequence[Path],
    settings: ExpandSettings,
    seed: int,
    out_dir: Path,
) -> ExpansionPlan:
    """Write `plan.json`: how m experts come from the checkpoints. No expert is made here.

    Raises:
        UpcycleError: see `make_plan` and `task_vector_gram`.
    """

    def measure(experts: Sequence[Expert]) -> Gram:
        sources = [base if e.checkpoint is None else folders[e.checkpoint] for e in experts if e.kind != "child"]
        children = [Child(e.parents, e.weights) for e in experts if e.kind == "child"]
        return task_vector_gram(base, sources, children, settings.merge, settings.drop_rate, seed)

    plan = make_plan(checkpoints, task_vector_gram(base, folders), settings, seed, measure)
    plan.save(out_dir / PLAN)
    left_out = sorted({c.name for c in checkpoints} - {e.name for e in plan.sources})
    if left_out:
        why = f"expand.select={settings.select}"
        say(f"expand: {len(left_out)} checkpoints are not experts ({why}): {', '.join(left_out)}")
    show_plan(plan)
    return plan


def merged_from(expert: Expert) -> str:
    """`0.26 E0 + 0.74 E1`; empty for an expert that is not merged."""
    return " + ".join(f"{w:.2f} E{p}" for p, w in zip(expert.parents, expert.weights, strict=True))


def show_plan(plan: ExpansionPlan) -> None:
    """The lineage and how alike the experts are, on the terminal."""
    similarity = expert_similarities(plan)
    rows = []
    for i, expert in enumerate(plan.experts):
        others = np.delete(similarity[i], i)
        parents = "" if expert.similarity is None else f"{expert.similarity:.3f}"
        norm = f"{plan.gram[i][i] ** 0.5:.3g}"
        least, most = ("", "") if np.isnan(others).all() else (f"{f(others):.3f}" for f in (np.nanmin, np.nanmax))
        rows.append((f"E{i} {expert.name}", merged_from(expert), parents, norm, least, most))
    columns = ("expert", "merged from", "their similarity", "norm", "least similar", "most similar")
    table(f"expansion plan (similarity: {plan.similarity}, {plan.merge}, drop rate {plan.drop_rate})", columns, rows)
