"""How much of the work each expert gets.

Legend: T tokens, E experts, k experts per token.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

DEAD = 0.01
"""An expert with less than this share of the mean load is called dead."""
OVERLOADED = 2.0
"""An expert with more than this many times the mean load is called overloaded."""


def expert_share(indices: Int[Tensor, "T k"], mask: Int[Tensor, " T"], num_experts: int) -> Float[Tensor, " E"]:
    """Share of the routed slots of unmasked tokens that each expert gets; sums to 1."""
    slots = torch.nn.functional.one_hot(indices, num_experts).sum(dim=1)
    counts = (slots * mask[:, None]).sum(dim=0)
    return counts / counts.sum().clamp(min=1)
