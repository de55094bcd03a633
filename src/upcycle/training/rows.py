"""The order of the rows, where several processes need equally many."""

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler

from upcycle.routing.batch import IGNORED

EMPTY = {"input_ids": [0], "labels": [IGNORED]}
"""A row that no loss counts; it stands behind the real ones."""


class EvenRows(Sampler[int]):
    """The order that one process takes, and then the number of the empty row until a multiple is full.

    accelerate would take rows from the beginning a second time.
    """

    def __init__(self, rows: int, multiple: int, seed: int) -> None:
        self._rows = rows
        self._order = SeedableRandomSampler(range(rows), data_seed=seed)
        self._missing = -rows % multiple

    def __len__(self) -> int:
        return self._rows + self._missing

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from [self._rows] * self._missing

    def set_epoch(self, epoch: int) -> None:
        """As the Trainer's own sampler."""
        self._order.set_epoch(epoch)
