"""Benchmarks whose answers are programs: a model's answer is run with its tests, apart from everything else."""

import re
import secrets
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.evaluation import sandbox

SECONDS = 10
"""Of processor time, and twice that on the clock."""
MEGABYTES = 1024
FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
WARNING = (
    "--allow-code: programs that the model writes will be run, each in a process of its own with "
    f"{SECONDS} s of processor time and {MEGABYTES} MB, which can read the libraries of Python and of the system, "
    "write nothing, and reach no network and no other process"
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

    The tests are sent once the answer has run. A process that says of a wrong assertion that it held has been tampered
    with, and has passed nothing; `sandbox` says what this can and cannot show.

    Raises:
        UpcycleError: this machine cannot isolate a process, or not start it.
    """
    wrong = f"assert {secrets.randbits(30)} == {-secrets.randbits(30)}"
    steps = [(extract_code(answer), True), (wrong, False), ("\n".join([setup, *tests]), True), (wrong, False)]
    with _process(seconds, megabytes) as process:
        return all(_ends(process, program) is expected for program, expected in steps)


@contextmanager
def _process(seconds: int, megabytes: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for programs; killed at the end, and after twice the seconds."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(Path(sandbox.__file__)), str(seconds), str(megabytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env=NO_THREADS,
        start_new_session=True,  # no terminal, into which it could type
    )
    watch = threading.Timer(2 * seconds, process.kill)
    watch.start()
    try:
        assert process.stdout is not None
        if process.stdout.read(len(sandbox.READY)) != sandbox.READY:
            raise _not_started(process)
        yield process
    finally:
        watch.cancel()
        process.kill()
        process.communicate()


def _not_started(process: subprocess.Popen[bytes]) -> UpcycleError:
    said = process.communicate()[1].decode(errors="replace").strip()[-500:]
    if process.returncode != sandbox.NO_ISOLATION:
        return UpcycleError(f"the process for a model's program could not start (exit {process.returncode}): {said}")
    return UpcycleError(
        "running programs that a model writes needs Linux (5.13 or newer, x86_64 or aarch64) with seccomp "
        "and Landlock; this machine lacks one of them; leave the task out"
    )


def _ends(process: subprocess.Popen[bytes], program: str) -> bool | None:
    """Whether a program ends or raises; None if the process says neither, because it is gone or was tampered with."""
    assert process.stdin is not None
    assert process.stdout is not None
    source, ended, raised = program.encode("utf-8", "replace"), *(secrets.token_bytes(sandbox.WORD) for _ in range(2))
    try:
        process.stdin.write(len(source).to_bytes(4, "big") + source + ended + raised)
        process.stdin.flush()
    except BrokenPipeError:
        return None
    return {ended: True, raised: False}.get(process.stdout.read(sandbox.WORD))
