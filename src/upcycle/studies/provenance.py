"""Which code measured something, and on which machine."""

import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path


def code_version() -> str:
    """The version, and the commit if the code lies in a checkout; `+` after it says that files had been changed."""
    released = version("upcycle")
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        commit = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
        return f"{released} ({commit})"
    return released


def machine() -> str:
    """System, processor and threads."""
    name = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{platform.system()}, {name}, {torch.get_num_threads()} of {os.cpu_count()} threads{gpu}"
