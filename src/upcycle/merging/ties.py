"""TIES: trim, elect sign, merge (Yadav et al. 2023, arXiv 2306.01708)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def trim(task_vector: Float[Tensor, " n"], drop_rate: float) -> Float[Tensor, " n"]:
    """Keep the share 1 - p of the entries that is largest in magnitude, zero the rest: no rescaling.

    The threshold is the whole tensor's, so a piece of it would not do. Of equal magnitudes at the threshold all are
    kept.
    """
    kept = int((1 - drop_rate) * task_vector.numel())
    if kept == 0:
        return torch.zeros_like(task_vector)
    magnitude = task_vector.abs()
    threshold = magnitude.kthvalue(task_vector.numel() - kept + 1).values
    return task_vector * (magnitude >= threshold)


def agreeing_sum(task_vectors: Sequence[Float[Tensor, " n"]], weights: Sequence[float]) -> Float[Tensor, " n"]:
    """sum_j w_j tau_j over the parents whose sign is that of the full weighted sum, entry by entry."""
    return _agreeing(task_vectors, weights)[0]


def agreeing_mean(task_vectors: Sequence[Float[Tensor, " n"]], weights: Sequence[float]) -> Float[Tensor, " n"]:
    """The mean, weighted by w_j, over the parents whose sign is the elected one and whose entry is not zero.

    With equal weights this is the paper's disjoint merge with lambda = 1.
    """
    total, weight = _agreeing(task_vectors, weights)
    return torch.where(weight > 0, total / weight, 0.0)


def _agreeing(
    task_vectors: Sequence[Float[Tensor, " n"]], weights: Sequence[float]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Sum of w_j tau_j and of w_j over the parents that agree with the elected sign."""
    weighted = [task_vector * weight for task_vector, weight in zip(task_vectors, weights, strict=True)]
    elected = torch.stack(weighted).sum(dim=0).sign()
    total, weight_sum = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector, weight in zip(weighted, weights, strict=True):
        agrees = vector * elected > 0
        total.add_(vector * agrees)
        weight_sum.add_(agrees, alpha=weight)
    return total, weight_sum
