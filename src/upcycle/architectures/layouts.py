"""Where the FFNs, the routers and the constants of dense and MoE models lie on disk.

Legend: E experts, I intermediate size, H hidden size.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from upcycle.types import Config
from upcycle.weights.names import BACKBONE_EMBEDDINGS, EMBEDDINGS

Shape = tuple[int, ...]
MOE_LAYERS = "upcycle_moe_layers"
"""Field of a dense configuration in memory: the layers that become sparse, in order; without it all with an FFN do."""
SHARED_EXPERT_SIZE = 256
"""Channels of a shared expert of zeros: size 0 would do for transformers, but vLLM refuses it; 256 suits quantizers."""
PREFIX = "first_k_dense_replace"
ADJUSTED = "block_auto_adjust_ff_dim"
"""Field of LFM2's that makes its FFN another size than the configuration says."""
SINK = -1e4
"""Its exponential is 0 beside that of any score, and all dtypes have it."""


@dataclass(frozen=True)
class Place:
    """An FFN weight on disk: a tensor, or the `part`-th of `of` equal runs of its rows."""

    tensor: str
    """Without what `prefix` gives; `{expert}` is filled in for a MoE."""
    part: int = 0
    of: int = 1


@dataclass(frozen=True)
class DenseLayout:
    """The FFN weights `gate`, `up` (I, H) and `down` (H, I) of a dense layer."""

    gate: Place | None
    """None: the FFN has no gate."""
    up: Place
    down: Place
    size_field: str = "intermediate_size"
    """What config.json calls I."""
    body: str = "model"
    """What the names of all tensors but the head's begin with."""
    embeddings: str = EMBEDDINGS


@dataclass(frozen=True)
class Constant:
    """A tensor that a MoE's architecture insists on, filled with one value so that it changes nothing."""

    tensor: str
    """Without what `prefix` gives."""
    shape: tuple[int | str, ...]
    """Numbers, or names of `sizes`."""
    value: float | Callable[[Config], float] = 0.0
    every_layer: bool = False
    """Whether layers without experts have it too."""
    trains: bool = True
    """Whether post-training may change it."""


@dataclass(frozen=True)
class MoeLayout:
    """The FFN weights of an expert, and the router, of a MoE layer."""

    gate: Place | None
    up: Place
    down: Place
    router: str
    """The router's weight (E, H) on disk."""
    stacked: bool = False
    """Whether one tensor holds all experts, (E, rows, columns)."""
    body: str = "model"
    constants: tuple[Constant, ...] = ()
    """What the model has beside them; a constant that the dense model has itself is copied."""


def ffn(layout: DenseLayout | MoeLayout) -> list[Place]:
    """Gate (if there is one), up and down."""
    return [place for place in (layout.gate, layout.up, layout.down) if place is not None]


def sizes(config: Config, num_experts: int, expert_size: int) -> dict[str, int]:
    """What the shapes of constants are made of.

    Args:
        config: of the dense model.
        num_experts: as the MoE counts them, slices for G > 1.
        expert_size: channels of one of them.
    """
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    return {
        "hidden": config["hidden_size"],
        "heads": heads,
        "queries": heads * head_dim(config),
        "keys": keys * head_dim(config),
        "experts": num_experts,
        "expert": expert_size,
    }


def shared_expert(module: str, size: int | str, *inputs: str) -> tuple[Constant, ...]:
    """An FFN of zeros: it adds nothing, and gets no gradient."""
    first = [Constant(f"{module}.{part}_proj.weight", (size, "hidden")) for part in inputs]
    return *first, Constant(f"{module}.down_proj.weight", ("hidden", size))


QKV_BIAS = tuple(
    Constant(f"self_attn.{part}_proj.bias", (size,), every_layer=True)
    for part, size in (("q", "queries"), ("k", "keys"), ("v", "keys"))
)
"""Biases that readers (vLLM) take for granted, of a dense model without."""
SHARED_EXPERT = (
    *shared_expert("mlp.shared_expert", SHARED_EXPERT_SIZE, "gate", "up"),
    Constant("mlp.shared_expert_gate.weight", (1, "hidden")),
)
HUNYUAN_SHARED_EXPERT = shared_expert("mlp.shared_mlp", "expert", "gate", "up")
GLM_SHARED_EXPERT = shared_expert("mlp.shared_experts", "expert", "gate", "up")
GRANITE_SHARED_EXPERT = (
    Constant("shared_mlp.input_linear.weight", (2 * SHARED_EXPERT_SIZE, "hidden")),
    Constant("shared_mlp.output_linear.weight", ("hidden", SHARED_EXPERT_SIZE)),
)
SINKS = Constant("self_attn.sinks", ("heads",), SINK, every_layer=True)
"""Logits that attention insists on beside those of the tokens; they take no share of it."""

OPEN_GATE = (
    Constant("self_attn.gate_proj.weight", ("queries", "hidden"), every_layer=True),
    Constant("self_attn.gate_bias", ("heads",), every_layer=True),
)
"""A gate of what attention gives, whose sigmoid is 1/2 everywhere."""


def selection_bias(tensor: str, rows: tuple[int, ...] = ()) -> Constant:
    """A bias (*rows, E) of the choice of experts; zeros leave it to the router."""
    return Constant(tensor, (*rows, "experts"))


