"""The device of this process, and the dtype that it computes in."""

import torch


def pick_device() -> torch.device:
    """The accelerator, if there is one."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on an accelerator; fp32 on a CPU, where bf16 products can be a hundred times slower."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
