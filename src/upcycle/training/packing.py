"""Batches without most of their padding: rows side by side in lines as long as the longest row.

Legend: N lines, S tokens of a line.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from upcycle.distributed.shards import is_sharded
from upcycle.routing.batch import IGNORED
from upcycle.types import Config, Model

TOKEN_MASK = "token_mask"
"""1 for a token of a row, 0 for padding; no model takes it, unlike `attention_mask`."""

MASKED = ("sdpa", "eager")
"""Implementations of attention with a mask, which tells rows of several lines apart; flash attention mixes them."""
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention", "mlp", "moe"}
"""Kinds of layers that a mask reaches; recurrent ones and convolutions carry a row's tokens into the next."""
PROBE, LEAK = 12, 0.1
"""Tokens of a row, and the share of what it sees of another that is rounding."""
DRAWN = 100
"""Micro-batches, to find the largest."""


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
    """Whether rows may lie side by side in what it trains on: every layer tells them apart.

    Convolutions, mamba and linear attention do not, nor do models that leave the positions out of their masks. Those
    are found by a row of a few tokens behind another one; a model in shards cannot be tried so.
    """
    masked = model.config._attn_implementation in MASKED and is_masked(model.config.to_dict())
    return masked and (is_sharded(model) or _sees_itself_alone(model))


def is_masked(config: Config) -> bool:
    """Whether a mask keeps a row's tokens from those of another in every layer of a model."""
    return {*(config.get("layer_types") or ()), *(config.get("layers_block_type") or ())} <= ATTENDING


@torch.no_grad()
def _sees_itself_alone(model: Model) -> bool:
    """Whether positions that start anew take away what a row sees of the row before it."""
    ids = torch.arange(2 * PROBE, device=model.device)[None] % model.config.vocab_size
    positions = torch.arange(2 * PROBE, device=model.device)[None]
    training = model.training
    model.eval()
    alone = model(input_ids=ids[:, PROBE:], use_cache=False).logits
    apart, seen = (
        (model(input_ids=ids, position_ids=at, use_cache=False).logits[:, PROBE:] - alone).abs().max()
        for at in (positions % PROBE, positions)
    )
    model.train(training)
    return bool(apart <= LEAK * seen)


def largest_batch(lengths: Sequence[int], rows: int, packed: bool) -> tuple[int, int]:
    """Lines, and tokens of a line, of the largest of some micro-batches drawn at random.

    Args:
        lengths: tokens of the rows; a single one is that of all.
        rows: of a micro-batch.
        packed: whether rows lie side by side.
    """
    if len(lengths) == 1:
        return rows, lengths[0]
    draw = random.Random(0)
    batches = (draw.sample(lengths, min(rows, len(lengths))) for _ in range(DRAWN))
    shapes = ((len(fill_lines(batch)) if packed else rows, max(batch)) for batch in batches)
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def fill_lines(lengths: Sequence[int]) -> list[list[int]]:
    """Which rows share a line as long as the longest row: each, from the longest on, goes into the first with room."""
    longest = max(lengths)
    lines: list[tuple[list[int], int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((i for i, (_, used) in enumerate(lines) if used + lengths[number] <= longest), len(lines))
        line, used = lines[place] if place < len(lines) else ([], 0)
        lines[place : place + 1] = [([*line, number], used + lengths[number])]
    return [line for line, _ in lines]
