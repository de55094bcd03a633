"""The device of this process, and the dtype that it computes in."""

import gc
import os
from contextlib import suppress
from pathlib import Path

import torch

from upcycle.distributed.heap import give_back
from upcycle.distributed.world import world_size

MOST_OF_A_DEVICE = 0.8
"""Share of its memory that a model's weights may take; the rest is for what it computes."""


def pick_device() -> torch.device:
    """The accelerator, if there is one."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


def idle_devices() -> int:
    """Accelerators that this process sees and leaves alone: it uses one, and other processes may have the others."""
    return torch.accelerator.device_count() - 1 if world_size() == 1 and sees_several() else 0


def sees_several() -> bool:
    """Whether this process could use several accelerators."""
    return torch.accelerator.is_available() and torch.accelerator.device_count() > 1


def is_spread(num_parameters: int) -> bool:
    """Whether a model is too large for one accelerator."""
    return num_parameters * compute_dtype(pick_device()).itemsize > MOST_OF_A_DEVICE * memory()


def memory() -> int:
    """Bytes of this process's accelerator; without one, those that the machine has to give."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.get_memory_info(pick_device())[1])
    with suppress(OSError, IndexError):  # Linux alone has it
        line = Path("/proc/meminfo").read_text().split("MemAvailable:")[1]
        return int(line.split()[0]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def release() -> None:
    """Give the memory that a training held back to others that use it."""
    gc.collect()
    give_back()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on an accelerator; fp32 on a CPU, where bf16 products can be a hundred times slower."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
