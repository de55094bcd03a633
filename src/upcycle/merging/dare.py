"""DARE: drop and rescale (Yu et al. 2024, arXiv 2311.03099)."""

from jaxtyping import Float
from torch import Tensor

from upcycle.merging.random_bits import LEVELS, dropped_levels, keep_mask

Key = tuple[int | str, ...]


def dare(task_vector: Float[Tensor, " n"], drop_rate: float, key: Key, start: int = 0) -> Float[Tensor, " n"]:
    """Drop each entry with probability p and multiply the rest by 1 / (1 - p): the expectation is unchanged.

    `task_vector` is a flat piece that begins at element `start` of its tensor; `key` names the mask, so any
    cut of the tensor into pieces gives the same result. p is rounded to a multiple of 2^-16, and the rescale
    uses the rounded value.
    """
    mask = drop_mask(task_vector, drop_rate, key, start)
    return task_vector if mask is None else task_vector * mask * rescale(drop_rate)


def drop_mask(
    task_vector: Float[Tensor, " n"], drop_rate: float, key: Key, start: int = 0
) -> Float[Tensor, " n"] | None:
    """0 with probability p, otherwise 1, for each entry; None if nothing is dropped."""
    if dropped_levels(drop_rate) == 0:
        return None
    return keep_mask(key, start, task_vector.numel(), drop_rate).to(task_vector.device, task_vector.dtype)


def rescale(drop_rate: float) -> float:
    """1 / (1 - p), of the rounded p."""
    return LEVELS / (LEVELS - dropped_levels(drop_rate))
