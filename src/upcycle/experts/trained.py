"""What each training changes of which model: of the dense one in preparation, of the MoE after it."""

from collections.abc import Callable
from dataclasses import dataclass

from upcycle.architectures.layouts import in_memory
from upcycle.architectures.mapping import Mapping
from upcycle.architectures.moves import ffn_tensors
from upcycle.experts.kinds import KINDS
from upcycle.experts.structure import Dense
from upcycle.recipe import Recipe
from upcycle.types import Config


@dataclass(frozen=True)
class Trained:
    """A model, and its parameters that get a gradient."""

    config: Config
    names: Callable[[str], bool]
    """Whether one does."""
    added: int = 0
    """Parameters of adapters, which alone do then."""


def prepared(recipe: Recipe, base: Mapping | Dense) -> Trained:
    """In preparation."""
    if (added := _added(recipe, base.config)) is not None:
        return Trained(base.config, lambda _: False, added)
    if recipe.prepare.train != "ffn":
        return Trained(base.config, lambda _: True)
    assert isinstance(base, Mapping)
    ffns = set(map(in_memory, ffn_tensors(base.family.layout, base.config)))
    return Trained(base.config, ffns.__contains__)


def posttrained(recipe: Recipe, base: Mapping | Dense) -> Trained:
    """In post-training."""
    if (added := _added(recipe, base.config)) is not None:
        return Trained(base.config, lambda _: False, recipe.expand.num_experts * added)
    assert isinstance(base, Mapping)  # an expert that is an FFN has a place in a MoE
    moe, frozen = base.moe_config(recipe.assemble.num_experts_per_tok, "float32"), recipe.posttrain.freeze
    return Trained(moe, lambda name: _part(name) != frozen)


def _added(recipe: Recipe, config: Config) -> int | None:
    """Parameters of an expert that is an addition to the base."""
    addition = KINDS[recipe.prepare.train].addition
    return None if addition is None else addition(config, recipe)


def _part(name: str) -> str:
    if ".gate." in name or ".router." in name:
        return "router"
    return "experts" if ".experts." in name else "shared"
