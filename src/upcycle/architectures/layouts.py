"""Where the tensors of dense and MoE models lie on disk, and which goes where.

Legend: E experts, I intermediate size, H hidden size.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from upcycle.types import Config

MOE_LAYERS = "upcycle_moe_layers"
"""Field of a dense configuration in memory: the layers that become sparse, in order; without it all do."""
SHARED_EXPERT_SIZE = 256
"""Channels of a shared expert of zeros: size 0 would do for transformers, but vLLM refuses it; 256 suits quantizers."""

SINK = -1e4
"""Its exponential is 0 beside that of any score, and all dtypes have it."""


@dataclass(frozen=True)
class Place:
    """An FFN weight on disk: a tensor, or the `part`-th of `of` equal runs of its rows."""

    tensor: str
    """Without `model.layers.{layer}.`; `{expert}` is filled in for a MoE."""
    part: int = 0
    of: int = 1


@dataclass(frozen=True)
class DenseLayout:
    """The FFN weights `gate`, `up` (I, H) and `down` (H, I) of a dense layer."""

    gate: Place
    up: Place
    down: Place
    qkv: str | None = None
    """A tensor that holds the rows of q_proj, k_proj and v_proj, if they are not tensors of their own."""


@dataclass(frozen=True)
class MoeLayout:
    """The FFN weights of an expert, and the router, of a MoE layer."""

    gate: Place
    up: Place
    down: Place
    router: str
    """The router's weight (E, H) on disk."""
    stacked: bool = False
    """Whether one tensor holds all experts, (E, rows, columns)."""
    shared_expert: str | None = None
    """A shared expert that the architecture insists on; all zeros, it adds nothing and gets no gradient."""
    qkv_bias: bool = False
    """Whether readers (vLLM) take biases of q, k and v for granted; of a dense model without, they are zeros."""
    selection_bias: str | None = None
    """A bias (1, E) that the choice of experts insists on; zeros leave it to the router."""
    sinks: str | None = None
    """Logits (heads,) that attention insists on beside those of the tokens; all SINK, they take no share of it."""


SEPARATE = DenseLayout(Place("mlp.gate_proj.weight"), Place("mlp.up_proj.weight"), Place("mlp.down_proj.weight"))
FUSED = DenseLayout(
    Place("mlp.gate_up_proj.weight", 0, 2),
    Place("mlp.gate_up_proj.weight", 1, 2),
    Place("mlp.down_proj.weight"),
    qkv="self_attn.qkv_proj.weight",
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
    sinks="self_attn.sinks",
)


@dataclass(frozen=True)
class Region:
    """A run of rows of a tensor on disk; a row is a run of the last dimension (of one element in a vector)."""

    tensor: str
    full: tuple[int, ...]
    """Shape of the whole tensor."""
    row: int
    """First row, counted over all leading dimensions."""
    shape: tuple[int, ...]
    """(rows, width), or (length,) of a vector."""

    @property
    def element(self) -> int:
        """First element in the tensor."""
        return self.row * prod(self.shape[1:])

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class SharedMove:
    """A run of rows that every token passes: attention, norms, embeddings."""

    dense: Region
    moe: Region


@dataclass(frozen=True)
class FfnMove:
    """A weight of a layer's FFN, and where it lies for each expert."""

    dense: Region
    experts: tuple[tuple[Region, ...], ...]
    """The slices of each."""
    down: bool
    """Whether the FFN's channels are its columns."""


