"""What is known of the cost of a stage that was stopped."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from upcycle.pipeline.costs import read_costs

SCRIPT = """
import os, sys, time
from pathlib import Path
from upcycle.pipeline.costs import measured
from upcycle.stopping import stop_on_signals
stop_on_signals()
with measured(Path(sys.argv[1]), "route", resumed=True):
    time.sleep(0.2)
    os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_that_is_stopped_keeps_its_costs(number: signal.Signals, tmp_path: Path) -> None:
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), str(number.value)], check=False)
        assert done.returncode == 128 + number
    assert read_costs(tmp_path)["route"].seconds >= 0.4
