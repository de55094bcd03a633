"""Inner products of the FFN task vectors of all experts, in one streaming pass.

Legend: m experts, N elements of a piece.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from upcycle.architectures.families import family_of
from upcycle.architectures.mapping import with_layers
from upcycle.architectures.moves import Region, ffn_regions
from upcycle.errors import UpcycleError
from upcycle.merging.kernels import KERNELS
from upcycle.merging.lineage import Child, materialise
from upcycle.merging.low_rank import Adapter, inner
from upcycle.records.plan import Expert, Gram
from upcycle.weights.base import Base
from upcycle.weights.safetensors_io import ModelReader, pieces
from upcycle.weights.streaming import PIECE, map_tensors

Measure = Callable[[Sequence[Expert]], Gram]
"""The Gram matrix of experts, children included."""

BLOCK = 4096
"""Entries that are summed in fp32, to a relative 1e-7; over 8e7 of them a cosine with itself would come out as 0.98."""


RUN = 8 * BLOCK
"""Entries of each model at once: they stay in a core's cache."""


def task_vector_gram(
    base: Base,
    sources: Sequence[Path],
    children: Sequence[Child] = (),
    merge: str = "linear",
    drop_rate: float = 0.0,
    seed: int = 0,
) -> Gram:
    """(m, m) inner products of tau_i = E_i - theta_0 over all FFN weights, to a relative 1e-7 of the norms.

    The experts are the dense models `sources`, then the `children` made from them along the way.

    Raises:
        UpcycleError: a tensor is missing, has another shape than the base's, or holds NaN or Inf.
    """
    config = with_layers(base.config, base.layers)
    family = family_of(config, str(base.folder))
    readers = [ModelReader(folder) for folder in (base.folder, *sources)]
    regions = ffn_regions(family.layout, config)
    for reader in readers:
        check_shapes(reader, regions)

    def gram_of(region: Region) -> Float[Tensor, "m m"]:
        total = torch.zeros(len(sources) + len(children), len(sources) + len(children), dtype=torch.float64)
        for begin, count in pieces(region.count, region.count if KERNELS[merge].whole_tensor else PIECE):
            start = region.element + begin
            theta, *experts = (reader.elements(region.tensor, start, count) for reader in readers)
            made = materialise(theta, experts, children, merge, drop_rate, seed, region.tensor, start)
            total += piece_gram(theta, [*experts, *made])
        if not total.isfinite().all():
            name_the_culprit(readers, region)
        return total

    return torch.stack(map_tensors(gram_of, regions, "expand: comparing experts")).sum(dim=0).numpy()


def adapter_gram(adapters: Sequence[Adapter], known: Gram | None = None) -> Gram:
    """(m, m) inner products of what LoRA adapters add, s B A, over all weights; no product is formed.

    Args:
        known: the inner products of the first adapters, which are not computed again.
    """
    begin = 0 if known is None else len(known)
    gram = np.zeros((len(adapters), len(adapters)))
    gram[:begin, :begin] = 0.0 if known is None else known
    for i in range(begin, len(adapters)):
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = inner(adapters[i], adapters[j])
    return gram


def piece_gram(base: Float[Tensor, " N"], experts: Sequence[Float[Tensor, " N"]]) -> Float[Tensor, "m m"]:
    """Inner products of the differences to `base` in one piece: in fp32 within a block, from there on in fp64."""
    runs = [slice(begin, begin + count) for begin, count in pieces(len(base), RUN)]
    return torch.cat([_blocks(base[run], [e[run] for e in experts]) for run in runs]).double().sum(dim=0)


def _blocks(base: Float[Tensor, " n"], experts: Sequence[Float[Tensor, " n"]]) -> Float[Tensor, "blocks m m"]:
    """Those of each block, the last filled up with zeros."""
    blocks = -(-len(base) // BLOCK)
    values = torch.zeros(1 + len(experts), blocks * BLOCK)
    for row, source in zip(values, (base, *experts), strict=True):
        row[: len(base)].copy_(source)
    task_vectors = values[1:].sub_(values[0]).view(len(experts), blocks, BLOCK).transpose(0, 1)
    return task_vectors @ task_vectors.mT


def check_shapes(reader: ModelReader, regions: Sequence[Region]) -> None:
    """Raises UpcycleError if a tensor is not as large as the configuration says."""
    for region in regions:
        if (found := reader.spec(region.tensor).shape) != region.full:
            raise UpcycleError(
                f"{reader.folder}: {region.tensor} has shape {found}, expected {region.full} by the base's config.json"
            )


def name_the_culprit(readers: Sequence[ModelReader], region: Region) -> None:
    """Raises UpcycleError with the first model whose part of the region is not finite."""
    for reader in readers:
        values = reader.elements(region.tensor, region.element, region.count)
        if not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            raise UpcycleError(
                f"{reader.folder}: {bad} of the {region.count} values of {region.tensor} are NaN or Inf; this model "
                "is damaged (diverged training?); leave it out or use an earlier one"
            )
