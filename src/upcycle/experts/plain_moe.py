"""The one streaming writer of plain MoEs: tensors are read once, in pieces, and go straight to their place.

What differs between assembly and folding is where an expert's weights come from; that is `Parts`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from upcycle.architectures.identity import check_identity, rewritten
from upcycle.architectures.mapping import Mapping, read_region
from upcycle.architectures.moves import FfnMove, Region, SharedMove, router_tensors
from upcycle.console import say, warn
from upcycle.errors import UpcycleError, counted
from upcycle.types import Config
from upcycle.weights.folders import require_space, write_config
from upcycle.weights.safetensors_io import DTYPE_NAMES, ModelReader, ModelWriter, pieces
from upcycle.weights.streaming import PIECE, map_tensors

Piece = tuple[int, int, Tensor]
"""(expert, first element within its weight, values)"""


@dataclass(frozen=True)
class Parts:
    """Where a MoE's tensors come from."""

    shared: Sequence[ModelReader]
    """The models whose mean the weights outside the experts are."""
    experts: Callable[[Region], Iterable[Piece]]
    """An FFN weight of the dense model to that weight of every expert, in pieces of whole rows."""
    expert: Callable[[int, Region], Tensor]
    """An expert's weight, whole, in the region's shape; of those that are compared."""
    routers: Sequence[Tensor]
    """(E, H) of each layer, E whole experts."""
    compared: Sequence[int]
    """The experts whose logits are compared with those of their dense models."""
    num_experts_per_tok: int
    moments: bool = False
    """Whether they are an optimizer's moments: nothing is said or compared, and what is rewritten begins at zero."""


def write_moe(out_dir: Path, mapping: Mapping, parts: Parts, stored: torch.dtype, verb: str, hint: str) -> Config:
    """Write a MoE's tensors and config.json, and compare its logits with the dense models'.

    Peak memory is a few tensor chunks, whatever the model's size.

    Args:
        stored: dtype of what is written.
        verb: what progress is called.
        hint: how to need less disk space.

    Returns:
        The configuration.

    Raises:
        UpcycleError: not enough disk space, NaN or Inf, or logits that are not the dense model's.
    """
    require_space(out_dir, mapping.num_parameters() * stored.itemsize, "the MoE", hint)
    with ModelWriter(out_dir, mapping.specs(stored)) as writer:
        shared = [move for move in mapping.shared if not parts.moments or _keeps_moments(move, mapping.shared)]
        map_tensors(partial(_write_shared, writer, parts.shared), shared, f"{verb}: shared weights")

        def write_experts(move: FfnMove) -> None:
            for expert, element, values in parts.experts(move.dense):
                if not expert:  # of the others nothing can be wrong that is not with it, or was found in expansion
                    check_finite(values, f"the FFN weight {move.dense.tensor}")
                made = rewritten(values.reshape(-1, move.dense.shape[-1]), move.rewrite)
                for target, begin, part in mapping.slicing.place(move, expert, element, made):
                    writer.write(target.tensor, part, target.element + begin)

        ffns = [move for move in mapping.ffn if not parts.moments or _keeps_moments(move, ())]
        map_tensors(write_experts, ffns, f"{verb}: experts")
        for name, tensor in _small_tensors(mapping, parts).items():
            writer.write(name, tensor)
    dtype_name = str(stored).removeprefix("torch.")
    config = mapping.moe_config(parts.num_experts_per_tok, dtype_name)
    write_config(out_dir, config)
    if parts.moments:
        return config
    millions, count = mapping.num_parameters() / 1e6, mapping.num_experts
    sliced = f" of {mapping.granularity} slices each" if mapping.granularity > 1 else ""
    what = f"{mapping.family.moe.model_type} with {counted(count, 'expert')}{sliced}"
    say(f"{verb}: {what}, {millions:.1f}M parameters in {dtype_name}")
    difference = _compare(out_dir, mapping, parts, stored)
    say(f"{verb}: logits of a cut-down copy with equal experts are the dense model's (difference {difference:.0e})")
    return config


def storage_dtype(dtype: str, reader: ModelReader, mapping: Mapping) -> torch.dtype:
    """The dtype of a name; `source` is the widest of a model's FFN weights, and says what is rounded to it."""
    if dtype != "source":
        return DTYPE_NAMES[dtype]
    stored = mapping.widest(reader)
    names = dict.fromkeys(move.dense.tensor for move in mapping.shared)
    wider = [name for name in names if reader.spec(name).dtype.itemsize > stored.itemsize]
    if wider:
        warn(
            f"{counted(len(wider), 'tensor')} such as {wider[0]} of {reader.folder} have more precision than its FFNs, "
            f"and are rounded to {str(stored).removeprefix('torch.')} with them (assemble.dtype=float32 keeps them)"
        )
    return stored


def _write_shared(writer: ModelWriter, readers: Sequence[ModelReader], move: SharedMove) -> None:
    """Copy a run of rows from one model, or the mean of several; refuses NaN and Inf."""
    source, target = move.dense, move.moe
    width = prod(source.shape[1:])
    together = move.rewrite.rows * width if move.rewrite else 1
    for begin, count in pieces(source.count, max(PIECE // together, 1) * together):
        values = _mean([reader.elements(source.tensor, source.element + begin, count) for reader in readers])
        check_finite(values, f"{readers[-1].folder}: {source.tensor}")
        if move.rewrite:
            values = rewritten(values.view(-1, *source.shape[1:]), move.rewrite)
        writer.write(target.tensor, values, target.element + begin)


def check_finite(values: Tensor, what: str) -> None:
    """Raises UpcycleError for NaN or Inf."""
    if not values.float().sum().isfinite() and not values.isfinite().all():  # the sum is quicker
        raise UpcycleError(f"{what} holds NaN or Inf; take an undamaged model")


def _keeps_moments(move: SharedMove | FfnMove, others: Sequence[SharedMove]) -> bool:
    """Whether it is the same tensor: not computed from another, nor one of two that were one (a tied head)."""
    is_alone = sum(other.dense == move.dense for other in others) < 2
    return is_alone and (move.rewrite is None or move.rewrite.permutes)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack([value.float() for value in values]).mean(dim=0)


def _small_tensors(mapping: Mapping, parts: Parts) -> dict[str, Tensor]:
    """The routers, and what the architecture insists on and that changes nothing; as moments nothing yet."""
    names = router_tensors(mapping.family.moe.layout, mapping.config)
    vectors = [router.repeat_interleave(mapping.granularity, dim=0) for router in parts.routers]
    constants = {n: torch.zeros_like(t) if parts.moments else t for n, t in mapping.constants.items()}
    return dict(zip(names, vectors, strict=True)) | constants


def _compare(out_dir: Path, mapping: Mapping, parts: Parts, stored: torch.dtype) -> float:
    """The largest difference of logits between what was written, every expert being one, and that dense model."""
    made = ModelReader(out_dir)

    def dense(expert: int, region: Region) -> Tensor:
        if region.tensor in mapping.shapes:
            return _mean([read_region(reader, region) for reader in parts.shared])
        return parts.expert(expert, region)

    return max(
        check_identity(mapping, partial(dense, expert), partial(read_region, made), expert, stored)
        for expert in parts.compared
    )
