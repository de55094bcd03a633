"""Weighted sums of task vectors: task arithmetic, and the weights that make it spherical interpolation."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def linear(
    base: Float[Tensor, " n"],
    task_vectors: Sequence[Float[Tensor, " n"]],
    weights: Sequence[float],
    masks: Sequence[Float[Tensor, " n"] | None],
) -> Float[Tensor, " n"]:
    """theta_0 + sum_j w_j mask_j tau_j (task arithmetic, Ilharco et al. 2023, arXiv 2212.04089); None masks nothing."""
    merged = base
    for task_vector, weight, mask in zip(task_vectors, weights, masks, strict=True):
        out = None if merged is base else merged  # a copy of the base first would be one pass more
        if mask is None:
            merged = torch.add(merged, task_vector, alpha=weight, out=out)
        else:
            merged = torch.addcmul(merged, task_vector, mask, value=weight, out=out)
    return merged


def slerp_weights(cosine: float, fraction: float) -> tuple[float, float]:
    """Weights of two vectors for the point at `fraction` of the arc between them (Shoemake 1985).

    sin((1 - t) w) / sin w and sin(t w) / sin w, w the angle. Nearly parallel vectors are interpolated along the
    chord, which is the limit.
    """
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-4:
        return 1 - fraction, fraction
    return math.sin((1 - fraction) * angle) / math.sin(angle), math.sin(fraction * angle) / math.sin(angle)


def slerp(a: Float[Tensor, " n"], b: Float[Tensor, " n"], fraction: float) -> Float[Tensor, " n"]:
    """The point at `fraction` of the arc from `a` to `b`; between equal norms it keeps the norm."""
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0)
    return linear(torch.zeros_like(a), (a, b), slerp_weights(cosine.item(), fraction), (None, None))
