"""DARE: drop and rescale (Yu et al. 2024, arXiv 2311.03099)."""

import torch
from jaxtyping import Float
from torch import Tensor

from upcycle.merging.random_bits import LEVELS, dropped_levels, keep_mask


def dare(
    task_vector: Float[Tensor, " n"], drop_rate: float, key: tuple[int | str, ...], start: int = 0
) -> Float[Tensor, " n"]:
    """Drop each entry with probability p and multiply the rest by 1 / (1 - p): the expectation is unchanged.

    `task_vector` is a flat piece that begins at element `start` of its tensor; `key` names the mask, so any
    cut of the tensor into pieces gives the same result. p is rounded to a multiple of 2^-16, and the rescale
    uses the rounded value.
    """
    if dropped_levels(drop_rate) == 0:
        return task_vector
    kept = keep_mask(key, start, task_vector.numel(), drop_rate).to(task_vector.device)
    scale = LEVELS / (LEVELS - dropped_levels(drop_rate))
    return torch.mul(task_vector, kept).mul_(scale)
