"""What tests of programs need of the machine."""

import pytest

from upcycle.errors import UpcycleError
from upcycle.evaluation.code import passes


@pytest.fixture(scope="session")
def isolation() -> None:
    """Skips where the kernel has none: there `passes` refuses, and nothing can be asked."""
    try:
        passes("", "", [])
    except UpcycleError as error:
        pytest.skip(str(error))
