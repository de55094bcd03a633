"""Batches without most of their padding: rows side by side in lines as long as the longest row.

Legend: N lines, S tokens of a line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from upcycle.routing.batch import IGNORED
from upcycle.types import Model

TOKEN_MASK = "token_mask"
"""1 for a token of a row, 0 for padding; no model takes it, unlike `attention_mask`."""


@dataclass(frozen=True)
class SideBySide:
    """A collator whose rows see themselves alone: positions that start anew tell transformers' masks where a row ends.

    The loss is that of a padded batch; the batch is still that of the same rows.
    """

    padding: int

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Int[Tensor, "N S"]]:
        lines = fill_lines([len(row["input_ids"]) for row in rows])
        width = max(len(row["input_ids"]) for row in rows)
        found: dict[str, list[list[int]]] = {name: [] for name in ("input_ids", "labels", "position_ids", TOKEN_MASK)}
        for line in lines:
            parts = [rows[number] for number in line]
            lengths = [len(part["input_ids"]) for part in parts]
            rest = width - sum(lengths)
            ids = [token for part in parts for token in part["input_ids"]]
            # nothing before a row's first token predicts it
            labels = [label for part in parts for label in (IGNORED, *part["labels"][1:])]
            found["input_ids"].append(ids + [self.padding] * rest)
            found["labels"].append(labels + [IGNORED] * rest)
            found["position_ids"].append([place for length in (*lengths, rest) for place in range(length)])
            counted = [int(any(label != IGNORED for label in part["labels"])) for part in parts]  # an empty row: 0
            mask = [one for one, length in zip(counted, lengths, strict=True) for _ in range(length)]
            found[TOKEN_MASK].append(mask + [0] * rest)
        return {name: torch.tensor(values) for name, values in found.items()}


def can_pack(model: Model) -> bool:
    """Whether its attention has a mask, which tells rows apart in several lines; flash attention would mix them."""
    return model.config._attn_implementation in ("sdpa", "eager")


def fill_lines(lengths: Sequence[int]) -> list[list[int]]:
    """Which rows share a line as long as the longest row: each, from the longest on, goes into the first with room."""
    longest = max(lengths)
    lines: list[tuple[list[int], int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((i for i, (_, used) in enumerate(lines) if used + lengths[number] <= longest), len(lines))
        line, used = lines[place] if place < len(lines) else ([], 0)
        lines[place : place + 1] = [([*line, number], used + lengths[number])]
    return [line for line, _ in lines]
