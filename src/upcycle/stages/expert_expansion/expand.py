"""Compare the checkpoints, plan the experts, show the plan."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from upcycle.console import say, table
from upcycle.errors import counted
from upcycle.experts.kind import Kind
from upcycle.records.files import PLAN
from upcycle.records.plan import Checkpoint, ExpansionPlan
from upcycle.settings import ExpandSettings
from upcycle.stages.expert_expansion.plan import make_plan
from upcycle.weights.base import Base

MEASURES = {"cosine": "cosine: 1 is the same direction", "l2": "minus the squared distance: 0 is the same"}
NOTE = (
    "similarity: of two experts' differences from the base ({}); norm: size of that difference; "
    "least and most similar: to any other expert"
)
"""What the columns of the plan's table are."""


def expand(
    kind: Kind,
    base: Base,
    checkpoints: Sequence[Checkpoint],
    folders: Sequence[Path],
    settings: ExpandSettings,
    seed: int,
    out_dir: Path,
) -> ExpansionPlan:
    """Write `plan.json`: how m experts come from the checkpoints. No expert is made here.

    Args:
        folders: those of the checkpoints.

    Raises:
        UpcycleError: see `make_plan` and the kind's `compare`.
    """
    gram, measure = kind.compare(base, folders, settings, seed)
    plan = make_plan(checkpoints, gram, settings, seed, measure, kind.merge_rule(settings))
    PLAN.write(out_dir, plan)
    left_out = sorted({c.name for c in checkpoints} - {e.name for e in plan.sources})
    if left_out and settings.copies_of == "none":
        why = f"expand.select={settings.select}"
        say(f"expand: {counted(len(left_out), 'checkpoint')} not among the experts ({why}): {', '.join(left_out)}")
    show_plan(plan)
    return plan


def show_plan(plan: ExpansionPlan) -> None:
    """The lineage and how alike the experts are, on the terminal."""
    similarity = plan.similarities
    rows = []
    for i, (label, expert) in enumerate(zip(plan.labels, plan.experts, strict=True)):
        others = np.delete(similarity[i], i)
        parents = "" if expert.similarity is None else f"{expert.similarity:.3f}"
        norm = f"{plan.gram[i][i] ** 0.5:.3g}"
        least, most = ("", "") if np.isnan(others).all() else (f"{f(others):.3f}" for f in (np.nanmin, np.nanmax))
        rows.append((label, expert.merged_from, parents, norm, least, most))
    columns = ("expert", "merged from", "parents' similarity", "norm", "least similar", "most similar")
    title = f"expansion plan (similarity: {plan.similarity}, {plan.merge}, drop rate {plan.drop_rate})"
    table(title, columns, rows, note=NOTE.format(MEASURES[plan.similarity]))