SEPARATE = DenseLayout(Place("mlp.gate_proj.weight"), Place("mlp.up_proj.weight"), Place("mlp.down_proj.weight"))
FUSED = DenseLayout(
    Place("mlp.gate_up_proj.weight", 0, 2), Place("mlp.gate_up_proj.weight", 1, 2), Place("mlp.down_proj.weight")
)
MIXTRAL_LAYOUT = MoeLayout(
    Place("block_sparse_moe.experts.{expert}.w1.weight"),
    Place("block_sparse_moe.experts.{expert}.w3.weight"),
    Place("block_sparse_moe.experts.{expert}.w2.weight"),
    router="block_sparse_moe.gate.weight",
)
QWEN_LAYOUT = MoeLayout(
    Place("mlp.experts.{expert}.gate_proj.weight"),
    Place("mlp.experts.{expert}.up_proj.weight"),
    Place("mlp.experts.{expert}.down_proj.weight"),
    router="mlp.gate.weight",
)
GRANITE_LAYOUT = MoeLayout(
    Place("block_sparse_moe.input_linear.weight", 0, 2),
    Place("block_sparse_moe.input_linear.weight", 1, 2),
    Place("block_sparse_moe.output_linear.weight"),
    router="block_sparse_moe.router.layer.weight",
    stacked=True,
)
GRANITE_SWA_LAYOUT = MoeLayout(
    Place("block_sparse_moe.experts.gate_up_proj", 0, 2),
    Place("block_sparse_moe.experts.gate_up_proj", 1, 2),
    Place("block_sparse_moe.experts.down_proj"),
    router="block_sparse_moe.router.weight",
    stacked=True,
    constants=(SINKS,),
)
GRANITE_HYBRID_DENSE = DenseLayout(
    Place("shared_mlp.input_linear.weight", 0, 2),
    Place("shared_mlp.input_linear.weight", 1, 2),
    Place("shared_mlp.output_linear.weight"),
    size_field="shared_intermediate_size",
)
LFM2_DENSE = DenseLayout(
    Place("feed_forward.w1.weight"), Place("feed_forward.w3.weight"), Place("feed_forward.w2.weight")
)
LFM2_LAYOUT = MoeLayout(
    Place("feed_forward.experts.{expert}.w1.weight"),
    Place("feed_forward.experts.{expert}.w3.weight"),
    Place("feed_forward.experts.{expert}.w2.weight"),
    router="feed_forward.gate.weight",
    constants=(selection_bias("feed_forward.expert_bias"),),
)
NEMOTRON_DENSE = DenseLayout(
    None,
    Place("mixer.up_proj.weight"),
    Place("mixer.down_proj.weight"),
    body="backbone",
    embeddings=BACKBONE_EMBEDDINGS,
)
NEMOTRON_LAYOUT = MoeLayout(
    None,
    Place("mixer.experts.{expert}.up_proj.weight"),
    Place("mixer.experts.{expert}.down_proj.weight"),
    router="mixer.gate.weight",
    body="backbone",
    constants=(
        selection_bias("mixer.gate.e_score_correction_bias"),
        *shared_expert("mixer.shared_experts", SHARED_EXPERT_SIZE, "up"),
    ),
)

GEMMA4_LAYOUT = MoeLayout(
    Place("experts.gate_up_proj", 0, 2),
    Place("experts.gate_up_proj", 1, 2),
    Place("experts.down_proj"),
    router="router.proj.weight",
    stacked=True,
)
"""Experts beside an FFN, whose constants are those of a family."""


def with_constants(layout: MoeLayout, *constants: Constant) -> MoeLayout:
    """The same places, and more constants."""
    return replace(layout, constants=(*layout.constants, *constants))


def channels(layout: DenseLayout, config: Config) -> int:
    """I of a dense model."""
    size = int(config[layout.size_field])
    factor, multiple = config.get("block_ffn_dim_multiplier"), config.get("block_multiple_of")
    if not config.get(ADJUSTED):
        return size
    smaller = int(2 * size / 3)
    return smaller if factor is None or multiple is None else -(-int(factor * smaller) // multiple) * multiple


def resized(layout: DenseLayout, config: Config, size: int) -> Config:
    """The configuration of a dense model that differs in I alone."""
    return {**config, layout.size_field: size, **({ADJUSTED: False} if ADJUSTED in config else {})}


def ffn_layers(config: Config) -> list[int]:
    """The layers that have an FFN or experts; in some hybrids attention, mamba and FFN are layers of their own."""
    blocks = config.get("layers_block_type") or ["mlp"] * config["num_hidden_layers"]
    return [layer for layer, block in enumerate(blocks) if block in ("mlp", "moe")]


def moe_layers(config: Config) -> list[int]:
    """The layers with experts: of a dense model those that will have them, of a MoE those that do."""
    if MOE_LAYERS in config:
        return list(config[MOE_LAYERS])
    every = ffn_layers(config)
    if (kinds := config.get("mlp_layer_types") or config.get("layers_block_type")) and {"sparse", "moe"} & set(kinds):
        return [layer for layer in every if kinds[layer] in ("sparse", "moe")]
    if interval := config.get("moe_layer_interval"):
        first, last = config["moe_layer_start_index"], config["moe_layer_end_index"]
        return [layer for layer in every if first <= layer <= (last % len(every)) and (layer + 1) % interval == 0]
    dense = set(config.get("mlp_only_layers") or range(config.get("num_dense_layers") or config.get(PREFIX) or 0))
    return [layer for layer in every if layer not in dense]


def head_dim(config: Config) -> int:
    """Width of an attention head, said or implied."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def layer_of(tensor: str) -> int | None:
    """The decoder layer that a tensor belongs to, None for embeddings and the last norm."""
    match = re.match(r"\w+\.layers\.(\d+)\.", tensor)
    return int(match[1]) if match else None


def in_memory(tensor: str) -> str:
    """The name that transformers gives a decoder layer's tensor of a dense model once it is loaded."""
    return re.sub(r"^\w+\.layers\.", "model.layers.", tensor)


def prefix(layout: DenseLayout | MoeLayout, layer: int) -> str:
    """What the names of a decoder layer's tensors begin with."""
    return f"{layout.body}.layers.{layer}."
