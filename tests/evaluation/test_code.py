"""Programs that a model wrote: what passes, and what they cannot do."""

import socket
from pathlib import Path

import pytest

from upcycle.evaluation.code import extract_code, passes

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ADD, True),
        (f"Sure:\n```python\n{ADD}\n```\nThat adds.", True),
        (f"```\n{ADD}", True),  # cut off by the limit of tokens
        ("def add(a, b):\n    return a - b", False),
        ("def add(a, b:", False),
        ("import sys\nsys.exit(0)", False),
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("print('x' * 10)\nimport math, re, collections, heapq, itertools\n" + ADD, True),
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
        "open('big', 'wb').write(bytes(2 << 20))",
    ],
)
def test_it_starts_no_process_and_takes_no_more_than_its_share(deed: str) -> None:
    assert not can(deed)


def test_it_is_stopped_when_its_time_is_over() -> None:
    assert not can("while True: pass", seconds=1)
    assert not can("import time; time.sleep(60)", seconds=1)


def test_it_leaves_nothing_where_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert can("open('small', 'w').write('x')")
    assert not list(tmp_path.iterdir())
