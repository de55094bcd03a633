"""Every benchmark runs: each as small as can be, in a copy of its folder, so that none rots unseen.

Children are forks of a Python that has imported the libraries, so the figures of a toy say nothing of starting.
"""

import gzip
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from conftest import write_rows

ROOT = Path(__file__).parents[1]
SMALL = " ".join(f"{stage}.batch_size=4 {stage}.micro_batch_size=4" for stage in ("prepare", "posttrain"))
SMALL += " route.min_samples_per_expert=2"
COMMANDS = {
    "assembly_vs_mergekit": "--work WORK --toy --repeats 1 --skip-mergekit --keep",
    "checks_share": "--work WORK --toy --repeats 1",
    "device": "--work WORK --out WORK/device.json --toy --only agreement waits 'step 1 x 32, hidden 64'",
    "encoding": "--tokenizer BASE --data DATA --work WORK --rows 500",
    "evidence": "toy core --seeds 1 --only sft --work WORK",
    "families": "",
    "hash_speed": "--work WORK --megabytes 8 --rounds 1",
    "lora_mixture_step": "--base BASE --work WORK --rows 1 --length 16 --rank 2 --rounds 1",
    "many_experts": "--work WORK --toy --repeats 1",
    "packing": "RECIPE --rows 8 --rounds 1",
    "profile_steps": "--work WORK --base BASE --rows 1 --length 16",
    "results": "",
    "routing_share": "RECIPE --out WORK",
    "slices_assembly": "--work WORK --toy --repeats 1",
    "testbeds": "toy --data DATA --out WORK",
    "training_step": "--work WORK --rows 1 --length 16 --hidden 64 --layers 1 --rounds 1",
    "verb_start": "--work WORK --toy",
}
"""mergekit is left out: it has an environment of its own, which is installed from the network."""
LONG = {"evidence"}
"""Several whole runs: with `make test-long`."""


@pytest.fixture
def data(rows: Path, tmp_path: Path) -> Path:
    """A folder of instruction rows."""
    folder = tmp_path / "data"
    (folder / "instruct").mkdir(parents=True)
    (folder / "instruct" / "rows.jsonl.gz").write_bytes(gzip.compress(rows.read_bytes()))
    write_rows(tmp_path / "others.jsonl", 24, seed=1)
    return folder


def test_every_benchmark_has_a_command() -> None:
    assert set(COMMANDS) == {path.stem for path in (ROOT / "benchmarks").glob("*.py")}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n in LONG)) for n in COMMANDS])
def test_a_benchmark_runs(
    name: str, warm: Path, base: Path, rows: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("benchmarks", "docs"):  # some keep what they find there
        shutil.copytree(ROOT / folder, tmp_path / folder)
    sources = f"data.train={rows} data.validation={tmp_path / 'others.jsonl'} data.max_length=64"
    recipe = f"quickstart base={base} {sources} {SMALL}"
    places = {"WORK": tmp_path / "work", "BASE": base, "DATA": data, "RECIPE": f"'{recipe}'"}
    command = re.sub("|".join(places), lambda found: str(places[found[0]]), COMMANDS[name])
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "benchmarks")
    monkeypatch.setattr(sys, "executable", str(warm))
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(command)])
    try:
        runpy.run_path(str(tmp_path / "benchmarks" / f"{name}.py"), run_name="__main__")
    finally:
        for module in COMMANDS:  # the copies are this test's alone
            sys.modules.pop(module, None)
