"""Stage 2 as the pipeline calls it: compare, plan, show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from upcycle.artifacts import Checkpoint, ExpansionPlan, Expert
from upcycle.console import say, table
from upcycle.errors import UpcycleError
from upcycle.expert_expansion.gram import adapter_gram, task_vector_gram
from upcycle.expert_expansion.plan import Gram, Measure, expert_similarities, make_plan
from upcycle.merging.kernels import KERNELS
from upcycle.merging.lineage import Child
from upcycle.merging.low_rank import Adapter, materialise_adapters
from upcycle.models.adapters import read_adapter
from upcycle.models.folders import read_config
from upcycle.settings import ExpandSettings

PLAN = "plan.json"


def expand(
    base: Path,
    checkpoints: Sequence[Checkpoint],
    folders: Sequence[Path],
    settings: ExpandSettings,
    adapters: bool,
    seed: int,
    out_dir: Path,
) -> ExpansionPlan:
    """Write `plan.json`: how m experts come from the checkpoints. No expert is made here.

    Args:
        adapters: the checkpoints are LoRA adapters.

    Raises:
        UpcycleError: see `make_plan`, `task_vector_gram`, `read_adapter` and `check_equal_ranks`.
    """
    gram, measure = _adapters(base, folders, settings, seed) if adapters else _models(base, folders, settings, seed)
    plan = make_plan(checkpoints, gram, settings, seed, measure, adapters)
    plan.save(out_dir / PLAN)
    left_out = sorted({c.name for c in checkpoints} - {e.name for e in plan.sources})
    if left_out and settings.copies_of == "none":
        why = f"expand.select={settings.select}"
        say(f"expand: {len(left_out)} checkpoints are not experts ({why}): {', '.join(left_out)}")
    show_plan(plan)
    return plan


def _models(base: Path, folders: Sequence[Path], settings: ExpandSettings, seed: int) -> tuple[Gram, Measure | None]:
    def measure(experts: Sequence[Expert]) -> Gram:
        sources = [base if e.checkpoint is None else folders[e.checkpoint] for e in experts if e.kind != "child"]
        children = [Child(e.parents, e.weights) for e in experts if e.kind == "child"]
        return task_vector_gram(base, sources, children, settings.merge, settings.drop_rate, seed)

    gram = task_vector_gram(base, folders) if folders else np.zeros((0, 0))
    return gram, None if KERNELS[settings.merge].linear else measure


def _adapters(base: Path, folders: Sequence[Path], settings: ExpandSettings, seed: int) -> tuple[Gram, Measure]:
    config = read_config(base)
    adapters = [read_adapter(folder, config) for folder in folders]
    if settings.adapters != "product" and len(adapters) + settings.keep_base < settings.num_experts:
        check_equal_ranks(folders, adapters)
    known: list[Adapter] = []
    gram = np.zeros((0, 0))

    def measure(experts: Sequence[Expert]) -> Gram:
        nonlocal gram
        for expert in experts[len(known) :]:
            known.append(_adapter(expert, adapters, known, settings, seed))
        gram = adapter_gram(known, gram)
        return gram

    return adapter_gram(adapters), measure


def _adapter(
    expert: Expert, checkpoints: Sequence[Adapter], known: Sequence[Adapter], settings: ExpandSettings, seed: int
) -> Adapter:
    """What an expert adds to the base, from the adapters of the experts before it."""
    if expert.kind == "child":
        child = [Child(expert.parents, expert.weights)]
        how = settings.adapters
        return materialise_adapters(known, child, settings.merge, settings.drop_rate, how, seed)[0]
    return {} if expert.checkpoint is None else checkpoints[expert.checkpoint]


def check_equal_ranks(folders: Sequence[Path], adapters: Sequence[Adapter]) -> None:
    """Raises UpcycleError if the adapters of a weight have different ranks: A and B cannot be merged apart then."""
    for folder, adapter in zip(folders, adapters, strict=True):
        for name, update in adapter.items():
            first = adapters[0].get(name, update)
            if update.rank != first.rank:
                raise UpcycleError(
                    f"{folder}: rank {update.rank} at {name}, but {first.rank} in {folders[0]}; set "
                    "expand.adapters=product, which merges products of any ranks, or as many experts as adapters"
                )


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