def ffn_moves(dense: DenseLayout, moe: MoeLayout, config: Config, num_experts: int, granularity: int) -> list[FfnMove]:
    """Every FFN weight, layer by layer; slice g of expert e is the MoE's expert e G + g."""
    sliced = _ffn_shapes({**config, "intermediate_size": config["intermediate_size"] // granularity})
    total = num_experts * granularity

    def move(layer: int, source: Place, target: Place, shape: tuple[int, int], part: tuple[int, int]) -> FfnMove:
        slices = [_region(target, _prefix(layer), part, e, total, moe.stacked) for e in range(total)]
        experts = tuple(tuple(slices[e : e + granularity]) for e in range(0, total, granularity))
        return FfnMove(_region(source, _prefix(layer), shape), experts, target is moe.down)

    return [
        move(layer, *weight)
        for layer in moe_layers(config)
        for weight in zip(_ffn(dense), _ffn(moe), _ffn_shapes(config), sliced, strict=True)
    ]


def ffn_regions(dense: DenseLayout, config: Config) -> list[Region]:
    """Every FFN weight of a dense model that becomes an expert's, layer by layer."""
    pairs = list(zip(_ffn(dense), _ffn_shapes(config), strict=True))
    return [_region(place, _prefix(layer), shape) for layer in moe_layers(config) for place, shape in pairs]


def ffn_tensors(dense: DenseLayout, config: Config) -> list[str]:
    """The names of the tensors that hold these weights, layer by layer."""
    return list(dict.fromkeys(region.tensor for region in ffn_regions(dense, config)))


def shared_moves(dense: DenseLayout, config: Config, shapes: dict[str, tuple[int, ...]]) -> list[SharedMove]:
    """The tensors `shapes` (all but the FFNs'), under the same names, except that a fused q, k, v is split."""
    return [move for name, shape in shapes.items() for move in _shared(dense, config, name, shape)]


def _shared(dense: DenseLayout, config: Config, name: str, shape: tuple[int, ...]) -> Iterator[SharedMove]:
    if dense.qkv is None or not name.endswith(dense.qkv):
        whole = Region(name, shape, 0, shape)
        yield SharedMove(whole, whole)
        return
    row, width = 0, head_dim(config)
    keys = config["num_key_value_heads"] * width
    for part, rows in (("q_proj", config["num_attention_heads"] * width), ("k_proj", keys), ("v_proj", keys)):
        run = (rows, *shape[1:])
        yield SharedMove(Region(name, shape, row, run), Region(name.replace("qkv_proj", part), run, 0, run))
        row += rows


def router_tensors(moe: MoeLayout, config: Config) -> list[str]:
    """The router's weight of every sparse layer."""
    return [_prefix(layer) + moe.router for layer in moe_layers(config)]


def zero_biases(moe: MoeLayout, config: Config) -> dict[str, tuple[int, ...]]:
    """Biases that a reader insists on, of a dense model that has none."""
    if not moe.qkv_bias:
        return {}
    width = head_dim(config)
    sizes = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    return {
        f"{_prefix(layer)}self_attn.{part}_proj.bias": (heads * width,)
        for layer in range(config["num_hidden_layers"])
        for part, heads in sizes.items()
    }


def zero_tensors(moe: MoeLayout, config: Config, num_experts: int) -> dict[str, tuple[int, ...]]:
    """Tensors that the architecture insists on and that are all zeros, of its sparse layers."""
    shapes = _shared_expert(moe, config)
    if moe.selection_bias is not None:
        shapes[moe.selection_bias] = (1, num_experts)
    return {_prefix(layer) + name: shape for layer in moe_layers(config) for name, shape in shapes.items()}


def _shared_expert(moe: MoeLayout, config: Config) -> dict[str, tuple[int, ...]]:
    if moe.shared_expert is None:
        return {}
    hidden, size = config["hidden_size"], SHARED_EXPERT_SIZE
    shapes = {
        ".gate_proj": (size, hidden),
        ".up_proj": (size, hidden),
        ".down_proj": (hidden, size),
        "_gate": (1, hidden),
    }
    return {f"{moe.shared_expert}{part}.weight": shape for part, shape in shapes.items()}


def sink_tensors(moe: MoeLayout, config: Config) -> dict[str, tuple[int, ...]]:
    """Attention sinks that the architecture insists on, of a dense model that has none."""
    layers = range(config["num_hidden_layers"] if moe.sinks else 0)
    return {f"{_prefix(layer)}{moe.sinks}": (config["num_attention_heads"],) for layer in layers}


def moe_layers(config: Config) -> list[int]:
    """The layers with experts: of a dense model those that will have them, of a MoE those that do."""
    dense = set(config.get("mlp_only_layers") or ())
    return list(config.get(MOE_LAYERS) or (n for n in range(config["num_hidden_layers"]) if n not in dense))


def head_dim(config: Config) -> int:
    """Width of an attention head, said or implied."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def layer_of(tensor: str) -> int | None:
    """The decoder layer that a tensor belongs to, None for embeddings and the last norm."""
    match = re.match(r"model\.layers\.(\d+)\.", tensor)
    return int(match[1]) if match else None


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def _ffn(layout: DenseLayout | MoeLayout) -> tuple[Place, Place, Place]:
    return layout.gate, layout.up, layout.down


def _ffn_shapes(config: Config) -> tuple[tuple[int, int], ...]:
    hidden, channels = config["hidden_size"], config["intermediate_size"]
    return (channels, hidden), (channels, hidden), (hidden, channels)


def _region(
    place: Place, prefix: str, shape: tuple[int, int], expert: int = 0, num_experts: int = 1, stacked: bool = False
) -> Region:
    rows, width = shape
    full = (num_experts, place.of * rows, width) if stacked else (place.of * rows, width)
    first = expert * place.of * rows if stacked else 0
    return Region(prefix + place.tensor.format(expert=expert), full, first + place.part * rows, shape)
