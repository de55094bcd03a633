"""Commands in processes of their own, killed at a chosen instant: before the n-th change of a file system, or by time.

A forked process has torch imported already; a fresh one has not. Audit hooks of the interpreter count the changes, so
nothing that is tested is patched.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
ASKED = (signal.SIGINT, signal.SIGTERM)
SECONDS = 120.0
"""That a command may take."""


@dataclass(frozen=True)
class Instant:
    """When a process gets which signal: before its n-th change, or after so many seconds; neither: never."""

    number: signal.Signals = signal.SIGKILL
    change: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        when = f"change {self.change}" if self.change else f"{self.seconds:.3f} s"
        return f"{self.number.name} at {when}"


@dataclass(frozen=True)
class Ended:
    """What became of a process."""

    status: int
    """Exit status, or the signal that ended it, negative."""
    said: str
    """On stderr."""
    changes: list[str]
    """What it did to the file system, one after the other; only of a forked process."""
    seconds: float

    @property
    def place(self) -> str:
        """Its last change."""
        return self.changes[-1] if self.changes else ""


def forked(words: list[str], scratch: Path, at: Instant | None = None) -> Ended:
    """A command in a copy of this process.

    Args:
        scratch: a folder for what it says.
    """
    return Started(words, scratch, at).wait()


class Started:
    """A forked process that goes on beside this one."""

    def __init__(self, words: list[str], scratch: Path, at: Instant | None = None) -> None:
        self._at, self._begin = at, time.monotonic()
        self._files = [scratch / f"{os.urandom(4).hex()}.{name}" for name in ("out", "err", "changes")]
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)  # until the command begins
        self._pid = os.fork()
        if not self._pid:
            _child(words, self._files, at)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)

    def wait(self) -> Ended:
        """Until its end, or its signal's."""
        if self._at and self._at.seconds:
            time.sleep(max(0.0, self._begin + self._at.seconds - time.monotonic()))
            os.kill(self._pid, self._at.number)
        while not (found := os.waitpid(self._pid, os.WNOHANG))[0]:
            if time.monotonic() - self._begin > SECONDS:
                os.kill(self._pid, signal.SIGKILL)
            time.sleep(0.002)
        seconds = time.monotonic() - self._begin
        _, said, changes = (path.read_text(errors="replace") if path.exists() else "" for path in self._files)
        for path in self._files:
            path.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(found[1]), said, changes.splitlines(), seconds)


def _child(words: list[str], files: list[Path], at: Instant | None) -> None:
    """Never returns."""
    status = 70
    try:
        out, err, changes = (os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND) for path in files)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.argv = ["upcycle", *words]
        _count(changes, at)
        for number in ASKED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
        status = _command()
    finally:
        os._exit(status)


def _command() -> int:
    from upcycle.__main__ import main

    try:
        main()
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # whatever it is, the interpreter would show it
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _count(changes: int, at: Instant | None) -> None:
    """Note every change, and send the signal before the n-th."""
    count = 0

    def change(what: str) -> None:
        nonlocal count
        count += 1
        os.write(changes, what.encode("utf-8", "replace").replace(b"\n", b" ") + b"\n")
        if at and at.change == count:
            os.kill(os.getpid(), at.number)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and (arguments[2] or 0) & WRITES:
            change(f"open {arguments[0]}")
        elif event in CHANGES:
            change(" ".join([event, *(str(a) for a in arguments if isinstance(a, str | bytes))]))

    sync = os.fsync

    def fsync(handle: int) -> None:  # has no event of its own
        change(f"fsync {Path(f'/proc/self/fd/{handle}').readlink()}")
        sync(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def fresh(words: list[str], at: Instant | None = None, more: Mapping[str, str] | None = None) -> Ended:
    """A command in an interpreter of its own, which imports everything first."""
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "upcycle", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **(more or {})},
        text=True,
    )
    try:
        _, said = process.communicate(timeout=at.seconds if at else SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(at.number if at else signal.SIGKILL)
        _, said = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, said, [], time.monotonic() - begin)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small disk of its own at a folder."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount: root alone."""
    try:
        with mounted(folder, "size=64k"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
