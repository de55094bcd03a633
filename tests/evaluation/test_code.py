"""Programs that a model wrote: what passes, and what they cannot do. What they did is looked for from outside."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from upcycle.errors import UpcycleError
from upcycle.evaluation.code import extract_code, passes

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


pytestmark = pytest.mark.usefixtures("isolation")


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
        "import os; os.setsid()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "x = bytearray(600 << 20)",
        "import mmap; mmap.mmap(-1, 600 << 20)",
        "import threading; threading.Thread(target=print).start()",
        "import os; x = [os.pipe() for _ in range(40)]",
        "import os; os.memfd_create('x')",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
        "import ctypes; assert ctypes.CDLL(None).shmget(0, 64, 0o1600) >= 0",
        "import multiprocessing.shared_memory as m; m.SharedMemory(create=True, size=64)",
    ],
)
def test_it_takes_no_more_than_its_share(deed: str) -> None:
    assert not can(deed)


@pytest.fixture
def victim() -> Iterator[int]:
    """A process of ours, which is to live on as it is."""
    with subprocess.Popen(["sleep", "60"]) as process:
        before = os.sched_getscheduler(process.pid), os.getpriority(os.PRIO_PROCESS, process.pid)
        yield process.pid
        assert process.poll() is None
        assert before == (os.sched_getscheduler(process.pid), os.getpriority(os.PRIO_PROCESS, process.pid))
        process.kill()


DEEDS_TO_PROCESSES = [
    "os.kill({pid}, 9)",
    "assert libc.sigqueue({pid}, 9, None) == 0",
    "assert libc.syscall(200, {pid}, 9) == 0",  # tkill
    "assert libc.syscall(234, {pid}, {pid}, 9) == 0",  # tgkill
    "signal.pidfd_send_signal(os.pidfd_open({pid}), 9)",
    "fcntl.fcntl(r, fcntl.F_SETOWN, {pid})",
    "fcntl.fcntl(r, 15, struct.pack('ii', 1, {pid}))",  # F_SETOWN_EX
    "fcntl.fcntl(r, 10, 9)",  # F_SETSIG
    "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)",
    "fcntl.ioctl(r, 0x8901, struct.pack('i', {pid}))",  # FIOSETOWN
    "fcntl.ioctl(r, 0x5452, struct.pack('i', 1))",  # FIOASYNC
    "fcntl.ioctl(r, 0x5412, b'x')",  # TIOCSTI
    "os.sched_setscheduler({pid}, os.SCHED_IDLE, os.sched_param(0))",
    "os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
    "os.sched_setaffinity({pid}, [0])",
    "resource.prlimit({pid}, resource.RLIMIT_CORE, (0, 0))",
    "resource.prlimit({pid}, resource.RLIMIT_CORE)",
    "assert libc.ptrace(16, {pid}, 0, 0) == 0",
    "assert libc.prctl(1, 9, 0, 0, 0) == 0",
    "open('/proc/{pid}/mem', 'r+b')",
    "open('/proc/{pid}/environ').read()",
    "open('/proc/self/oom_score_adj', 'w').write('0')",
]


def all_refused(deeds: list[str], **names: object) -> bool:
    """Whether each of the deeds raises when it is tried in the sandbox."""
    tried = f"""
import ctypes, fcntl, mmap, os, pathlib, resource, signal, socket, struct
libc, (r, w), done = ctypes.CDLL(None, use_errno=True), os.pipe(), []
for deed in {[deed.format(**names) for deed in deeds]!r}:
    try:
        exec(deed)
    except (OSError, ValueError, AssertionError):
        pass
    else:
        done.append(deed)
