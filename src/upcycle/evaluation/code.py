"""Benchmarks whose answers are programs: a model's answer is run with its tests, apart from everything else."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.evaluation import sandbox

SECONDS = 10
"""Of processor time, and twice that on the clock."""
MEGABYTES = 1024
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|$)", re.DOTALL)
WARNING = (
    "--allow-code: programs that the model writes will be run, each in a process of its own with "
    f"{SECONDS} s of processor time, {MEGABYTES} MB and no network, and with your rights on files"
)


def extract_code(answer: str) -> str:
    """What stands in the first fence, or the whole answer if there is none."""
    fenced = FENCE.search(answer)
    return fenced[1] if fenced else answer


def passes(answer: str, setup: str, tests: Sequence[str], seconds: int = SECONDS, megabytes: int = MEGABYTES) -> bool:
    """Whether the program in an answer runs with its tests to the end.

    Raises:
        UpcycleError: this machine cannot cut a process off from the network.
    """
    program = "\n".join([extract_code(answer), setup, *tests])
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(Path(sandbox.__file__)), str(seconds), str(megabytes)],
                input=program.encode("utf-8", "replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=2 * seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode == sandbox.NO_ISOLATION:
        raise UpcycleError("code benchmarks need Linux on x86_64 or aarch64 with seccomp, which this machine lacks")
    return done.returncode == sandbox.DONE
