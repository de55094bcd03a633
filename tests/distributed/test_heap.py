"""Memory that a training frees: kept for the next step, then given back, as the kernel says."""

import json
import os
import subprocess
import sys

import pytest

from upcycle.distributed.heap import _has_glibc

SCRIPT = """
import json, resource, torch
from pathlib import Path
from upcycle.distributed.device import release
from upcycle.distributed.heap import kept_heap

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("RssAnon"))

def faults(steps):
    begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.ones(100 << 18)  # 100 MB, as the gradient of a layer's experts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin

faults(1)
before, usual = held(), faults(4)
with kept_heap():
    faults(12)  # small pieces that are cached lie between blocks at first
    kept, freed = faults(4), held()
release()
print(json.dumps([before, usual, kept, freed, held()]))
"""


def measured(**variables: str) -> list[int]:
    """MB before; pages that the kernel cleared in four steps; in four while memory is kept; MB then; MB after."""
    said = subprocess.check_output([sys.executable, "-c", SCRIPT], env={**os.environ, **variables}, text=True)
    found: list[int] = json.loads(said)
    return found


@pytest.mark.skipif(not _has_glibc(), reason="glibc's malloc")
def test_what_a_step_frees_is_used_again_and_given_back_in_the_end() -> None:
    before, usual, kept, freed, after = measured()
    assert usual > 4 * 100 * 200  # of 256 pages in a MB
    assert kept < usual / 20
    assert freed > before + 90
    assert after < before + 50


@pytest.mark.skipif(not _has_glibc(), reason="glibc's malloc")
def test_what_the_user_has_set_stays() -> None:
    _, usual, kept, *_ = measured(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept > usual / 2
