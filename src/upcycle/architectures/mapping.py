"""A dense model and its MoE, tensor by tensor."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from upcycle.architectures.families import family_of, moe_config
from upcycle.architectures.family import Family
from upcycle.architectures.layouts import MOE_LAYERS, Shape, channels, layer_of, moe_layers, prefix, sizes
from upcycle.architectures.moves import (
    FfnMove,
    Region,
    SharedMove,
    constants,
    ffn_moves,
    ffn_regions,
    ffn_tensors,
    router_tensors,
    shared_moves,
)
from upcycle.architectures.slices import WHOLE, Slicing
from upcycle.errors import UpcycleError
from upcycle.types import Config
from upcycle.weights.folders import read_config
from upcycle.weights.names import HEAD
from upcycle.weights.safetensors_io import ModelReader, TensorSpec

Shapes = dict[str, Shape]
SLICE_MULTIPLE = 8
"""Channels: torch's grouped product wants strides of a multiple of 16 bytes."""


@dataclass(frozen=True)
class Mapping:
    """Where every tensor of a dense model goes in a MoE of `num_experts` experts."""

    where: Path
    family: Family
    config: Config
    """The dense one, with every field written out."""
    shapes: Shapes
    """The dense tensors outside the FFNs."""
    num_experts: int
    """Whole ones, of which each is `slicing.granularity` experts of the MoE."""
    slicing: Slicing = WHOLE

    @property
    def granularity(self) -> int:
        return self.slicing.granularity

    @cached_property
    def shared(self) -> list[SharedMove]:
        return shared_moves(self.family.moves, self.config, self.shapes)

    @cached_property
    def ffn(self) -> list[FfnMove]:
        family = self.family
        layouts = family.layout, family.moe.layout
        return ffn_moves(*layouts, self.config, self.num_experts, self.granularity, family.down(self.config))

    @property
    def _constants(self) -> dict[str, tuple[Shape, float]]:
        moved = {move.moe.tensor for move in self.shared}
        expert_size = channels(self.family.layout, self.config) // self.granularity
        known = sizes(self.config, self.num_experts * self.granularity, expert_size)
        found = constants(self.family.moe.layout, self.config, known)
        return {name: constant for name, constant in found.items() if name not in moved}

    @property
    def constants(self) -> dict[str, Tensor]:
        """Tensors that the MoE's architecture insists on and that change nothing."""
        return {name: torch.full(shape, value) for name, (shape, value) in self._constants.items()}

    @property
    def moe_shapes(self) -> Shapes:
        """Every tensor of the MoE."""
        slices = [region for move in self.ffn for expert in move.experts for region in expert]
        regions = [move.moe for move in self.shared] + slices
        vectors = (self.num_experts * self.granularity, self.config["hidden_size"])
        routers = dict.fromkeys(router_tensors(self.family.moe.layout, self.config), vectors)
        fixed = {name: shape for name, (shape, _) in self._constants.items()}
        return {region.tensor: region.full for region in regions} | routers | fixed

    def specs(self, dtype: torch.dtype) -> dict[str, TensorSpec]:
        return {name: TensorSpec(shape, dtype) for name, shape in self.moe_shapes.items()}

    @property
    def num_dense(self) -> int:
        """Parameters of the dense model."""
        return sum(map(prod, self.shapes.values())) + sum(r.count for r in {move.dense for move in self.ffn})

    def moe_config(self, num_experts_per_tok: int, dtype: str) -> Config:
        """The MoE's config.json, see `families.moe_config`; `num_experts_per_tok` counts whole experts."""
        per_tok = num_experts_per_tok * self.granularity
        return moe_config(
            self.family, self.config, self.num_experts * self.granularity, per_tok, dtype, self.granularity
        )

    @property
    def lookup(self) -> int:
        """Entries of embeddings that are looked up and not multiplied, as a tied model's are by the head."""
        return looked_up(self.config)

    @property
    def moe_lookup(self) -> int:
        """Those of the MoE, which is untied where embeddings and head are rewritten apart."""
        return looked_up({**self.config, **self.family.config(self.config)})

    def flops_over_dense(self, num_experts_per_tok: int) -> float:
        """FLOPs of a token over the dense model's, scores of attention left out in both."""
        return (self.num_parameters(num_experts_per_tok) - self.moe_lookup) / (self.num_dense - self.lookup)

    def widest(self, reader: ModelReader) -> torch.dtype:
        """Of the dtypes of a dense model's FFN weights."""
        return max((reader.spec(move.dense.tensor).dtype for move in self.ffn), key=lambda kind: kind.itemsize)

    def num_parameters(self, active_experts: int | None = None) -> int:
        """Of the MoE: in all, or used for a token that goes to `active_experts`; embeddings included."""
        idle = 0 if active_experts is None else self.num_experts - active_experts
        per_expert = sum(move.dense.count for move in self.ffn)
        return sum(map(prod, self.moe_shapes.values())) - idle * per_expert


