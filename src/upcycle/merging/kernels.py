"""The ways to merge parents into a child, as rows: what is left out of each task vector, and how they are combined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from upcycle.merging.dare import Key, drop_mask, rescale
from upcycle.merging.linear import linear
from upcycle.merging.ties import agreeing_mean, agreeing_sum, trim_mask

Mask = Callable[[Tensor, float, Key, int], Tensor | None]
"""(task vector, drop rate p, key of the mask, first element) to a mask of 0 and 1; None: all is kept."""


@dataclass(frozen=True)
class Kernel:
    """child = combine(theta_0; mask_j tau_j, mask_k tau_k; s w_j, s w_k)."""

    mask: Mask
    combine: Callable[[Tensor, Sequence[Tensor], Sequence[float], Sequence[Tensor | None]], Tensor]
    """(theta_0, task vectors, weights, masks) to a child."""
    rescale: Callable[[float], float] | None = None
    """What masking must be multiplied by to keep its expectation; None: nothing."""
    linear: bool = True
    """Whether the child is linear in its parents, in expectation."""
    whole_tensor: bool = False
    """Whether it needs a tensor at once, or can take it in pieces."""

    def scale(self, drop_rate: float) -> float:
        """s; also E |s mask tau|^2 / |tau|^2, as dropping leaves 1 / s of the squared norm."""
        return 1.0 if self.rescale is None else self.rescale(drop_rate)


def _keep_all(_task_vector: Tensor, _drop_rate: float, _key: Key, _start: int) -> None:
    return None


def _trim(task_vector: Tensor, drop_rate: float, _key: Key, _start: int) -> Tensor:
    return trim_mask(task_vector, drop_rate)


KERNELS = {
    "dare": Kernel(drop_mask, linear, rescale),
    "linear": Kernel(_keep_all, linear),
    "slerp": Kernel(_keep_all, linear),  # the plan's weights make it spherical
    "ties": Kernel(_trim, agreeing_mean, linear=False, whole_tensor=True),
    "dare_ties": Kernel(drop_mask, agreeing_sum, rescale, linear=False),
}
"""`expand.merge` to its kernel. `dare` is what PEFT and mergekit call dare_linear."""
