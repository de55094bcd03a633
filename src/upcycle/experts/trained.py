"""What each training changes of which model: of the dense one in preparation, of the MoE after it."""

from collections.abc import Callable
from dataclasses import dataclass

from upcycle.architectures.mapping import Mapping
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


def prepared(recipe: Recipe, mapping: Mapping) -> Trained:
    """In preparation."""
    if recipe.prepare.shares_base:
        return Trained(mapping.config, lambda _: False, _adapter(recipe, mapping.config))
    ffns = recipe.prepare.train == "ffn"
    return Trained(mapping.config, lambda name: not ffns or ".mlp." in name)


def posttrained(recipe: Recipe, mapping: Mapping) -> Trained:
    """In post-training."""
    if recipe.prepare.shares_base:
        return Trained(mapping.config, lambda _: False, recipe.expand.num_experts * _adapter(recipe, mapping.config))
    moe, frozen = mapping.moe_config(recipe.assemble.num_experts_per_tok, "float32"), recipe.posttrain.freeze
    return Trained(moe, lambda name: _part(name) != frozen)


def _part(name: str) -> str:
    if name.endswith("gate.weight") or ".router." in name:
        return "router"
    return "experts" if ".experts." in name else "shared"


def _adapter(recipe: Recipe, config: Config) -> int:
    widths = int(config["hidden_size"]) + int(config["intermediate_size"])
    return int(config["num_hidden_layers"]) * recipe.lora.rank * len(recipe.lora.targets) * widths
