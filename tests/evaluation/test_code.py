"""Programs that a model wrote: what passes, and what they cannot do."""

import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from upcycle.errors import UpcycleError
from upcycle.evaluation.code import extract_code, passes

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


@pytest.fixture(autouse=True, scope="module")
def _isolation() -> None:
    """Skips where the kernel has none: there `passes` refuses, and nothing here can be asked."""
    try:
        passes("", "", [])
    except UpcycleError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ADD, True),
        (f"Sure:\n```python\n{ADD}\n```\nThat adds.", True),
        (f"```python3\r\n{ADD}\r\n```", True),
        ("  ```Python\n" + textwrap.indent(ADD, "  ") + "\n  ```\n```other```", True),
        (f"```\n{ADD}", True),  # cut off by the limit of tokens
        ("def add(a, b):\n    return a - b", False),
        ("def add(a, b:", False),
        ("import sys\nsys.exit(0)", False),
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("print('x' * 10)\nimport math, re, collections, numpy\n" + ADD, True),
    ],
)
def test_an_answer_passes_if_its_tests_do(answer: str, expected: bool) -> None:
    assert passes(answer, "", TESTS) is expected


def test_code_is_what_stands_in_the_fence() -> None:
    assert extract_code("a\n```py\nb\nc\n```\nd ```e```") == "b\nc"
    assert extract_code("x = 1") == "x = 1"


def can(deed: str, seconds: int = 5) -> bool:
    """Whether a program gets to its end after a deed."""
    return passes(deed, "", [], seconds=seconds, megabytes=512)


def test_it_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # we can
        assert not can(f"import socket; socket.create_connection(('127.0.0.1', {port}))")
    caught = "import socket\ntry:\n    socket.socket()\nexcept PermissionError:\n    pass\nelse:\n    raise SystemExit"
    assert can(caught)


@pytest.mark.parametrize(
    "deed",
    [
        "import os; os.fork()",
        "import os; os.kill(os.getppid(), 0)",
        "import os; os.setsid()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "x = bytearray(600 << 20)",
        "import threading; threading.Thread(target=print).start()",
        "open('big', 'wb').write(bytes(2 << 20))",
        "open('/dev/tty')",
        "import os; os.mkdir('folder')",
        "import os; os.symlink('/', 'link')",
        "import os, ctypes; assert ctypes.CDLL(None).shmget(0, 64, 0o1600) >= 0",
        "import os; os.pidfd_open(os.getppid())",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CORE, (0, 0))",
        "import ctypes, os; assert ctypes.CDLL(None).sigqueue(os.getppid(), 0, None) == 0",
        "import os; open(f'/proc/{os.getppid()}/mem', 'r+b')",
        "import os; open(f'/proc/{os.getpid()}/oom_score_adj', 'w').write('0')",
    ],
)
def test_it_reaches_no_process_and_takes_no_more_than_its_share(deed: str) -> None:
    assert not can(deed)


def test_it_writes_nowhere_else(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for deed in (
        "open({!r}, 'w')",
        "import os; os.truncate({!r}, 0)",
        "import os; os.remove({!r})",
        "open({!r} + '2', 'w')",
    ):
        assert not can(deed.format(str(mine)))
    assert can(f"assert open({str(mine)!r}).read() == 'mine'")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_process_that_cannot_start_is_no_failed_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UpcycleError, match=r"could not start \(exit 1\)"):
        passes(ADD, "", TESTS)


def test_lower_limits_of_the_machine_hold() -> None:
    lower = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))"
    script = f"{lower}\nfrom upcycle.evaluation.code import passes\nassert passes({ADD!r}, '', {TESTS!r})"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_it_is_stopped_when_its_time_is_over() -> None:
    assert not can("while True: pass", seconds=1)
    assert not can("import time; time.sleep(60)", seconds=1)


def test_it_leaves_nothing_where_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert can("open('small', 'w').write('x')")
    assert not list(tmp_path.iterdir())
