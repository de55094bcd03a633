"""How several processes are started: torchrun and accelerate say it in their variables, srun in Slurm's."""

import os
import re
from collections.abc import Mapping

PORT = 29500


def adopt_slurm() -> None:
    """Under srun, set the variables that torchrun would; before anything asks for them."""
    os.environ |= {name: value for name, value in slurm_variables(os.environ).items() if name not in os.environ}


def slurm_variables(given: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from those of a step of srun with several tasks; nothing elsewhere.

    A batch script itself has the job's variables, but not those of a step.
    """
    if "RANK" in given or int(given.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    job = int(given.get("SLURM_JOB_ID", 0))
    return {
        "RANK": given["SLURM_PROCID"],
        "LOCAL_RANK": given.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(given.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(PORT + job % 10_000),  # two jobs may share a machine
    }


def first_host(nodes: str) -> str:
    """`a07` of Slurm's `a[07-12,15],b1`."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else nodes