"""
    return passes(tried, "", ["assert done == []"], megabytes=512)


def test_it_reaches_no_process(victim: int) -> None:
    assert not all_refused(["os.getpid()"])  # it would tell
    assert all_refused(DEEDS_TO_PROCESSES, pid=victim)


DEEDS_TO_FILES = [
    "open({file!r}, 'w')",
    "open({file!r}, 'r+b')",
    "open({file!r}).read()",
    "open({file!r} + '2', 'w')",
    "open('here', 'w')",
    "open('/dev/shm/there', 'w')",
    "os.open({folder!r}, os.O_TMPFILE | os.O_RDWR)",
    "os.truncate({file!r}, 0)",
    "os.remove({file!r})",
    "os.rename({file!r}, {file!r} + '2')",
    "os.link({file!r}, {file!r} + '2')",
    "os.symlink('/', {file!r} + '2')",
    "os.mkdir({file!r} + '2')",
    "os.mkfifo({file!r} + '2')",
    "os.chmod({file!r}, 0o777)",
    "os.chmod({folder!r}, 0o777)",
    "assert libc.syscall(452, -100, {file!r}.encode(), 0o777, 0) == 0",  # fchmodat2
    "os.chown({file!r}, 1, 1)",
    "os.lchown({file!r}, 1, 1)",
    "os.utime({file!r}, (1, 1))",
    "os.utime({file!r}, (1, 1), follow_symlinks=False)",
    "os.setxattr({file!r}, 'user.x', b'1')",
    "os.removexattr({file!r}, 'user.kept')",
    "os.listdir({folder!r})",
    "os.listdir('/')",
    "os.listdir('/proc/self/fd')",
    "os.chroot('/')",
    "assert libc.mount(b'x', {folder!r}.encode(), b'tmpfs', 0, None) == 0",
    "assert libc.sethostname(b'x', 1) == 0",
    "open('/proc/self/mem', 'rb')",
    "open('/proc/self/cmdline').read()",
    "open('/etc/passwd').read()",
    "open('/dev/tty')",
]


def test_it_reads_and_changes_no_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    if sys.platform == "linux":  # mypy
        os.setxattr(mine, "user.kept", b"1")
    shared = Path("/dev/shm")
    before = mine.stat(), tmp_path.stat(), sorted(shared.iterdir()), os.listxattr(mine)
    assert all_refused(DEEDS_TO_FILES, file=str(mine), folder=str(tmp_path))
    assert before == (mine.stat(), tmp_path.stat(), sorted(shared.iterdir()), os.listxattr(mine))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


FORGED = {
    "exit codes": "import os; os._exit(90)",
    "leaves": "import sys; sys.exit(0)",
    "leaves later": "import atexit, os; atexit.register(os._exit, 0)",
    "leaves in __del__": "class D:\n    def __del__(self):\n        import os; os._exit(0)\nD()",
    "leaves at a signal": (
        "import os, signal\n"
        "signal.signal(signal.SIGALRM, lambda *_: os._exit(0)); signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-3)"
    ),
    "writes everywhere": """
import os
for pipe in range(3, 64):
    try: os.write(pipe, b"ready" * 40)
    except OSError: pass
""",
    "closes everything": "import os; os.closerange(3, 64)",
    "no exec, no compile": "import builtins; builtins.exec = builtins.compile = lambda *_, **__: None",
    "no write": "import os, sys; sys.modules['posix'].write = os.write = lambda *_: 32",
    "no sandbox": "import __main__; __main__.serve = __main__.take = lambda *_: b''",
    "other code in its functions": (
        "import sys; sys._getframe(1).f_locals['take'].__code__ = (lambda pipe, size: b'').__code__"
    ),
    "other names in its frame": """
import sys, ctypes
frame = sys._getframe(1)
names = frame.f_locals
names["run"] = lambda *_: None
ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), 0)
""",
    "other errors": "import builtins; builtins.AssertionError = builtins.BaseException = type('E', (Exception,), {})",
    "lines skipped": """
import sys
def skip(frame, event, _):
    try: frame.f_lineno += event == "line" and frame.f_code.co_filename == "answer"
    except ValueError: pass
    return skip
sys.settrace(skip)
""",
    "its protocol spoken": """
import os
for _ in range(3):
    words = os.read(3, 64)
    os.write(4, words[:32])
    os.read(3, int.from_bytes(os.read(3, 4), "big"))
