"""The experts of the plan side by side under a random router, which router initialization gives a better start."""

from collections.abc import Sequence
from pathlib import Path

from upcycle.experts.kind import Kind
from upcycle.recipe import Recipe
from upcycle.records.plan import ExpansionPlan
from upcycle.routing.routers import random_routers
from upcycle.weights.base import Base


def assemble(
    kind: Kind, base: Base, folders: Sequence[Path], plan: ExpansionPlan, recipe: Recipe, out_dir: Path
) -> None:
    """Write the MoE before any training of its own.

    Args:
        folders: every prepared checkpoint, in order.

    Raises:
        UpcycleError: see the kind's `assemble`.
    """
    hidden = base.config["hidden_size"]
    routers = random_routers(base.num_moe_layers, len(plan.experts), hidden, recipe.route.init_std, recipe.seed)
    kind.assemble(base, folders, plan, recipe.assemble, recipe.lora, routers, out_dir)
