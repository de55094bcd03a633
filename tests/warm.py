"""A Python that has imported torch, transformers and TRL: each start of it is a fork of one process.

Importing is most of what a child takes that does next to nothing. `warm_python` gives a program that is called as
`python -c`, `python -m` or `python FILE` is. The fork has the arguments, folder, environment and files of the call;
signals are passed on to it, it dies with the call, and the call ends as it does. The package is not imported, because
it looks at environment and terminal then. What the libraries read while they are imported is not read again.
"""

import ast
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
"""As the command has them."""
LIBRARIES = (
    "scipy.optimize",
    "torch.distributed.run",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "trl.trainer.sft_trainer",
    "typer",
)
CALL = """#!{python} -IS
import os, signal, socket, sys
words = sys.argv[1 + (sys.argv[1] == "-u") :]  # torchrun's
if words[0] not in ("-c", "-m") and words[0].startswith("-"):  # other options are Python's own
    os.execv({python!r}, [{python!r}, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(repr((words, os.getcwd(), dict(os.environ))).encode())
    server.shutdown(socket.SHUT_WR)
    fork = int.from_bytes(server.recv(4))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(fork, number))
    said = server.recv(1)
code = said[0] if said else 255
if code > 128 + 64:
    signal.signal(256 - code, signal.SIG_DFL)
    os.kill(os.getpid(), 256 - code)
sys.exit(code)
"""


@contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """A program in the folder that can be called as long as this is open."""
    address, program = folder / "socket", folder / "python"
    program.write_text(CALL.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, str(address)], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout
            assert server.stdout.readline() == b"ready\n"
            yield program
        finally:
            server.terminate()


def next_job(address: str) -> list[str]:
    """The words of a call. Returns in a fork for each call, which has the caller's folder, environment and files."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            call, _ = server.accept()
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            with call:
                if os.fork():
                    continue
                if fork := os.fork():
                    attend(call, fork)
                return taken(call)


def attend(call: socket.socket, fork: int) -> None:
    """Ends the fork with the call, and the call with the fork."""
    call.sendall(fork.to_bytes(4))
    ended = os.pidfd_open(fork)
    hangup = select.poll()
    hangup.register(ended, select.POLLIN)
    hangup.register(call, select.POLLHUP)
    if ended not in dict(hangup.poll()):
        os.kill(fork, signal.SIGKILL)
    _, status = os.waitpid(fork, 0)
    with suppress(OSError):
        call.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))
    os._exit(0)


def taken(call: socket.socket) -> list[str]:
    """The words of the call, whose folder, environment and files become those of this process."""
    _, files, _, _ = socket.recv_fds(call, 1, 3)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    with call.makefile("rb") as file:
        words, folder, environment = ast.literal_eval(file.read().decode())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return list(words)


def run(words: list[str]) -> None:
    """As Python does with its arguments."""
    first, *rest = words
    if first == "-c":
        code, *sys.argv[1:] = rest
        sys.argv[0], sys.path[0] = "-c", ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        sys.argv, sys.path[0] = rest, str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    os.environ |= QUIET
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # a collection would copy the memory that forks share
    run(next_job(sys.argv[1]))