""",
}
FORGED_IN_A_TEST = {
    "a word that it finds in memory": """
    import gc, sys
    frame, seen = sys._getframe(), gc.get_objects()
    while frame:
        seen += frame.f_locals.values()
        frame = frame.f_back
    for found in seen:
        if isinstance(found, bytes) and len(found) in (32, 64): os.write(4, found[:32])
    os._exit(0)""",
    "the word in the pipe": "\n    os.write(4, os.read(3, 64)[:32]); os._exit(0)",
    "the word in the pipe, and on": "\n    os.write(4, os.read(3, 64)[:32]); raise SystemExit",
}


@pytest.mark.parametrize("name", [*FORGED, *FORGED_IN_A_TEST])
def test_a_pass_is_not_forged(name: str) -> None:
    wrong = "\ndef add(a, b):\n    return 0"
    answer = FORGED[name] + wrong if name in FORGED else f"import os\ndef add(a, b):{FORGED_IN_A_TEST[name]}"
    assert not passes(answer, "", TESTS, seconds=1)


HONEST = {
    "numpy": "import numpy as np; a = np.eye(200) * 2; assert np.allclose(a @ np.linalg.inv(a), np.eye(200))",
    "numbers": "import decimal, fractions, math; decimal.getcontext().prec = 300; assert decimal.Decimal(2).sqrt() > 1",
    "text": "import re, json, csv, string, textwrap, difflib; assert json.loads(json.dumps(re.findall('a+', 'aab')))",
    "random": "import random, secrets, uuid; random.seed(1); random.shuffle([1, 2]); uuid.uuid4(); secrets.token_hex()",
    "times": (
        "import datetime, zoneinfo, time, calendar; time.sleep(0.001); time.strftime('%c'); calendar.month(2024, 2)\n"
        "assert datetime.datetime(2024, 7, 1, tzinfo=zoneinfo.ZoneInfo('Europe/Berlin')).utcoffset().seconds == 7200"
    ),
    "recursion": "import sys; sys.setrecursionlimit(9000)\ndef f(n): return n and 1 + f(n - 1)\nassert f(8000) == 8000",
    "classes": (
        "import dataclasses, typing, enum, abc, heapq, collections, itertools, functools, bisect\n"
        "@dataclasses.dataclass\nclass A:\n    x: typing.List[int]\nassert A([1]) == A([1])"
    ),
    "streams": (
        "import contextlib, io, os, sys\nwith contextlib.redirect_stdout(io.StringIO()) as said: print('x')\n"
        "with open(os.devnull, 'w') as f: print('y', file=f)\nprint('z', file=sys.stderr)\nassert said.getvalue()"
    ),
    "libraries of C": (
        "import sqlite3, hashlib, zlib, lzma, ctypes, xml.etree.ElementTree\n"
        "assert sqlite3.connect(':memory:').execute('select 1').fetchall() == [(1,)]"
    ),
    "locks and alarms": (
        "import threading, queue, signal; threading.Lock().acquire(timeout=0.01); threading.Event().wait(0.001)\n"
        "signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(5); signal.alarm(0)"
    ),
    "the machine": (
        "import os, resource, platform, tracemalloc; os.cpu_count(); resource.getrlimit(resource.RLIMIT_AS)\n"
        "platform.platform(); resource.getrusage(resource.RUSAGE_SELF); os.urandom(4); os.getcwd()"
    ),
    "files of Python": "import inspect, json, mimetypes, doctest; inspect.getsource(json); mimetypes.guess_type('a.c')",
    "imports alone": "import multiprocessing, asyncio, tempfile, subprocess, socket, unittest, concurrent.futures",
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_run(name: str) -> None:
    assert can(HONEST[name])


def test_it_imports_nothing_from_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert [name for name in ("mine", "tasks", "sandbox", "upcycle.cli") if can(f"import {name}")] == []


def test_it_ends_with_its_parent() -> None:
    script = "from upcycle.evaluation.code import passes\npasses('import time; time.sleep(60)', '', [])"
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while not children.read_text():
            time.sleep(0.02)
        child = Path(f"/proc/{children.read_text().strip()}")
        while "\nSeccomp:\t2" not in (child / "status").read_text():
            time.sleep(0.02)
        parent.kill()
    deadline = time.monotonic() + 10
    while child.exists() and "(zombie)" not in (child / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
