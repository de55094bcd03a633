"""Copies of one FFN made different: noise upcycling and Drop-Upcycling.

Legend: I intermediate size (channels), H hidden.
"""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upcycle.merging.dare import Key


def perturbed(
    weight: Float[Tensor, "rows columns"],
    channels: int,
    how: str,
    rate: float,
    std: float,
    key: tuple[int, int, str],
) -> Float[Tensor, "rows columns"]:
    """A copy's weight, in fp32: the same for any order of the work.

    Args:
        channels: the dimension of the channels: 0 in gate and up (I, H), 1 in down (H, I).
        how: `noise` or `drop`.
        key: (seed, expert, name of the tensor); what is before `.mlp.` or the like names the layer, whose weights lose
            the same channels.
    """
    seed, expert, name = key
    draw = _generator(key)
    if how == "noise":
        return add_noise(weight.float(), rate, std, draw)
    layer = ".".join(name.split(".")[:3])
    count = weight.shape[channels]
    dropped = torch.randperm(count, generator=_generator((seed, expert, layer)))[: round(rate * count)]
    return redraw(weight.float(), channels, dropped, draw)


def add_noise(weight: Float[Tensor, "rows columns"], rate: float, std: float, draw: torch.Generator) -> Tensor:
    """Gaussian noise of a standard deviation on a share of the entries: the baseline of Nakamura et al. 2025."""
    noise = torch.randn(weight.shape, generator=draw) * std
    return weight + noise * (torch.rand(weight.shape, generator=draw) < rate)


def redraw(
    weight: Float[Tensor, "rows columns"], channels: int, dropped: Int[Tensor, " n"], draw: torch.Generator
) -> Tensor:
    """Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261, section 3): channels are drawn anew from a Gaussian.

    Its mean and standard deviation are those of the entries that it replaces.
    """
    old = weight.index_select(channels, dropped)
    new = old.mean() + old.std() * torch.randn(old.shape, generator=draw)
    return weight.index_copy(channels, dropped, new)


def _generator(key: Key) -> torch.Generator:
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
