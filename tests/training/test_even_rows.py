"""The order of rows where several processes share them."""

import pytest
from accelerate.data_loader import SeedableRandomSampler

from upcycle.training.rows import EvenRows


@pytest.mark.parametrize(("rows", "multiple", "padded"), [(16, 8, 16), (17, 8, 24), (3, 8, 8)])
def test_the_order_is_that_of_one_process_and_then_of_empty_rows(rows: int, multiple: int, padded: int) -> None:
    for epoch in (0, 3):
        alone, shared = SeedableRandomSampler(range(rows), data_seed=7), EvenRows(rows, multiple, 7)
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        found = list(shared)
        assert found == [*alone, *[rows] * (padded - rows)]
        assert len(shared) == padded
