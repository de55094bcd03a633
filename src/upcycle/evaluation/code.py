"""Benchmarks whose answers are programs: a model's answer is run with its tests, apart from everything else."""

import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.evaluation import sandbox

SECONDS = 10
"""Of processor time, and twice that on the clock."""
MEGABYTES = 1024
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
WARNING = (
    "--allow-code: programs that the model writes will be run, each in a process of its own with "
    f"{SECONDS} s of processor time, {MEGABYTES} MB, no network and no place to write; they can read what you can"
)
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Threads are refused, and numpy would ask for some."""


def extract_code(answer: str) -> str:
    """What stands in the first fence, or the whole answer if there is none."""
    answer = answer.replace("\r\n", "\n")
    fenced = FENCE.search(answer)
    return textwrap.dedent(fenced[1]) if fenced else answer


def passes(answer: str, setup: str, tests: Sequence[str], seconds: int = SECONDS, megabytes: int = MEGABYTES) -> bool:
    """Whether the program in an answer runs with its tests to the end.

    Raises:
        UpcycleError: this machine cannot isolate a process, or not start it.
    """
    program = "\n".join([extract_code(answer), setup, *tests])
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(Path(sandbox.__file__)), str(seconds), str(megabytes)],
                input=program.encode("utf-8", "replace"),
                capture_output=True,
                cwd=folder,
                env=NO_THREADS,
                timeout=2 * seconds,
                start_new_session=True,  # no terminal, into which it could type
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    if done.returncode == sandbox.NO_ISOLATION:
        raise UpcycleError(
            "programs that a model writes can be run on Linux alone (5.13 or newer, x86_64 or aarch64) with seccomp "
            "and Landlock; this machine lacks one of them: leave the task out"
        )
    if done.stdout != sandbox.READY:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise UpcycleError(f"the process for a model's program could not start (exit {done.returncode}): {said}")
    return done.returncode == sandbox.DONE
