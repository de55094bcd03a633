"""The form of a row of the table of families, and what rows are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from upcycle.architectures.layouts import SEPARATE, DenseLayout, MoeLayout
from upcycle.architectures.moves import Rewrite, Rule
from upcycle.types import Config

Condition = Callable[[Config], str | None]
"""None where the mapping is exact; otherwise what stands against it, and what would work."""


@dataclass(frozen=True)
class Moe:
    """A MoE architecture."""

    model_type: str
    architecture: str
    """Class that loads it."""
    layout: MoeLayout
    experts_field: str = "num_experts"
    """What its config.json calls the number of experts."""
    size_field: str = "moe_intermediate_size"
    """What it calls an expert's channels."""
    active_field: str = "num_experts_per_tok"
    """What it calls the number of experts for a token."""
    partial: Literal["no", "first", "any"] = "no"
    """Which layers can keep one FFN."""
    routing: Literal["softmax", "sigmoid", "normed"] = "softmax"
    """The weights of a token's experts: their logits' softmax, their sigmoids over their sum, or the softmax for a
    hidden state that the router normalises."""
    least_experts: int = 1
    """Its router compares so many."""


@dataclass(frozen=True)
class Family:
    """How a dense architecture maps onto a MoE one."""

    dense: str
    """`model_type` of the dense configuration."""
    moe: Moe
    config: Callable[[Config], Config]
    """The MoE's own fields for a dense configuration, beside COPIED and the number of experts."""
    conditions: tuple[Condition, ...] = ()
    layout: DenseLayout = SEPARATE
    moves: tuple[Rule, ...] = ()
    """Tensors outside the FFNs that are not copied under the same name."""
    idle: tuple[str, ...] = ()
    """Fields that mean nothing in the models which meet the conditions, or go into the weights."""
    down: Callable[[Config], Rewrite | None] = lambda _: None
    """What is done to the FFN's down projection."""
    note: str = ""
    """Which of these models, in a few words, for `listing`."""

    def __str__(self) -> str:
        return f"{self.dense} -> {self.moe.model_type}"


def only(field: str, *exact: Any) -> Condition:
    """The field has one of these values, the first where it is missing."""

    def check(config: Config) -> str | None:
        value = config.get(field, exact[0])
        return None if value in exact else f"{field}={value!r} would be lost (exact with {field}={exact[0]!r})"

    return check


def plain_rope(config: Config) -> str | None:
    """All of a head's channels are rotated, in all layers alike."""
    rope = config.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial_rotary_factor={rope['partial_rotary_factor']} would be lost (exact with 1.0)"
    if rope.get("llama_4_scaling_beta"):
        return f"llama_4_scaling_beta={rope['llama_4_scaling_beta']} would be lost (exact with 0)"
    return None


def one_kind_of_layer(config: Config) -> str | None:
    """No mixture of windows and full attention."""
    kinds = sorted(set(config.get("layer_types") or ()))
    return f"its layers mix {' and '.join(kinds)} (exact if all are of one kind)" if len(kinds) > 1 else None


NO_BIAS = (only("attention_bias", False, None), only("mlp_bias", False, None))
