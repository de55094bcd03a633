"""TIES: trim, elect sign, merge (Yadav et al. 2023, arXiv 2306.01708)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def trim_mask(task_vector: Float[Tensor, " n"], drop_rate: float) -> Float[Tensor, " n"]:
    """1 for the share 1 - p of the entries that is largest in magnitude, 0 for the rest.

    The threshold is the whole tensor's, so a piece of it would not do. Of equal magnitudes at the threshold all are
    kept.
    """
    kept = int((1 - drop_rate) * task_vector.numel())
    if kept == 0:
        return torch.zeros_like(task_vector)
    magnitude = task_vector.abs()
    threshold = magnitude.kthvalue(task_vector.numel() - kept + 1).values
    return (magnitude >= threshold).to(task_vector.dtype)


def agreeing_sum(
    base: Float[Tensor, " n"],
    task_vectors: Sequence[Float[Tensor, " n"]],
    weights: Sequence[float],
    masks: Sequence[Float[Tensor, " n"] | None],
) -> Float[Tensor, " n"]:
    """theta_0 + sum_j w_j tau_j over the parents whose sign is that of the full weighted sum, entry by entry."""
    return base + _agreeing(task_vectors, weights, masks)[0]


def agreeing_mean(
    base: Float[Tensor, " n"],
    task_vectors: Sequence[Float[Tensor, " n"]],
    weights: Sequence[float],
    masks: Sequence[Float[Tensor, " n"] | None],
) -> Float[Tensor, " n"]:
    """theta_0 + the mean, weighted by w_j, over the parents whose sign is the elected one and whose entry is not zero.

    With equal weights this is the paper's disjoint merge with lambda = 1.
    """
    total, weight = _agreeing(task_vectors, weights, masks)
    return base + torch.where(weight > 0, total / weight, 0.0)


def _agreeing(
    task_vectors: Sequence[Float[Tensor, " n"]],
    weights: Sequence[float],
    masks: Sequence[Float[Tensor, " n"] | None],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Sum of w_j mask_j tau_j and of w_j over the parents that agree with the elected sign."""
    weighted = [
        tau * (w if mask is None else mask * w) for tau, w, mask in zip(task_vectors, weights, masks, strict=True)
    ]
    elected = torch.stack(weighted).sum(dim=0).sign()
    total, weight_sum = torch.zeros_like(elected), torch.zeros_like(elected)
    for vector, weight in zip(weighted, weights, strict=True):
        agrees = vector * elected > 0
        total.add_(vector * agrees)
        weight_sum.add_(agrees, alpha=weight)
    return total, weight_sum
