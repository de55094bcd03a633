"""Inner products of the FFN task vectors of all checkpoints, in one streaming pass.

Legend: n checkpoints, N elements of a piece.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from upcycle.console import track
from upcycle.errors import UpcycleError
from upcycle.models.families import family_of, ffn_names
from upcycle.models.folders import read_config
from upcycle.models.safetensors_io import ModelReader, pieces

PIECE = 1 << 20
"""Elements per piece: a few MB, whatever the tensor."""


def task_vector_gram(base: Path, checkpoints: Sequence[Path]) -> NDArray[np.float64]:
    """(n, n) inner products of tau_i = C_i - theta_0 over all FFN weights, summed in fp64.

    In fp32 a cosine of a vector with itself comes out as 0.98 over 8e7 entries.

    Raises:
        UpcycleError: a tensor is missing or has another shape than the base's.
    """
    config = read_config(base)
    names = [dense for dense, _ in ffn_names(family_of(config, str(base)), config)]
    source, readers = ModelReader(base), [ModelReader(c) for c in checkpoints]
    gram = torch.zeros(len(readers), len(readers), dtype=torch.float64)
    for name in track(names, "expand: comparing checkpoints"):
        shape = source.spec(name).shape
        for reader in readers:
            if reader.spec(name).shape != shape:
                raise UpcycleError(f"{reader.folder}: {name} has shape {reader.spec(name).shape}, the base has {shape}")
        for begin, end, _ in pieces(shape, PIECE):
            gram += piece_gram(source.rows(name, begin, end), [r.rows(name, begin, end) for r in readers])
    return gram.numpy()


def piece_gram(base: Float[Tensor, "..."], experts: Sequence[Float[Tensor, "..."]]) -> Float[Tensor, "n n"]:
    """Inner products of the differences to `base` in one piece."""
    task_vectors = torch.stack([expert.double() - base.double() for expert in experts]).flatten(1)
    return task_vectors @ task_vectors.T
