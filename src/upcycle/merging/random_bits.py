"""Random numbers that depend on a key and a position alone.

A DARE mask must not depend on the order in which tensors are visited, the number of threads or the way a model is
cut into shards. So element i of a mask is a function of (key, i): Philox, a counter-based generator (Salmon et
al. 2011), started at any position without drawing what lies before it.
"""

import hashlib

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

PER_COUNTER = 16  # a Philox counter gives 4 words of 64 bits: 16 numbers of 16 bits
LEVELS = 1 << 16


def keep_mask(key: tuple[int | str, ...], start: int, count: int, drop_rate: float) -> Bool[Tensor, " count"]:
    """Which of the elements `start .. start + count` of the stream `key` are kept.

    Each is dropped with probability `dropped_levels(drop_rate) / 65536`, independently.
    """
    first, skip = divmod(start, PER_COUNTER)
    words = -(-(skip + count) // 4)
    bits = np.random.Philox(key=_key(key), counter=first).random_raw(words).view("<u2")
    return torch.from_numpy(bits[skip : skip + count] >= dropped_levels(drop_rate))


def dropped_levels(drop_rate: float) -> int:
    """How many of the 65536 values mean drop; the rate in force is this over 65536."""
    return round(drop_rate * LEVELS)


def _key(key: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")
