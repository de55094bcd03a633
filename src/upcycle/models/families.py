"""Dense families and the MoE architecture that each becomes, as rows of a table.

A row is exact: with all experts equal to the dense FFN, the MoE gives the dense model's logits (a test per row).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from upcycle.errors import UpcycleError

Config = dict[str, Any]
"""A decoded config.json."""


@dataclass(frozen=True)
class Family:
    """How a dense architecture maps onto a MoE one, in names of tensors on disk."""

    dense: str
    """`model_type` of the dense configuration."""
    moe: str
    """`model_type` of the MoE configuration."""
    architecture: str
    """Class that loads the MoE."""
    experts: dict[str, str]
    """FFN weight of a dense layer to that of an expert: `{layer}` and `{expert}` are filled in."""
    router: str
    """The router's weight (num_experts, hidden) on disk: `{layer}` is filled in."""
    gate: str
    """Path of the router module in a decoder layer, in memory."""
    config: Callable[[Config, int, int], Config]
    """(dense config, num_experts, num_experts_per_tok) to the MoE's own fields."""
    refuse: dict[str, tuple[Any, ...]]
    """Field of the dense config to the values with which the mapping is exact; others are refused."""


COMPUTES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)
"""Fields that decide what a model computes from its weights: the same in all checkpoints of a run."""

COPIED = (
    *COMPUTES,
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def _mixtral_config(dense: Config, num_experts: int, num_experts_per_tok: int) -> Config:
    # every field is written out: Mixtral's defaults (eps, theta, window, act) are not Llama's
    return {
        **{name: dense[name] for name in COPIED},
        "sliding_window": None,
        "num_local_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "router_jitter_noise": 0.0,
    }


FAMILIES = (
    Family(
        dense="llama",
        moe="mixtral",
        architecture="MixtralForCausalLM",
        experts={
            "model.layers.{layer}.mlp.gate_proj.weight": (
                "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"
            ),
            "model.layers.{layer}.mlp.up_proj.weight": (
                "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"
            ),
            "model.layers.{layer}.mlp.down_proj.weight": (
                "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"
            ),
        },
        router="model.layers.{layer}.block_sparse_moe.gate.weight",
        gate="mlp.gate",
        config=_mixtral_config,
        refuse={"attention_bias": (False, None), "mlp_bias": (False, None), "pretraining_tp": (1, None)},
    ),
)


def family_of(dense_config: Config, where: str) -> Family:
    """The row for a dense configuration.

    Raises:
        UpcycleError: no row, or a field with which the mapping would not be exact.
    """
    model_type = dense_config.get("model_type")
    supported = ", ".join(f"{f.dense} -> {f.moe}" for f in FAMILIES)
    family = next((f for f in FAMILIES if f.dense == model_type), None)
    if family is None:
        raise UpcycleError(
            f"{where}: a '{model_type}' model has no exact mixture-of-experts twin here; supported: {supported}"
        )
    for field, exact in family.refuse.items():
        if dense_config.get(field) not in exact:
            raise UpcycleError(
                f"{where}: {field}={dense_config[field]!r} cannot be kept in a {family.moe} model (it would "
                f"be dropped and the output would differ); expected {field} in {exact}"
            )
    return family


def family_of_moe(moe_config: Config) -> Family:
    """The row that made a MoE configuration.

    Raises:
        UpcycleError: not a MoE of a family here.
    """
    model_type = moe_config.get("model_type")
    family = next((f for f in FAMILIES if f.moe == model_type), None)
    if family is None:
        known = ", ".join(f.moe for f in FAMILIES)
        raise UpcycleError(f"'{model_type}' is not a mixture-of-experts model made here; known: {known}")
    return family


def moe_config(dense_config: Config, num_experts: int, num_experts_per_tok: int, dtype: str) -> Config:
    """A config.json for the MoE that transformers and the programs that read its files agree on."""
    family = family_of(dense_config, "base")
    rope = dense_config.get("rope_parameters") or {}
    return {
        "architectures": [family.architecture],
        "model_type": family.moe,
        **family.config(dense_config, num_experts, num_experts_per_tok),
        "rope_theta": rope.get("rope_theta"),  # older readers, mistral.rs among them, look here
        "output_router_logits": False,
        "use_cache": True,
        "dtype": dtype,
    }


def num_layers(config: Config) -> int:
    """Decoder layers of a dense or MoE configuration."""
    return int(config["num_hidden_layers"])


def ffn_names(family: Family, config: Config) -> list[tuple[str, str]]:
    """(dense name, expert name with `{expert}` open) of every FFN weight, layer by layer."""
    return [
        (dense.format(layer=layer), moe.replace("{layer}", str(layer)))
        for layer in range(num_layers(config))
        for dense, moe in family.experts.items()
    ]


def router_names(family: Family, config: Config) -> list[str]:
    """The router's weight of every layer."""
    return [family.router.format(layer=layer) for layer in range(num_layers(config))]
