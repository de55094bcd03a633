"""Stage 2: from n checkpoints to m experts, as a plan.

The plan needs only the Gram matrix of the checkpoints' task vectors. With tau_c = a D(tau_j) + b D(tau_k), D being
DARE with drop rate p and independent masks, and G the Gram matrix of the experts so far:

    E <tau_c, tau_i> = a G_ji + b G_ki                                  for every earlier expert i
    E <tau_c, tau_c> = (a^2 G_jj + b^2 G_kk) / (1 - p) + 2 a b G_jk

The first line is exact for p = 0 and otherwise an expectation whose relative error falls with the number of
entries (10^5 and more in practice); in the second, dropping adds a norm of its own.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from upcycle.artifacts import Checkpoint, ExpansionPlan, Expert
from upcycle.errors import UpcycleError
from upcycle.recipe import ExpandSettings

Gram = NDArray[np.float64]
"""Inner products of task vectors: (experts, experts)."""


def make_plan(checkpoints: Sequence[Checkpoint], gram: Gram, settings: ExpandSettings, seed: int) -> ExpansionPlan:
    """Genetic expansion (UpIT, expert expansion): merge the two most dissimilar experts until there are m.

    Raises:
        UpcycleError: fewer experts wanted than there are checkpoints, a checkpoint equal to the base, or no pair
            of parents left.
    """
    _check(checkpoints, gram, settings)
    draw = np.random.Generator(np.random.Philox(seed))
    experts = [Expert(c.name, "checkpoint") for c in checkpoints]
    used: set[tuple[int, int]] = set()
    while len(experts) < settings.num_experts:
        similarity = similarities(gram, settings.similarity)
        j, k = _choose_parents(similarity, used, settings, draw)
        used.add((j, k))
        alpha = float(draw.uniform()) if settings.weights == "uniform" else 0.5
        gram = add_child(gram, (j, k), (alpha, 1 - alpha), settings.drop_rate)
        experts.append(Expert(f"child-{len(experts)}", "child", (j, k), (alpha, 1 - alpha), float(similarity[j, k])))
    return ExpansionPlan(
        tuple(experts), settings.drop_rate, seed, settings.similarity, tuple(map(tuple, gram.tolist()))
    )


def similarities(gram: Gram, kind: str) -> Gram:
    """Cosine, or negative squared L2 distance, of every two task vectors."""
    norms = gram.diagonal()
    if kind == "l2":
        return 2 * gram - norms[:, None] - norms[None, :]
    return gram / np.sqrt(np.outer(norms, norms))


def add_child(gram: Gram, parents: tuple[int, int], weights: tuple[float, float], drop_rate: float) -> Gram:
    """The Gram matrix with one more row and column: the expected inner products of a DARE child."""
    (j, k), (a, b) = parents, weights
    row = a * gram[j] + b * gram[k]
    norm = (a * a * gram[j, j] + b * b * gram[k, k]) / (1 - drop_rate) + 2 * a * b * gram[j, k]
    return np.block([[gram, row[:, None]], [row[None, :], np.array([[norm]])]])


def _choose_parents(
    similarity: Gram, used: set[tuple[int, int]], settings: ExpandSettings, draw: np.random.Generator
) -> tuple[int, int]:
    pairs = [(j, k) for j in range(len(similarity)) for k in range(j + 1, len(similarity))]
    if settings.repeat_pairs == "avoid":
        pairs = [pair for pair in pairs if pair not in used]
    if not pairs:
        raise UpcycleError(
            f"expand: every pair of experts has a child already at {len(similarity)} experts; lower "
            "expand.num_experts or set expand.repeat_pairs=allow"
        )
    if settings.parents == "random":
        return pairs[draw.integers(len(pairs))]
    return min(pairs, key=lambda pair: similarity[pair])


def _check(checkpoints: Sequence[Checkpoint], gram: Gram, settings: ExpandSettings) -> None:
    n, m = len(checkpoints), settings.num_experts
    if m < n:
        raise UpcycleError(
            f"expand.num_experts is {m}, fewer than the {n} checkpoints; raise it to {n} or more, or take fewer "
            "checkpoints (a larger prepare.checkpoint_every, or a list in prepare.checkpoints)"
        )
    if n < 2:
        raise UpcycleError(f"expand: {n} checkpoint, expected 2 or more (a smaller prepare.checkpoint_every)")
    for checkpoint, norm in zip(checkpoints, gram.diagonal(), strict=True):
        if not (math.isfinite(norm) and norm > 0):
            problem = "has the base's FFN weights" if norm == 0 else "has FFN weights that are not finite"
            raise UpcycleError(f"expand: {checkpoint.name} {problem}, so it cannot be an expert")
