"""Fine-grained experts: an FFN's channels divided among G experts, which together are the FFN.

With G equal routing vectors per FFN the MoE computes what whole FFNs do: docs/paper.md, "Fine-grained experts". The
idea is He et al. 2024's (arXiv 2410.07524: virtual groups, weight scaling) and Dai et al. 2024's (arXiv 2401.06066).

Legend: I channels of a whole FFN, H hidden, G slices.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from upcycle.architectures.moves import FfnMove, Region


@dataclass(frozen=True)
class Slicing:
    """Which channels go together."""

    granularity: int = 1
    """G; 1 leaves FFNs whole."""
    channels: str = "contiguous"
    """`contiguous` runs, `strided` (every G-th), or at `random`."""
    seed: int = 0

    def place(self, move: FfnMove, expert: int, element: int, values: Tensor) -> Iterator[tuple[Region, int, Tensor]]:
        """Where a piece of an expert's weight goes: (region, first element in it, values) for each slice.

        Args:
            element: where the flat piece `values` begins; with G > 1 it is a number of whole rows.
        """
        regions = move.experts[expert]
        if self.granularity == 1:
            yield regions[0], element, values
            return
        rows, width = move.dense.shape
        first, block = element // width, values.view(-1, width)
        if move.down:
            share = width // self.granularity
            for region, columns in zip(regions, _indices(self, width), strict=True):
                yield region, first * share, block[:, columns] * self.granularity
            return
        for region, own in zip(regions, members(self, rows), strict=True):
            begin, end = bisect_left(own, first), bisect_left(own, first + len(block))
            if begin < end:
                yield region, begin * width, block[_index(own[begin:end], first)]

    def whole(self, move: FfnMove, expert: int, read: Callable[[Region], Tensor]) -> Tensor:
        """An expert's weight from its slices: what `place` has put there, in the dense tensor's shape."""
        regions = move.experts[expert]
        if self.granularity == 1:
            return read(regions[0])
        rows, width = move.dense.shape
        found = torch.empty(rows, width)
        for region, own in zip(regions, _indices(self, width if move.down else rows), strict=True):
            if move.down:
                found[:, own] = read(region).float() / self.granularity
            else:
                found[own] = read(region).float()
        return found


@cache
def members(slicing: Slicing, channels: int) -> list[Sequence[int]]:
    """The channels of each slice, in order, out of `channels`, which G divides."""
    granularity, share = slicing.granularity, channels // slicing.granularity
    if slicing.channels == "contiguous":
        return [range(begin, begin + share) for begin in range(0, channels, share)]
    if slicing.channels == "strided":
        return [range(begin, channels, granularity) for begin in range(granularity)]
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(slicing.seed))
    return [tuple(part.sort().values.tolist()) for part in order.view(granularity, -1)]


@cache
def _indices(slicing: Slicing, channels: int) -> list[slice | Int[Tensor, " C"]]:
    """`members`, as indices: made once, not for every piece of a tensor."""
    return [_index(own) for own in members(slicing, channels)]


def _index(places: Sequence[int], first: int = 0) -> slice | Int[Tensor, " C"]:
    """Places as an index, counted from `first`: of a range a slice, so that a view is taken and nothing is gathered."""
    if isinstance(places, range):
        return slice(places.start - first, places.stop - first, places.step)
    return torch.tensor(places) - first


WHOLE = Slicing()
"""FFNs as they are."""
