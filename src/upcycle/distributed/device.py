"""The device of this process, and the dtype that it computes in."""

import torch

from upcycle.distributed.world import world_size


def pick_device() -> torch.device:
    """The accelerator, if there is one."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


def idle_devices() -> int:
    """Accelerators that this process sees and leaves alone: it uses one, and other processes may have the others."""
    if world_size() > 1 or not torch.accelerator.is_available():
        return 0
    return torch.accelerator.device_count() - 1


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on an accelerator; fp32 on a CPU, where bf16 products can be a hundred times slower."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
