"""Samples side by side, as a model reads them.

Legend: B samples, S tokens of the longest one.
"""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

IGNORED = -100
"""Label of a token that no loss is taken of."""


@dataclass(frozen=True)
class Batch:
    """Right-padded samples; `indices` are their places in the list that was batched."""

    indices: list[int]
    input_ids: Int[Tensor, "B S"]
    attention_mask: Int[Tensor, "B S"]
    labels: Int[Tensor, "B S"]