def map_model(
    base: Path, reader: ModelReader, num_experts: int, slicing: Slicing = WHOLE, layers: Sequence[int] | None = None
) -> Mapping:
    """The mapping of a dense model.

    Args:
        layers: those that become sparse; None: all.

    Raises:
        UpcycleError: no exact MoE, a tensor that has no place in it, or FFNs that cannot be sliced so.
    """
    config = with_own_head(reader, with_layers(read_config(base), layers))
    family = family_of(config, str(base))
    check_shapes(reader, family, config)
    check_granularity(channels(family.layout, config), slicing.granularity, base)
    least = family.moe.least_experts
    if num_experts * slicing.granularity < least:
        raise UpcycleError(
            f"{base}: expand.num_experts is {num_experts}, but the router of {family.moe.model_type}, which this model "
            f"becomes, compares at least {least} experts"
        )
    return Mapping(base, family, config, shared_shapes(reader, family, config), num_experts, slicing)


def with_layers(config: Config, layers: Sequence[int] | None) -> Config:
    """A dense configuration that says which layers become sparse."""
    return config if layers is None else {**config, MOE_LAYERS: list(layers)}


def check_granularity(size: int, granularity: int, where: Path) -> None:
    """
    Raises:
        UpcycleError: G does not divide the FFN's channels.
    """
    if size % SLICE_MULTIPLE:
        raise UpcycleError(
            f"{where}: the FFN has {size} channels (intermediate_size), which is no multiple of {SLICE_MULTIPLE}; "
            "grouped products of experts need one"
        )
    if size % (granularity * SLICE_MULTIPLE):
        raise UpcycleError(
            f"{where}: assemble.granularity is {granularity}, which does not divide the FFN's {size} channels "
            "(intermediate_size) into a multiple of "
            f"{SLICE_MULTIPLE} each, as grouped products need; use a smaller one"
        )


def looked_up(config: Config) -> int:
    """Entries of an untied model's embeddings."""
    return 0 if config.get("tie_word_embeddings") else int(config["vocab_size"] * config["hidden_size"])


def with_own_head(reader: ModelReader, config: Config) -> Config:
    """A tied model whose file has a head of its own that differs is untied, as transformers takes it."""
    names = set(reader.names())
    if not config.get("tie_word_embeddings") or not {reader.embeddings, HEAD} <= names:
        return config
    same = torch.equal(reader.elements(reader.embeddings), reader.elements(HEAD))
    return config if same else {**config, "tie_word_embeddings": False}


def check_shapes(reader: ModelReader, family: Family, config: Config) -> None:
    """Compare embeddings, number of layers and FFN weights with config.json, before anything is made of them.

    Raises:
        UpcycleError: names the tensor, its shape, and the field.
    """
    names = reader.names()
    layers = 1 + max((layer for name in names if (layer := layer_of(name)) is not None), default=-1)
    if not layers and any(name.startswith("layers.") for name in names):
        raise UpcycleError(
            f"{reader.folder}: its tensors have no prefix 'model.', as AutoModel saves them; load the folder with "
            "AutoModelForCausalLM and save it again"
        )
    deep = next((name for name in names if ".layers." in name), None)
    if not layers and deep:
        prefix = deep.partition("model.layers.")[0] if "model.layers." in deep else deep.partition("layers.")[0]
        raise UpcycleError(
            f"{reader.folder}: its tensors are called {deep} and the like, with {prefix!r} ahead of what transformers "
            "calls them; rename them, or save the unwrapped model with save_pretrained"
        )
    if layers != config["num_hidden_layers"]:
        raise UpcycleError(
            f"{reader.folder}: config.json says num_hidden_layers={config['num_hidden_layers']}, the file has {layers}"
        )
    embeddings = family.layout.embeddings
    expected: Shapes = {embeddings: (config["vocab_size"], config["hidden_size"])}
    expected |= {region.tensor: region.full for region in ffn_regions(family.layout, config)}
    for name, shape in expected.items():
        if (found := reader.spec(name).shape) != shape:
            fields = "vocab_size, hidden_size" if name == embeddings else f"hidden_size, {family.layout.size_field}"
            raise UpcycleError(
                f"{reader.folder}: {name} has shape {found}, expected {shape} by config.json ({fields}); "
                "correct the one that is wrong"
            )


def read_region(reader: ModelReader, region: Region) -> Tensor:
    """A region's values, in its shape, as a view of the mapped file: not to be written to."""
    return reader.elements(region.tensor, region.element, region.count).view(region.shape)


def shared_shapes(reader: ModelReader, family: Family, config: Config) -> Shapes:
    """Every tensor that is not an FFN's, with its shape; what some files carry without need is left aside.

    Raises:
        UpcycleError: a tensor of an FFN has no place in a MoE.
    """
    shared = needed_tensors(reader, config) - set(ffn_tensors(family.layout, config))
    blocks = tuple(
        prefix(family.layout, layer) + family.layout.up.tensor.split(".")[0] + "." for layer in moe_layers(config)
    )
    if strange := sorted(name for name in shared if name.startswith(blocks)):
        raise UpcycleError(f"{reader.folder}: {strange[0]} has no place in the mixture of experts")
    return {name: reader.spec(name).shape for name in sorted(shared)}


def needed_tensors(reader: ModelReader, config: Config) -> set[str]:
    """The names but for those that older files repeat: the tied head, rotary frequencies that are computed anyway."""
    tied = bool(config.get("tie_word_embeddings"))
    return {n for n in reader.names() if not n.endswith("rotary_emb.inv_freq") and not (tied and n == "lm_head.weight")}
