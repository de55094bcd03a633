"""Several processes that train one model: which of them this is, what the first alone does, what all get to know.

One process is a world of its own, and then nothing here imports torch or waits.
"""

import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from upcycle.errors import RelayedError, UpcycleError

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""How long the others wait while the first process works alone: assembling a large MoE takes its time."""
SECONDS_FOR_A_FILE = 60.0
"""Until a file that one machine wrote is seen on another; network file systems take their time."""
ERROR = "upcycle/error"

_control: Any = None
"""A group for words, not for tensors: on the CPU, and with `PATIENCE`."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the first process, which writes and speaks."""
    return rank() == 0


def start() -> None:
    """Join the other processes, if there are any; every one of them must come."""
    global _control
    if world_size() == 1 or _control is not None:
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    on_cpu = not torch.accelerator.is_available()
    os.environ.setdefault("ACCELERATE_USE_CPU", str(on_cpu).lower())
    PartialState(cpu=on_cpu)  # picks this process's device and what tensors travel with
    _control = dist.new_group(backend="gloo", timeout=PATIENCE)


def stop() -> None:
    """Leave the other processes."""
    global _control
    if _control is not None:
        import torch.distributed as dist

        _control = None
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process after an error; one of several at once, as threads of its group would wait for the others."""
    if _control is None:
        raise SystemExit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in every process; the others wait.

    Raises:
        RelayedError: in the others, if `work` raised anything.
    """
    if world_size() == 1:
        return work()
    import torch.distributed as dist

    box: list[Any] = [None, False]
    try:
        if is_main():
            box = [None, True]
            box = [work(), False]
    finally:
        dist.broadcast_object_list(box, src=0, group=_control)
    if box[1]:
        raise RelayedError("the first process ended in an error")
    result: T = box[0]
    return result


def share(items: Sequence[T], together: bool = False) -> Sequence[T]:
    """This process's part of a list; `together`: the first has all, as it needs the devices of the others."""
    if together:
        return items if is_main() else items[:0]
    return items[rank() :: world_size()]


def wait() -> None:
    """Until every process has come here."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier(group=_control)


def summed(tensor: Any) -> Any:
    """The sum of a tensor over the processes, in its place."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.all_reduce(tensor)
    return tensor


def gathered(value: T) -> list[T]:
    """What each process has, in all of them."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=_control)
    return found


def may_speak() -> bool:
    """Whether this process is the first that ends in an error, and so the one that says it."""
    if _control is None:
        return True
    import torch.distributed as dist

    with suppress(Exception):  # whoever keeps the store may have gone
        store = dist.distributed_c10d._get_default_store()
        first: bytes = store.compare_set(ERROR, "", str(rank()))
        return first.decode() == str(rank())
    return is_main()


def check_shared(folder: Path) -> None:
    """
    Raises:
        UpcycleError: a process does not see what another one writes there.
    """
    if world_size() == 1:
        return
    folder.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    probe = folder / on_main(lambda: f".seen-{uuid.uuid4().hex}.tmp")
    far = len(set(gathered(host))) > 1
    if is_main():
        probe.touch()
    wait()
    end = time.monotonic() + (SECONDS_FOR_A_FILE if far else 0.0)
    while not (seen := probe.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    everyone = enumerate(gathered((host, seen)))
    if is_main():
        probe.unlink()
    if blind := [f"process {number} on {where}" for number, (where, sees) in everyone if not sees]:
        raise UpcycleError(
            f"{folder}: {', '.join(blind)} does not see what the first process writes there; give --run a folder that "
            "all machines share"
        )


def lost_another(error: Exception) -> bool:
    """Whether an error says no more than that another process is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Socket closed")
    return world_size() > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in words)
