"""Experts from checkpoints along a lineage, one flat piece of one tensor at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from upcycle.merging.dare import dare, merge


@dataclass(frozen=True)
class Child:
    """An expert merged from two earlier ones: their indices and weights."""

    parents: tuple[int, ...]
    weights: tuple[float, ...]


def materialise(
    base: Float[Tensor, " n"],
    checkpoints: Sequence[Float[Tensor, " n"]],
    children: Sequence[Child],
    drop_rate: float,
    seed: int,
    tensor: str,
    start: int = 0,
) -> list[Float[Tensor, " n"]]:
    """The same piece of every expert: the checkpoints as they are, then each child in turn.

    child = theta_0 + alpha DARE(tau_j) + beta DARE(tau_k), tau = expert - theta_0 (UpIT, expert expansion).
    The mask of a parent in a child is keyed by (seed, child, parent, tensor name).
    """
    experts = list(checkpoints)
    for child in children:
        index = len(experts)
        dropped = [
            dare(experts[parent] - base, drop_rate, (seed, index, parent, tensor), start) for parent in child.parents
        ]
        experts.append(merge(base, dropped, list(child.weights)))
    return experts
