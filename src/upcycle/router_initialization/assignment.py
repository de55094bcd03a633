"""Which expert each seed sample is given to.

Legend: N samples, E experts.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from upcycle.data.chat import Sample
from upcycle.errors import UpcycleError

Losses = NDArray[np.float64]
Experts = NDArray[np.int64]


def lowest_loss(losses: Losses) -> Experts:
    """Each sample to the expert with the lowest loss (UpIT). Collapses onto the last checkpoint on training data."""
    return np.asarray(losses.argmin(axis=1), dtype=np.int64)


def balanced(losses: Losses) -> Experts:
    """Equal buckets (sizes differ by at most one) of the least total loss: a linear assignment to slots."""
    num_samples, num_experts = losses.shape
    slots = np.arange(-(-num_samples // num_experts) * num_experts) % num_experts
    # the last round of slots costs more than any re-arrangement can gain, so no bucket falls below floor(N / E)
    last_round = np.arange(len(slots)) >= num_samples - num_samples % num_experts
    rows, chosen = linear_sum_assignment(losses[:, slots] + last_round * (num_samples * np.ptp(losses) + 1.0))
    experts = np.empty(num_samples, dtype=np.int64)
    experts[rows] = slots[chosen]
    return experts


ASSIGNMENTS: dict[str, Callable[[Losses], Experts]] = {"lowest_loss": lowest_loss, "balanced": balanced}


def assign(losses: Losses, samples: Sequence[Sample], rule: str) -> Experts:
    """Expert of each sample under a rule of `ASSIGNMENTS`.

    Raises:
        UpcycleError: a loss is not finite (the sample is named).
    """
    broken = np.argwhere(~np.isfinite(losses))
    if len(broken):
        sample, expert = broken[0]
        raise UpcycleError(f"route: the loss of {samples[sample].where} under expert {expert} is not finite")
    return ASSIGNMENTS[rule](losses)


def fill_empty(experts: Experts, losses: Losses) -> dict[int, list[int]]:
    """For each expert without a sample: the samples nearest to being its own, by margin to the best expert.

    They are used in addition; the samples stay where they are.
    """
    size = max(1, len(losses) // losses.shape[1] // 2)
    margins = losses - losses.min(axis=1, keepdims=True)
    empty = sorted(set(range(losses.shape[1])) - set(experts.tolist()))
    return {expert: np.argsort(margins[:, expert], kind="stable")[:size].tolist() for expert in empty}
