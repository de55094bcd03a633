"""Which run of which dense tensor goes where in a MoE, as it is or rewritten.

Legend: E experts, I intermediate size, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from upcycle.architectures.layouts import DenseLayout, MoeLayout, Place, Shape, channels, ffn, moe_layers, prefix
from upcycle.types import Config

if TYPE_CHECKING:  # the list of families does not wait for it; whole names, which the checks of the tests can follow
    import torch


@dataclass(frozen=True)
class Region:
    """A run of rows of a tensor on disk; a row is a run of the last dimension (of one element in a vector)."""

    tensor: str
    full: Shape
    """Shape of the whole tensor."""
    row: int
    """First row, counted over all leading dimensions."""
    shape: Shape
    """(rows, width), or (length,) of a vector."""

    @property
    def element(self) -> int:
        """First element in the tensor."""
        return self.row * prod(self.shape[1:])

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Rewrite:
    """A pure function of a run of a tensor's rows, with which the MoE computes what the dense model does."""

    apply: "Callable[[torch.Tensor], torch.Tensor]"
    """Of (rows, ...), `rows` being a multiple of the field of that name; the shape stays."""
    rows: int = 1
    """Rows that belong together."""
    permutes: bool = False
    """Whether values only change places, so that an optimizer's moments follow in the same way."""


@dataclass(frozen=True)
class SharedMove:
    """A run of rows that every token passes: attention, norms, embeddings."""

    dense: Region
    moe: Region
    rewrite: Rewrite | None = None


@dataclass(frozen=True)
class FfnMove:
    """A weight of a layer's FFN, and where it lies for each expert."""

    dense: Region
    experts: tuple[tuple[Region, ...], ...]
    """The slices of each."""
    down: bool
    """Whether the FFN's channels are its columns."""
    rewrite: Rewrite | None = None


Moves = Callable[[Config, str, Shape], Iterator[SharedMove]]
"""(dense configuration, tensor, its shape): where a tensor outside the experts goes."""
Rule = tuple[str, Moves]
"""How a tensor's name ends, and where it goes."""


def ffn_moves(
    dense: DenseLayout, moe: MoeLayout, config: Config, num_experts: int, granularity: int, down: Rewrite | None = None
) -> list[FfnMove]:
    """Every FFN weight, layer by layer; slice g of expert e is the MoE's expert e G + g.

    Args:
        down: of the down projections.
    """
    size, hidden = channels(dense, config), config["hidden_size"]
    total = num_experts * granularity

    def move(layer: int, source: Place, target: Place) -> FfnMove:
        is_down = target is moe.down
        whole, part = (_shape(hidden, n, is_down) for n in (size, size // granularity))
        slices = [_region(target, prefix(moe, layer), part, e, total, moe.stacked) for e in range(total)]
        experts = tuple(tuple(slices[e : e + granularity]) for e in range(0, total, granularity))
        return FfnMove(_region(source, prefix(dense, layer), whole), experts, is_down, down if is_down else None)

    pairs = list(zip(ffn(dense), ffn(moe), strict=True))
    return [move(layer, *pair) for layer in moe_layers(config) for pair in pairs]


def ffn_regions(dense: DenseLayout, config: Config, layers: Sequence[int] | None = None) -> list[Region]:
    """Every FFN weight of a dense model that becomes an expert's, layer by layer, once.

    Args:
        layers: other ones than those.
    """
    size, hidden = channels(dense, config), config["hidden_size"]
    shapes = [(place, _shape(hidden, size, place is dense.down)) for place in ffn(dense)]
    chosen = moe_layers(config) if layers is None else layers
    return list(
        dict.fromkeys(_region(place, prefix(dense, layer), shape) for layer in chosen for place, shape in shapes)
    )


def ffn_tensors(dense: DenseLayout, config: Config) -> list[str]:
    """The names of the tensors that hold these weights, layer by layer."""
    return list(dict.fromkeys(region.tensor for region in ffn_regions(dense, config)))


def shared_moves(rules: Sequence[Rule], config: Config, shapes: dict[str, Shape]) -> list[SharedMove]:
    """The tensors `shapes` (all but the FFNs'): by the first rule for each, else under the same name."""
    moves: list[SharedMove] = []
    for name, shape in shapes.items():
        made = next((made for ending, made in rules if name.endswith(ending)), copied)
        moves.extend(made(config, name, shape))
    return moves


def copied(_: Config, name: str, shape: Shape) -> Iterator[SharedMove]:
    """As it is."""
    whole = Region(name, shape, 0, shape)
    yield SharedMove(whole, whole)


def changed(ending: str, rewrite: Callable[[Config], Rewrite]) -> Rule:
    """A tensor that keeps its name and is rewritten."""

    def moves(config: Config, name: str, shape: Shape) -> Iterator[SharedMove]:
        whole = Region(name, shape, 0, shape)
        yield SharedMove(whole, whole, rewrite(config))

    return ending, moves


def split(ending: str, parts: Callable[[Config], dict[str, int]]) -> Rule:
    """A tensor whose runs of rows are tensors of the MoE's: of each the end of its name, and its rows."""

    def moves(config: Config, name: str, shape: Shape) -> Iterator[SharedMove]:
        row = 0
        for part, rows in parts(config).items():
            run = (rows, *shape[1:])
            yield SharedMove(Region(name, shape, row, run), Region(name.removesuffix(ending) + part, run, 0, run))
            row += rows

    return ending, moves


def router_tensors(moe: MoeLayout, config: Config) -> list[str]:
    """The router's weight of every sparse layer."""
    return [prefix(moe, layer) + moe.router for layer in moe_layers(config)]


def constants(moe: MoeLayout, config: Config, known: dict[str, int]) -> dict[str, tuple[Shape, float]]:
    """Shape and value of every constant, by name.

    Args:
        known: see `layouts.sizes`.
    """
    found: dict[str, tuple[Shape, float]] = {}
    for constant in moe.constants:
        value = constant.value(config) if callable(constant.value) else constant.value
        layers = range(config["num_hidden_layers"]) if constant.every_layer else moe_layers(config)
        shape = tuple(known[size] if isinstance(size, str) else size for size in constant.shape)
        found |= {prefix(moe, layer) + constant.tensor: (shape, value) for layer in layers}
    return found


def _shape(hidden: int, size: int, down: bool) -> tuple[int, int]:
    return (hidden, size) if down else (size, hidden)


def _region(
    place: Place, before: str, shape: tuple[int, int], expert: int = 0, num_experts: int = 1, stacked: bool = False
) -> Region:
    rows, width = shape
    full = (num_experts, place.of * rows, width) if stacked else (place.of * rows, width)
    first = expert * place.of * rows if stacked else 0
    return Region(before + place.tensor.format(expert=expert), full, first + place.part * rows, shape)
