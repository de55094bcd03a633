"""From n checkpoints to m experts, as a plan.

The plan needs only the Gram matrix of the checkpoints' task vectors. For a child c = a T(tau_j) + b T(tau_k), T being
DARE with drop rate p and independent masks, and G the Gram matrix of the experts so far:

    E <tau_c, tau_i> = a G_ji + b G_ki                                  for every earlier expert i
    E <tau_c, tau_c> = (a^2 G_jj + b^2 G_kk) / (1 - p) + 2 a b G_jk

The first line is exact for p = 0 and otherwise an expectation whose relative error falls with the number of
entries (10^5 and more in practice); in the second, dropping adds a norm of its own. Linear and spherical children are
the case p = 0. TIES is not linear: its children's inner products are measured, by one more pass per child. So are those
of LoRA adapters, whose children are not linear in the products B A and are small.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from upcycle.console import warn
from upcycle.errors import UpcycleError
from upcycle.experts.gram import Measure
from upcycle.merging.kernels import KERNELS
from upcycle.merging.linear import slerp_weights
from upcycle.records.plan import AdapterMerge, Checkpoint, ExpansionPlan, Expert, Gram, similarities
from upcycle.settings import ExpandSettings

FAR = 3.0
"""Times the norm of the largest checkpoint, from which on a child is no mixture of its parents."""
SAME = 1e-9
"""Share of a squared norm below which a squared distance is rounding."""


def make_plan(
    checkpoints: Sequence[Checkpoint],
    gram: Gram,
    settings: ExpandSettings,
    seed: int,
    measure: Measure | None = None,
    adapters: AdapterMerge | None = None,
) -> ExpansionPlan:
    """Genetic expansion (UpIT, expert expansion): merge the two most dissimilar experts until there are m.

    Args:
        gram: of all checkpoints, chosen or not.
        measure: needed for children that are not linear in expectation: none given, the formula above holds.
        adapters: how adapters are merged; None: experts are whole FFNs.

    Raises:
        UpcycleError: too few checkpoints for the experts wanted, a checkpoint equal to the base, or no pair of parents
            left.
    """
    _check(checkpoints, gram, settings.copies_of)
    try:
        count = settings.num_chosen(len(checkpoints))
    except ValueError as error:
        raise UpcycleError(str(error)) from None
    if settings.copies_of != "none":
        return _copies(len(checkpoints), gram, settings, seed, adapters)
    chosen = choose_checkpoints(similarities(gram, settings.similarity), count, settings.select)
    experts = [Expert(name=checkpoints[i].name, kind="checkpoint", checkpoint=i) for i in chosen]
    gram = gram[np.ix_(chosen, chosen)]
    if settings.keep_base:
        experts.append(Expert(name="base", kind="base"))
        gram = np.pad(gram, (0, 1))
    draw = np.random.Generator(np.random.Philox(seed))
    used: set[tuple[int, int]] = set()
    while len(experts) < settings.num_experts:
        child = _make_child(experts, gram, used, settings, draw)
        used.add((child.parents[0], child.parents[1]))
        experts.append(child)
        gram = _extend(gram, experts, settings, measure)
    _say_far(experts, gram, settings)
    return _plan(experts, gram, settings, seed, adapters)


def _say_far(experts: Sequence[Expert], gram: Gram, settings: ExpandSettings) -> None:
    """Each generation of DARE adds to the norm, and what is large is unlike the others, so it is merged again."""
    norms = np.sqrt(gram.diagonal())
    largest = max(norm for norm, expert in zip(norms, experts, strict=True) if expert.kind != "child")
    farthest = int(norms.argmax())
    if norms[farthest] > FAR * largest:
        warn(
            f"expand: {experts[farthest].name} is {norms[farthest] / largest:,.1f} times as far from the base as any "
            f"checkpoint; lower expand.drop_rate (now {settings.drop_rate:g}), take fewer experts, or set "
            "expand.merge=linear"
        )


def _plan(
    experts: Sequence[Expert], gram: Gram, settings: ExpandSettings, seed: int, adapters: AdapterMerge | None
) -> ExpansionPlan:
    return ExpansionPlan(
        experts=tuple(experts),
        merge=settings.merge,
        drop_rate=settings.drop_rate,
        seed=seed,
        similarity=settings.similarity,
        gram=tuple(map(tuple, gram.tolist())),
        adapters=adapters,
        perturb=settings.perturb,
        perturb_rate=settings.perturb_rate,
        noise_std=settings.noise_std,
        spread=settings.spread,
    )


def choose_checkpoints(similarity: Gram, count: int, select: str) -> list[int]:
    """Which `count` of the checkpoints become experts, in the order of training.

    `uniform` takes the end of each of `count` equal spans of the run, so the last is among them. `farthest` begins with
    the least similar pair and goes on with the one whose greatest similarity to the chosen is least.
    """
    n = len(similarity)
    if select == "uniform":
        return [-(-(i + 1) * n // count) - 1 for i in range(count)]
    if select == "first":
        return list(range(count))
    if select == "last" or count == 1:
        return list(range(n - count, n))
    distinct = similarity + np.diag(np.full(n, np.inf))
    chosen = [int(place) for place in np.unravel_index(distinct.argmin(), distinct.shape)]
    while len(chosen) < count:
        nearest = similarity[:, chosen].max(axis=1)
        nearest[chosen] = np.inf
        chosen.append(int(nearest.argmin()))
    return sorted(chosen)


def add_child(gram: Gram, parents: tuple[int, ...], weights: tuple[float, ...], norm_growth: float) -> Gram:
    """The Gram matrix with one more row and column: the expected inner products of a child linear in its parents.

    Args:
        norm_growth: how much thinning a task vector multiplies its squared norm; 1 / (1 - p) for DARE.
    """
    (j, k), (a, b) = parents, weights
    row = a * gram[j] + b * gram[k]
    norm = (a * a * gram[j, j] + b * b * gram[k, k]) * norm_growth + 2 * a * b * gram[j, k]
    return np.block([[gram, row[:, None]], [row[None, :], np.array([[norm]])]])


def _copies(n: int, gram: Gram, settings: ExpandSettings, seed: int, adapters: AdapterMerge | None) -> ExpansionPlan:
    """Vanilla upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): all experts alike, no children."""
    last, m = settings.copies_of == "last", settings.num_experts
    kind: Literal["checkpoint", "base"] = "checkpoint" if last else "base"
    experts = [Expert(name=f"copy-{i}", kind=kind, checkpoint=n - 1 if last else None) for i in range(m)]
    return _plan(experts, np.full((m, m), gram[-1, -1] if last else 0.0), settings, seed, adapters)


def _make_child(
    experts: Sequence[Expert],
    gram: Gram,
    used: set[tuple[int, int]],
    settings: ExpandSettings,
    draw: np.random.Generator,
) -> Expert:
    similarity = similarities(gram, settings.similarity)
    j, k = _choose_parents(similarity, used, settings, draw)
    alpha = float(draw.uniform()) if settings.weights == "uniform" else 0.5
    weights = (alpha, 1 - alpha)
    if settings.merge == "slerp":
        weights = slerp_weights(float(similarities(gram, "cosine")[j, k]), 1 - alpha)
    name = f"child-{len(experts)}"
    return Expert(name=name, kind="child", parents=(j, k), weights=weights, similarity=float(similarity[j, k]))


def _extend(gram: Gram, experts: Sequence[Expert], settings: ExpandSettings, measure: Measure | None) -> Gram:
    if measure is not None:
        return measure(experts)
    child = experts[-1]
    return add_child(gram, child.parents, child.weights, KERNELS[settings.merge].scale(settings.drop_rate))


def _choose_parents(
    similarity: Gram, used: set[tuple[int, int]], settings: ExpandSettings, draw: np.random.Generator
) -> tuple[int, int]:
    pairs = [(j, k) for j in range(len(similarity)) for k in range(j + 1, len(similarity))]
    pairs = [pair for pair in pairs if not math.isnan(similarity[pair])]
    if settings.repeat_pairs == "avoid":
        pairs = [pair for pair in pairs if pair not in used]
    if not pairs:
        raise UpcycleError(
            f"expand: every pair of experts already has a child at {len(similarity)} experts; lower "
            "expand.num_experts or set expand.repeat_pairs=allow"
        )
    if settings.parents == "random":
        return pairs[int(draw.integers(len(pairs)))]
    return min(pairs, key=lambda pair: similarity[pair])


def _check(checkpoints: Sequence[Checkpoint], gram: Gram, copies_of: str) -> None:
    first = {"none": 0, "last": len(checkpoints) - 1, "base": len(checkpoints)}[copies_of]
    for checkpoint, norm in list(zip(checkpoints, gram.diagonal(), strict=True))[first:]:
        if not (math.isfinite(norm) and norm > 0):
            untrained = (
                "has the base's FFN weights (the first step of a warm-up has the learning rate 0: "
                "prepare.warmup_fraction=0, or a larger prepare.checkpoint_every, if it was made here)"
            )
            problem = untrained if norm == 0 else "has FFN weights that are not finite"
            raise UpcycleError(f"expand: {checkpoint.name} {problem}, so it cannot be an expert")
    for i, j in itertools.combinations(range(first, len(checkpoints)), 2):
        if gram[i, i] + gram[j, j] - 2 * gram[i, j] <= SAME * gram[j, j]:
            warn(
                f"expand: {checkpoints[i].name} and {checkpoints[j].name} have the same FFN weights and make the same "
                "expert; leave one out"
            )
