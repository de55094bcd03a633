"""Encoded chats as a sequence of samples that lie on disk: each is made when it is asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int

from upcycle.data.chat import Sample
from upcycle.data.rows import Rows, open_table
from upcycle.errors import UpcycleError
from upcycle.types import Tokenizer


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tables of one encoding, mapped into memory."""

    rows: Rows
    paths: tuple[Path, ...]

    @cached_property
    def table(self) -> pa.Table:
        return pa.concat_tables([open_table(path) for path in self.paths])

    @cached_property
    def places(self) -> dict[int, int]:
        """Row to its place in the table."""
        return {row: place for place, row in enumerate(self.table["row"].to_pylist())}

    @cached_property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Tokens of each."""
        parts = [np.diff(part.offsets.to_numpy()) for part in self.table["input_ids"].chunks]
        return np.concatenate([np.zeros(0, np.int32), *parts])

    @cached_property
    def refused(self) -> dict[int, str]:
        """Place of each row that could not be encoded to why."""
        found = self.table["refused"]
        return {place: found[place].as_py() for place in np.flatnonzero(found.is_valid().to_numpy()).tolist()}

    def numbers(self, column: str) -> Int[np.ndarray, " N"]:
        found: Int[np.ndarray, " N"] = self.table[column].to_numpy()
        return found

    def sample(self, place: int) -> Sample:
        values = {name: column[place].as_py() for name, column in zip(self.table.column_names, self.table, strict=True)}
        row, _, _ = values.pop("row"), values.pop("num_answer_tokens"), values.pop("refused")
        found = {name: self.rows.table[name][row].as_py() for name in ("domain", "question", "where")}
        return Sample(**values, **found)


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """Some samples of an encoding, in an order."""

    encoded: Encoded
    chosen: Int[np.ndarray, " n"]
    """Their places there."""

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> "Samples": ...
    def __getitem__(self, place: int | slice) -> "Sample | Samples":
        if isinstance(place, slice):
            return Samples(self.encoded, self.chosen[place])
        return self.encoded.sample(int(self.chosen[place]))

    def __iter__(self) -> Iterator[Sample]:
        return (self.encoded.sample(int(place)) for place in self.chosen)


def lengths(samples: Sequence[Sample]) -> list[int]:
    """Tokens of each sample."""
    if isinstance(samples, Samples):
        return list(samples.encoded.lengths[samples.chosen].tolist())
    return [len(sample.input_ids) for sample in samples]


def num_answer_tokens(samples: Sequence[Sample]) -> int:
    """Tokens that are learned, of all samples."""
    if isinstance(samples, Samples):
        return int(samples.encoded.numbers("num_answer_tokens")[samples.chosen].sum())
    return sum(sample.num_answer_tokens for sample in samples)


def domains(samples: Sequence[Sample]) -> list[str]:
    """The domain of each sample."""
    if isinstance(samples, Samples):
        rows = samples.encoded.numbers("row")[samples.chosen]
        return list(samples.encoded.rows.table["domain"].take(pa.array(rows)).to_pylist())
    return [sample.domain for sample in samples]


def by_domain(samples: Sequence[Sample]) -> dict[str, Sequence[Sample]]:
    """The samples of each domain, domains in order of their names."""
    labels = np.array(domains(samples), dtype=object)
    places = {domain: np.flatnonzero(labels == domain) for domain in sorted(set(labels))}
    if isinstance(samples, Samples):
        return {domain: Samples(samples.encoded, samples.chosen[some]) for domain, some in places.items()}
    return {domain: [samples[int(place)] for place in some] for domain, some in places.items()}


def check_known(samples: Samples, tokenizer: Tokenizer, vocabulary: int) -> None:
    """
    Raises:
        UpcycleError: a sample has a token beyond the `vocabulary` tokens that the model has embeddings for.
    """
    if pc.max(pc.list_flatten(samples.encoded.table["input_ids"])).as_py() < vocabulary:
        return
    for sample in samples:
        if (highest := max(sample.input_ids)) >= vocabulary:
            raise UpcycleError(
                f"{sample.where}: its token {tokenizer.convert_ids_to_tokens(highest)!r} has the id {highest}, but the "
                f"model knows {vocabulary} tokens (vocab_size); resize the model's embeddings, or remove the token "
                "from the tokenizer or its chat template"
            )


def dataset(samples: Sequence[Sample], names: Sequence[str]) -> Any:
    """A `datasets.Dataset` of some fields; of samples on disk a view of them."""
    from datasets import Dataset, concatenate_datasets

    if not isinstance(samples, Samples):
        return Dataset.from_dict({name: [getattr(sample, name) for sample in samples] for name in names})
    parts = [Dataset.from_file(str(path)).select_columns(list(names)) for path in samples.encoded.paths]
    return concatenate_datasets(parts).select(samples.chosen)
