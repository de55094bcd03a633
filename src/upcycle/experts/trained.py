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


def outcome(recipe: Recipe, base: Mapping | Dense) -> tuple[str, int, int]:
    """What the base becomes, in words; its parameters in all, and those that a token uses."""
    m, k = recipe.expand.num_experts, recipe.assemble.num_experts_per_tok
    if (moe := moe_of(recipe, base)) is not None:
        return str(moe.family), moe.num_parameters(), moe.num_parameters(k)
    added, config = _added(recipe, base.config) or 0, base.config
    plain = f"folds to {base.family.moe.model_type}" if isinstance(base, Mapping) else "has no exact plain MoE"
    shared = base.num_dense + m * config["hidden_size"] * config["num_hidden_layers"]  # and routers
    return f"a mixture of adapters on {config['model_type']}, which {plain}", shared + m * added, shared + k * added


def moe_of(recipe: Recipe, base: Mapping | Dense) -> Mapping | None:
    """The mapping to the MoE that is trained; None where experts are additions to the base."""
    return base if isinstance(base, Mapping) and _added(recipe, base.config) is None else None


def _added(recipe: Recipe, config: Config) -> int | None:
    """Parameters of an expert that is an addition to the base."""
    addition = KINDS[recipe.prepare.train].addition
    return None if addition is None else addition(config, recipe)


def _part(name: str) -> str:
    if ".gate." in name or ".router." in name:
        return "router"
    return "experts" if ".experts." in name else "shared"
