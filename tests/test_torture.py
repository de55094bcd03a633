"""A few of the kills of `make torture`, as a program of its own: it forks, which pytest's process should not."""

import subprocess
import sys
from pathlib import Path


def test_a_killed_command_ends_in_the_bytes_of_one_that_was_left_alone() -> None:
    words = [sys.executable, str(Path(__file__).with_name("torture.py")), "--short", "--kills", "5", "--seed", "7"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("kills: ")
