"""Random numbers that depend on a key and a position alone.

A DARE mask must not depend on the order in which tensors are visited, the number of threads or the way a model is
cut into shards. So element i of a mask is a function of (key, i): AES in counter mode, a counter-based generator
(Salmon et al. 2011, section 4.1) that starts at any position without drawing what lies before it, and that processors
compute in hardware, three times as fast as numpy's Philox.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from jaxtyping import Float
from torch import Tensor

BLOCK = 16
"""Bytes that a counter gives."""
LEVELS = 1 << 16
MOST_OPEN = 256
_left_open: dict[tuple[tuple[int | str, ...], int], CipherContext] = {}
"""Streams by key and the byte that they have come to: to begin one takes as long as a thousand numbers of it."""


def keep_mask(key: tuple[int | str, ...], start: int, count: int, drop_rate: float) -> Float[Tensor, " count"]:
    """1 for the elements `start .. start + count` of the stream `key` that are kept, 0 for the others.

    Each is dropped with probability `dropped_levels(drop_rate) / 65536`, independently.
    """
    numbers = np.frombuffer(random_bytes(key, 2 * start, 2 * count), "<u2")
    kept = numbers >= dropped_levels(drop_rate)
    return torch.from_numpy(kept.astype(np.float32))  # sooner than torch widens them


def dropped_levels(drop_rate: float) -> int:
    """How many of the 65536 values mean drop; the rate in force is this over 65536."""
    return round(drop_rate * LEVELS)


def random_bytes(key: tuple[int | str, ...], start: int, count: int) -> memoryview:
    """Bytes `start .. start + count` of the stream `key`."""
    skip, stream = 0, _left_open.pop((key, start), None)
    if stream is None:
        first, skip = divmod(start, BLOCK)
        stream = Cipher(algorithms.AES128(_key(key)), modes.CTR(first.to_bytes(BLOCK, "big"))).encryptor()
    drawn = memoryview(stream.update(_zeros(skip + count)))[skip:]
    if len(_left_open) >= MOST_OPEN:
        _left_open.clear()
    _left_open[key, start + count] = stream
    return drawn


@lru_cache(maxsize=4)  # pieces of a few sizes; a fresh one each time would be cleared by the kernel page by page
def _zeros(count: int) -> bytes:
    return bytes(count)


def _key(key: tuple[int | str, ...]) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
