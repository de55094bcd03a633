"""What the routers of all processes did in a step so far.

Legend: L layers, E experts, T tokens, k experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upcycle.distributed.world import summed, world_size
from upcycle.routing.load import shares, slot_counts


@dataclass(frozen=True)
class Routed:
    """The routing of one micro-batch."""

    own: Float[Tensor, "L E"]
    """Slots that each expert got of this process's tokens."""
    everywhere: Float[Tensor, "L E"]
    """Of those of all processes."""
    num_tokens: Float[Tensor, ""]
    """Tokens of all processes, over the number of processes: gradients are averaged over these."""


def count(indices: Sequence[Int[Tensor, "T k"]], mask: Int[Tensor, " T"], num_experts: int) -> Routed:
    """Count, here and everywhere; every process must come."""
    own = slot_counts(indices, mask, num_experts)
    total = summed(torch.cat([own.flatten(), mask.sum()[None].to(own)]))
    return Routed(own, total[:-1].view_as(own), total[-1] / world_size())


class StepLoad:
    """The share of each expert over the micro-batches of a step, as far as it has come (arXiv 2501.11873, section 3).

    The last micro-batch sees the whole step; the first one its own part of it.
    """

    def __init__(self) -> None:
        self._counts: Float[Tensor, "L E"] | None = None

    def add(self, routed: Routed, last: bool) -> Float[Tensor, "L E"]:
        """The share with this micro-batch; `last` of a step, and the next call begins another."""
        total = routed.everywhere if self._counts is None else self._counts + routed.everywhere
        self._counts = None if last else total
        return shares(total)
