"""Parameters that multiply a token, of which training FLOPs are counted: 6 a parameter and token.

Kaplan et al. 2020, arXiv 2001.08361, section 2.1. Frozen parameters are counted like trained ones, the scores of
attention and the embeddings' lookup not at all.
"""

from collections.abc import Callable
from dataclasses import dataclass

from upcycle.experts.structure import mapping_of, read_dense
from upcycle.recipe import Recipe
from upcycle.types import Config
from upcycle.weights.base import Base

Addition = Callable[[Config, Recipe], int]
"""(the dense model's configuration, recipe): parameters of an expert that is an addition to its FFNs."""


@dataclass(frozen=True)
class Active:
    """Parameters that multiply a token."""

    dense: int
    """Of the model that preparation trains."""
    moe: int
    """Of the MoE: its router and the experts that a token is sent to among them."""


def active_ffns(base: Base, recipe: Recipe) -> Active:
    """Where every expert is an FFN of its own."""
    mapping = mapping_of(base, recipe)
    used = mapping.num_parameters(recipe.assemble.num_experts_per_tok)
    return Active(mapping.num_dense - mapping.lookup, used - mapping.moe_lookup)


def active_additions(addition: Addition) -> Callable[[Base, Recipe], Active]:
    """Where every expert is an addition to the base's FFN."""

    def active(base: Base, recipe: Recipe) -> Active:
        found = read_dense(base)
        dense, expert = found.num_dense - found.lookup, addition(base.config, recipe)
        routers = base.config["num_hidden_layers"] * base.config["hidden_size"] * recipe.expand.num_experts
        return Active(dense + expert, dense + recipe.assemble.num_experts_per_tok * expert + routers)

    return active
