"""DARE: drop and rescale (Yu et al. 2024, arXiv 2311.03099)."""

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
    kept = keep_mask(key, start, task_vector.numel(), drop_rate)
    scale = LEVELS / (LEVELS - dropped_levels(drop_rate))
    return task_vector * kept.to(task_vector.device, task_vector.dtype).mul_(scale)


def merge(
    base: Float[Tensor, " n"],
    task_vectors: list[Float[Tensor, " n"]],
    weights: list[float],
) -> Float[Tensor, " n"]:
    """theta_0 + sum_j w_j tau_j (task arithmetic, Ilharco et al. 2023, arXiv 2212.04089)."""
    merged = base.clone()
    for task_vector, weight in zip(task_vectors, weights, strict=True):
        merged.add_(task_vector, alpha=weight)
    return merged
