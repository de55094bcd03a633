"""Do we read from a folder what transformers reads there? Every tensor's name and shape, and a sample of its values.

`identity` reads both of its sides through our reader, so it cannot see that the reader takes another file, another name
or another order of rows than everybody else. Here the truth is transformers' own loading of the same folder. It maps
the files as we do, so only the pages of the samples are read, however large the model is.
"""

from pathlib import Path

import torch
from torch import Tensor

from upcycle.architectures.families import computed_fields
from upcycle.architectures.mapping import needed_tensors
from upcycle.errors import UpcycleError
from upcycle.types import Config
from upcycle.weights.folders import load_as_others_do
from upcycle.weights.names import HEAD
from upcycle.weights.safetensors_io import ModelReader

RUNS, RUN = 16, 256
"""Runs of consecutive elements, evenly spread over a tensor. Rows of another order, a transposed, a swapped or an older
tensor differ in them."""
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
TIED = "tie_word_embeddings"


def check_agreement(reader: ModelReader, config: Config) -> None:
    """Compare what is read here with the model that transformers makes of the folder.

    Args:
        config: with the tie of embeddings and head as it is taken here, see `mapping.with_own_head`.

    Raises:
        UpcycleError: names the folder, and the field or tensor that transformers reads otherwise, or says why
            transformers cannot load the folder.
    """
    where = reader.folder
    their_config, tensors = load_as_others_do(where, main_dtype(reader))
    ours, found = computed_fields(config), computed_fields(their_config)
    for field in sorted(ours.keys() - {TIED}):
        if ours[field] != found.get(field):
            raise otherwise(where, f"config.json's {field}", repr(found.get(field)), repr(ours[field]))
    sources = {name: name for name in needed_tensors(reader, config)}
    if config.get(TIED):
        sources[HEAD] = reader.embeddings
    if odd := sorted(sources.keys() ^ tensors.keys()):
        has = ("nothing", "a tensor")
        raise otherwise(where, odd[0], has[odd[0] in tensors], has[odd[0] in sources])
    for name in sorted(tensors, key=lambda name: (name == HEAD, name)):  # of a tied model the embeddings first
        compare_tensors(where, name, tensors[name], reader.tensor(sources[name]))


def compare_tensors(where: Path, name: str, theirs: Tensor, ours: Tensor, program: str = "transformers") -> None:
    """Shape, and the bits of a sample of the values in their dtype.

    Raises:
        UpcycleError: they differ.
    """
    if theirs.shape != ours.shape:
        raise otherwise(where, name, f"shape {tuple(theirs.shape)}", f"{tuple(ours.shape)}", program)
    left, right = sample(theirs), sample(ours).to(theirs.dtype)
    bits = BITS[theirs.dtype.itemsize]
    different = left.view(bits) != right.view(bits)  # NaN is NaN here
    if different.any():
        first = int(different.flatten().nonzero()[0])
        found, taken = (float(values.flatten()[first]) for values in (left, right))
        raise otherwise(where, name, f"{found:.4g} at one place", f"{taken:.4g}", program)


def sample(tensor: Tensor) -> Tensor:
    """RUNS runs of RUN elements, from the first to the last; a small tensor whole."""
    flat = tensor.detach().reshape(-1)
    if len(flat) <= RUNS * RUN:
        return flat
    return flat.as_strided((RUNS, RUN), ((len(flat) - RUN) // (RUNS - 1), 1), flat.storage_offset())


def main_dtype(reader: ModelReader) -> torch.dtype:
    """The dtype of most of the bytes: what transformers need not convert it does not copy."""
    sizes: dict[torch.dtype, int] = {}
    for spec in map(reader.spec, reader.names()):
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def otherwise(where: Path, what: str, theirs: str, ours: str, program: str = "transformers") -> UpcycleError:
    """What to raise where `program` reads something else than we do."""
    return UpcycleError(
        f"{where}: {program} reads {what} as {theirs}, upcycle as {ours}; the folder would be misread, so it is "
        f"refused; save it again with save_pretrained of {program}, and please report it"
    )
