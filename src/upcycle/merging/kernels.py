"""The ways to merge parents into a child, as rows: how each task vector is thinned, and how they are combined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from upcycle.merging.dare import dare
from upcycle.merging.linear import linear
from upcycle.merging.ties import agreeing_mean, agreeing_sum, trim

Key = tuple[int | str, ...]


@dataclass(frozen=True)
class Kernel:
    """child = theta_0 + combine(thin(tau_j), thin(tau_k); weights)."""

    thin: Callable[[Tensor, float, Key, int], Tensor]
    """(task vector, drop rate p, key of the mask, first element) to a task vector."""
    combine: Callable[[Sequence[Tensor], Sequence[float]], Tensor]
    whole_tensor: bool = False
    """Whether it needs a tensor at once, or can take it in pieces."""
    norm_growth: Callable[[float], float] | None = None
    """E |thin(tau)|^2 / |tau|^2 for a drop rate, if the child is linear in expectation; None if it is not."""


def _keep(task_vector: Tensor, _drop_rate: float, _key: Key, _start: int) -> Tensor:
    return task_vector


def _trim(task_vector: Tensor, drop_rate: float, _key: Key, _start: int) -> Tensor:
    return trim(task_vector, drop_rate)


KERNELS = {
    "dare": Kernel(dare, linear, norm_growth=lambda p: 1 / (1 - p)),
    "linear": Kernel(_keep, linear, norm_growth=lambda _: 1.0),
    "slerp": Kernel(_keep, linear, norm_growth=lambda _: 1.0),  # the plan's weights make it spherical
    "ties": Kernel(_trim, agreeing_mean, whole_tensor=True),
    "dare_ties": Kernel(dare, agreeing_sum),
}
"""`expand.merge` to its kernel. `dare` is what PEFT and mergekit call dare_linear."""
