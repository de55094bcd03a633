"""Experts from checkpoints along a lineage, one flat piece of one tensor at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from upcycle.merging.kernels import KERNELS


@dataclass(frozen=True)
class Child:
    """An expert merged from earlier ones: their indices and weights."""

    parents: tuple[int, ...]
    weights: tuple[float, ...]


# eight parameters: a pure function of tensors and of what a plan says of them
def materialise(
    base: Float[Tensor, " n"],
    checkpoints: Sequence[Float[Tensor, " n"]],
    children: Sequence[Child],
    merge: str,
    drop_rate: float,
    seed: int,
    tensor: str,
    start: int = 0,
) -> Iterator[Float[Tensor, " n"]]:
    """The same piece of every child in turn, in fp32.

    child = combine(theta_0; mask_j tau_j, mask_k tau_k), tau = expert - theta_0 (UpIT, expert expansion), with
    the kernel `merge`. The mask of a parent in a child is keyed by (seed, child, parent, tensor name). Base and
    checkpoints are read once; a task vector is kept no longer than a later child needs it.
    """
    kernel = KERNELS[merge]
    scale = kernel.scale(drop_rate)
    base = base.float()
    last_use = {parent: i for i, child in enumerate(children) for parent in child.parents}
    taus = {i: c.float() - base for i, c in enumerate(checkpoints) if i in last_use}
    for i, child in enumerate(children):
        index = len(checkpoints) + i
        parents = [taus[p] for p in child.parents]
        masks = [kernel.mask(taus[p], drop_rate, (seed, index, p, tensor), start) for p in child.parents]
        expert = kernel.combine(base, parents, [weight * scale for weight in child.weights], masks)
        yield expert
        if index in last_use:
            taus[index] = expert - base
        taus = {p: vector for p, vector in taus.items() if last_use[p] > i}
