"""The optimizer state of the dense model's training, brought into the MoE that is made of it.

The moments go the way of the weights: each is a dense model that the kind assembles, every expert a copy of its FFN.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from upcycle.experts.kind import Kind
from upcycle.experts.kinds import load_model
from upcycle.recipe import Recipe
from upcycle.records.plan import ExpansionPlan, Expert
from upcycle.routing.routers import parts
from upcycle.training.checkpoints import step_of
from upcycle.training.moments import NAMES, Moments
from upcycle.types import Model
from upcycle.weights.base import Base


def carried(
    kind: Kind, base: Base, prepared: Path, last: Path, plan: ExpansionPlan, recipe: Recipe, model: Model, scratch: Path
) -> Moments:
    """AdamW's state for every parameter of the MoE that was trained before; the others, and the routers, begin anew.

    An expert gets the share k/m of the tokens, each with a weight of about 1/k: its mean gradient is 1/m of the dense
    model's, and the mean square of it, being noise for the most part, (k/m) / k^2.

    Args:
        prepared: the folder with the dense model's moments.
        last: the checkpoint that they are of, whose name says after how many steps.
        model: the MoE in memory.
        scratch: where the assembled moments lie until they are read.
    """
    m, k = len(plan.experts), recipe.assemble.num_experts_per_tok
    scales = {"shared": dict.fromkeys(NAMES, 1.0), "experts": dict(zip(NAMES, (1 / m, 1 / (m * k)), strict=True))}
    part_of = {id(parameter): part for part, parameter in parts(model)}
    names = {name: part_of[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    states: dict[str, dict[str, Tensor]] = {}
    for moment in NAMES:
        found = _assembled(kind, base, prepared / moment, plan, recipe, scratch)
        for name in names.keys() & found.keys():
            if names[name] != "router":
                states.setdefault(name, {})[moment] = found[name].mul_(scales[names[name]][moment])
    trained = {name: state for name, state in states.items() if state[NAMES[-1]].any()}
    return {name: {**state, "step": torch.tensor(float(step_of(last)))} for name, state in trained.items()}


def _assembled(
    kind: Kind, base: Base, dense: Path, plan: ExpansionPlan, recipe: Recipe, scratch: Path
) -> dict[str, Tensor]:
    """A moment of the dense model under the names that the MoE's parameters have in memory."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shape = len(plan.experts), base.config["hidden_size"]
    routers = [torch.zeros(shape) for _ in range(base.num_moe_layers)]
    settings = recipe.assemble.model_copy(update={"shared": "last", "dtype": "float32"})
    kind.assemble(base, [dense], _copies(plan), settings, recipe.lora, routers, scratch, moments=True)
    found = {name: p.data for name, p in load_model(scratch, torch.float32, base=base.folder).named_parameters()}
    shutil.rmtree(scratch)
    return found


def _copies(plan: ExpansionPlan) -> ExpansionPlan:
    """As many experts as the plan has, all of the one checkpoint."""
    m = len(plan.experts)
    return ExpansionPlan(
        experts=tuple(Expert(name=f"copy-{i}", kind="checkpoint", checkpoint=0) for i in range(m)),
        merge="linear",
        drop_rate=0.0,
        seed=plan.seed,
        similarity=plan.similarity,
        gram=((0.0,) * m,) * m,
        adapters=plan.adapters,
    )
