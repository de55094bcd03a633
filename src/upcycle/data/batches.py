"""Padded batches of samples, sorted by length and cut by a token budget.

Legend: B samples in a batch, S tokens of the longest one.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from upcycle.data.chat import Sample
from upcycle.routing.batch import IGNORED, Batch


def token_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices in order of length, grouped so that rows times longest row stays within the budget.

    A sample longer than the budget gets a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[index] <= tokens_per_batch:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def collate(samples: Sequence[Sample], indices: Sequence[int], pad_token_id: int, device: torch.device | str) -> Batch:
    """The samples at `indices`, padded on the right."""
    chosen = [samples[i] for i in indices]
    longest = max(len(s.input_ids) for s in chosen)

    def padded(rows: list[list[int]], value: int) -> Int[Tensor, "B S"]:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=device)

    return Batch(
        list(indices),
        padded([s.input_ids for s in chosen], pad_token_id),
        padded([[1] * len(s.input_ids) for s in chosen], 0),
        padded([s.labels for s in chosen], IGNORED),
    )


def make_batches(
    samples: Sequence[Sample], tokens_per_batch: int, pad_token_id: int, device: torch.device | str
) -> list[Batch]:
    """All samples in token-budgeted batches."""
    groups = token_batches([len(s.input_ids) for s in samples], tokens_per_batch)
    return [collate(samples, group, pad_token_id, device) for group in groups]
