"""Low-rank updates s B A of a weight: inner products through the small factors, and how children are merged.

Legend: r rank, i inputs, o outputs of the weight. An adapter is a mapping from the name of a weight to its update.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upcycle.merging.dare import Key
from upcycle.merging.kernels import KERNELS
from upcycle.merging.lineage import Child

ITERATIONS = 4
"""Of the subspace iteration that cuts a merged product back to its rank."""


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a weight W (o, i): s B A."""

    a: Float[Tensor, "r i"]
    b: Float[Tensor, "o r"]
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.a)

    def product(self) -> Float[Tensor, "o i"]:
        return self.scaling * (self.b.float() @ self.a.float())


Adapter = Mapping[str, LowRank]


def inner(p: Adapter, q: Adapter) -> float:
    """Sum over weights of <s_p B_p A_p, s_q B_q A_q> = s_p s_q sum((B_p^T B_q) * (A_p A_q^T)): (r, r) matrices only."""
    return sum(
        x.scaling * y.scaling * ((x.b.float().T @ y.b.float()) * (x.a.float() @ y.a.float().T)).double().sum().item()
        for x, y in ((p[name], q[name]) for name in p if name in q)
    )


def materialise_adapters(
    sources: Sequence[Adapter], children: Sequence[Child], merge: str, drop_rate: float, how: str, seed: int
) -> list[Adapter]:
    """Every child of adapters, along the lineage; the mask of a parent is keyed as in `lineage.materialise`."""
    experts = list(sources)
    for child in children:
        parents = [experts[parent] for parent in child.parents]
        keys = [(seed, len(experts), parent) for parent in child.parents]
        experts.append(merge_adapters(parents, child.weights, merge, drop_rate, how, keys))
    return experts[len(sources) :]


def merge_adapters(
    parents: Sequence[Adapter],
    weights: Sequence[float],
    merge: str,
    drop_rate: float,
    how: str,
    keys: Sequence[Key],
) -> dict[str, LowRank]:
    """A child of adapters, with scaling 1.

    Args:
        merge: a kernel of `KERNELS`.
        how: a key of `MERGES`.
        keys: one per parent; the name of a tensor completes it to the key of a mask.
    """
    merged = MERGES[how]
    names = sorted({name for parent in parents for name in parent})
    child = {}
    for name in names:
        having = [i for i, parent in enumerate(parents) if name in parent]
        updates, shares = [parents[i][name] for i in having], [weights[i] for i in having]
        child[name] = merged(updates, shares, merge, drop_rate, [(*keys[i], name) for i in having])
    return child


def apart(
    updates: Sequence[LowRank], weights: Sequence[float], merge: str, drop_rate: float, keys: Sequence[Key]
) -> LowRank:
    """A = combine(sqrt(w_j), sqrt(s_j) A_j), B alike: PEFT's dare_linear where `merge` is dare.

    Two equal parents give a child (sqrt(w_1) + sqrt(w_2))^2, up to 2, times as large.
    """
    return _each([math.sqrt(weight) for weight in weights], updates, merge, drop_rate, keys)


def average(
    updates: Sequence[LowRank], weights: Sequence[float], merge: str, drop_rate: float, keys: Sequence[Key]
) -> LowRank:
    """A = combine(w_j, sqrt(s_j) A_j), B alike: equal parents give an equal child."""
    return _each(weights, updates, merge, drop_rate, keys)


def _each(
    weights: Sequence[float], updates: Sequence[LowRank], merge: str, drop_rate: float, keys: Sequence[Key]
) -> LowRank:
    """A and B, each with the root of its scaling and combined for itself; needs equal ranks."""
    a, b = (
        _combined(
            [math.sqrt(u.scaling) * getattr(u, side).float() for u in updates],
            weights,
            merge,
            drop_rate,
            [(*key, side) for key in keys],
        )
        for side in ("a", "b")
    )
    return LowRank(a, b)


def product(
    updates: Sequence[LowRank], weights: Sequence[float], merge: str, drop_rate: float, keys: Sequence[Key]
) -> LowRank:
    """combine(w_j s_j B_j A_j), cut back to the largest rank of the parents."""
    whole = _combined([update.product() for update in updates], weights, merge, drop_rate, keys)
    start = torch.cat([update.b.float() for update in updates], dim=1)
    return truncated(whole, start, max(update.rank for update in updates))


MERGES: dict[str, Callable[..., LowRank]] = {"average": average, "apart": apart, "product": product}
"""`expand.adapters`: how a child's factors come from its parents'."""


def _combined(
    tensors: Sequence[Tensor], weights: Sequence[float], merge: str, drop_rate: float, keys: Sequence[Key]
) -> Tensor:
    kernel = KERNELS[merge]
    flat = [tensor.float().reshape(-1) for tensor in tensors]
    masks = [kernel.mask(values, drop_rate, key, 0) for values, key in zip(flat, keys, strict=True)]
    scaled = [weight * kernel.scale(drop_rate) for weight in weights]
    return kernel.combine(torch.zeros_like(flat[0]), flat, scaled, masks).view(tensors[0].shape)


def truncated(matrix: Float[Tensor, "o i"], start: Float[Tensor, "o n"], rank: int) -> LowRank:
    """The best approximation of a rank, B and A sharing the singular values evenly.

    Found by subspace iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4) from the columns of `start`, which
    span the matrix but for what dropping entries has added: no random numbers, and no SVD of the whole matrix.
    """
    basis = torch.linalg.qr(start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, values, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return LowRank(root[:, None] * v[:rank], (basis @ u[:, :rank]) * root)


def fresh(shape: tuple[int, int], rank: int, scaling: float, generator: torch.Generator) -> LowRank:
    """A new adapter of a weight of `shape` (o, i) that adds nothing yet: A uniform as PEFT's, B zero."""
    outputs, inputs = shape
    a = (2 * torch.rand(rank, inputs, generator=generator) - 1) / math.sqrt(inputs)
    return LowRank(a, torch.zeros(outputs, rank), scaling)
