"""How much of the work each expert gets.

Legend: T tokens, E experts, k experts per token, L layers.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

DEAD = 0.01
"""An expert with less than this share of the mean load is called dead."""
OVERLOADED = 2.0
"""An expert with more than this many times the mean load is called overloaded."""


def slot_counts(
    indices: Sequence[Int[Tensor, "T k"]], mask: Int[Tensor, " T"], num_experts: int
) -> Float[Tensor, "L E"]:
    """How many of the routed slots of unmasked tokens each expert of each layer gets."""
    weights = mask.float().repeat_interleave(indices[0].shape[1])
    counts = [torch.zeros(num_experts, device=mask.device).index_add(0, i.reshape(-1), weights) for i in indices]
    return torch.stack(counts)


def shares(counts: Float[Tensor, "*L E"]) -> Float[Tensor, "*L E"]:
    """Share of the routed slots that each expert gets; sums to 1."""
    return counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
