"""A few of the damaged inputs of `make torture`: others in each run of a new seed."""

import pytest

from fuzzing import run_cases


@pytest.mark.filterwarnings("ignore")  # of libraries, about what was damaged
def test_damaged_inputs_are_refused_in_a_line_or_do_no_harm() -> None:
    assert run_cases(30, seed=7) == []
