"""Dense tuning for as many training tokens as a run had: which runs are that, and the command that makes one."""

import shlex
from pathlib import Path
from typing import Any

from upcycle.pipeline.stages import training_tokens
from upcycle.recipe import Recipe, written
from upcycle.records.comparison import Found
from upcycle.records.files import PLAN, RECIPE, ROUTE, run_of
from upcycle.records.plan import ExpansionPlan
from upcycle.settings import TrainingSettings


def is_dense(plan: ExpansionPlan) -> bool:
    """Whether it is of one expert, which is a dense model."""
    return len(plan.experts) * plan.granularity == 1


def dense_variant(folder: Path, found: Found) -> int | None:
    """Place of the variant that is dense tuning: the reference, or else the one with the lowest held-out loss.

    Args:
        folder: of the comparison; where a variant's runs are gone, it counts as none.
    """
    seeds = [runs[0].seed for runs in found.variants.values()]
    plans = [PLAN.known_of(run_of(folder, number, seed)) for number, seed in enumerate(seeds)]
    losses = [row.metric("loss") for row in found.summary]
    places = [number for number, plan in enumerate(plans) if plan is not None and is_dense(plan)]
    return min(places, key=lambda n: (losses[n].difference is not None, losses[n].mean), default=None)


def comparing_command(run: Path, recipe: Recipe) -> str:
    """That compares a run's recipe with dense tuning for the same training tokens, with several seeds.

    The few tokens that a router's start has trained on are not made up for: such a comparison has to be forced.
    """
    path, force = str(RECIPE.of(run)), " --force" if training_tokens(run).get(ROUTE) else ""
    variants = (f"dense: {shlex.join([path, *dense_overrides(recipe)])}", f"MoE: {shlex.quote(path)}")
    return f"upcycle compare {' '.join(map(shlex.quote, variants))} --seeds 5 --out FOLDER{force}"


def dense_overrides(recipe: Recipe) -> list[str]:
    """`section.field=value` of what has to change for one expert that is trained for the whole budget, as in `sft`.

    It has the training settings of preparation, which is dense tuning too, and as many rows held out for a router.
    """
    given, expand, posttrain = bool(recipe.prepare.checkpoints), recipe.expand, recipe.posttrain
    start = "last" if given else "base"
    wanted: dict[str, Any] = {
        "expand.num_experts": 1,
        "expand.copies_of": start,
        "expand.perturb": "none",
        "expand.spread": 1.0,
        "expand.keep_base": False,
        "expand.num_checkpoints": None,
        "expand.select": "uniform",
        "assemble.num_experts_per_tok": 1,
        "assemble.granularity": 1,
        "assemble.channels": "contiguous",
        "assemble.shared": start,
        "route.start": "random",
        "route.expert_learning_rate": None,
        "route.slice_noise": 0.0,
        "route.min_samples_per_expert": recipe.route.min_samples_per_expert * expand.num_experts,
        "posttrain.optimizer_state": "fresh",
        "posttrain.freeze": "none",
        "posttrain.router_aux_loss_coef": 0.0,
        "posttrain.experts_rate": 1.0,
        "posttrain.shared_rate": 1.0,
        "posttrain.router_rate": 1.0,
        "posttrain.balance_over": "slices",
        "devices.fsdp": 1,
        "devices.replicate": 1,
        "devices.ep": 1,
    }
    if recipe.tunes:
        shared = set(TrainingSettings.model_fields) - {"epochs", "checkpoint_every"}
        wanted |= {f"posttrain.{name}": getattr(recipe.prepare, name) for name in sorted(shared)}
        wanted["posttrain.epochs"] = wanted["posttrain.checkpoint_every"] = recipe.prepare.epochs + posttrain.epochs
    return [f"{name}={written(value)}" for name, value in wanted.items() if value != _setting(recipe, name)]


def _setting(recipe: Recipe, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(recipe, section), field)
