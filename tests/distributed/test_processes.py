"""Whole commands in two processes over gloo, beside the same command in one; the long ones with Python as it starts."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import make_dense, write_rows
from upcycle.distributed.launch import first_host, slurm_variables
from worlds import some_long

TORCHRUN = Path(sys.executable).with_name("torchrun")
TRAINING = {"batch_size": 8, "learning_rate": 1e-3, "warmup_fraction": 0.0, "trainer": {"adam_epsilon": 1e-3}}
"""With Adam's own epsilon a gradient of nothing but rounding would move a weight as far as any other."""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return str(server.getsockname()[1])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few seconds."""
    folder = tmp_path_factory.mktemp("processes")
    values = {
        "base": str(make_dense(folder / "base", vocab_size=100)),
        "data": {"train": str(write_rows(folder / "rows.jsonl", 103)), "max_length": 64, "validation_fraction": 0.1},
        "prepare": {**TRAINING, "epochs": 1, "checkpoint_every": 0.5},
        "lora": {"rank": 4},
        "expand": {"num_experts": 4},
        "route": {"min_samples_per_expert": 4, "epochs": 1},
        "posttrain": {**TRAINING, "epochs": 2, "checkpoint_every": 0.25},
        "evaluate": {"models": "ends"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def begin(python: Path | str, processes: int, *words: str) -> subprocess.Popen[str]:
    """As typed; in one process with the micro-batch that two share."""
    command = [str(python), "-m", "upcycle", *words]
    if processes > 1:
        ours = ["--nproc-per-node", str(processes), "--master-port", free_port()]
        command = [str(python), str(TORCHRUN), *ours, "-m", "upcycle", *words]
    variables = environment(PYTHON_EXEC=str(python))  # what torchrun starts
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def workers(launcher: subprocess.Popen[str]) -> dict[str, int]:
    """Rank to process of what torchrun has started, which tells them the port."""
    found, port = {}, f"MASTER_PORT={launcher.args[launcher.args.index('--master-port') + 1]}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if port in variables:
            found |= {v.decode()[5:]: int(folder.name) for v in variables if v.startswith(b"RANK=")}
    return found


def kill_one(launcher: subprocess.Popen[str], run: Path) -> None:
    """Once post-training has a checkpoint, kill the second process; the others end within a minute."""
    while not list((run / "posttrain.partial" / "trainer").glob("checkpoint-*/sizes.json")):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.01)
    os.kill(workers(launcher)["1"], signal.SIGKILL)
    launcher.communicate(timeout=60)
    assert launcher.returncode != 0


def log(run: Path, stage: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / stage / "log.json").read_text())["log"]
    return found


EVALUATED = [
    f"{stage}.trainer={{adam_epsilon: 1.0e-3, eval_strategy: steps, eval_steps: 4}}"
    for stage in ("prepare", "posttrain")
]
FULL = ["prepare.train=full", "posttrain.balance_bias_rate=0.001", *EVALUATED]  # also where a checkpoint is saved
LORA = ["prepare.train=lora", "assemble.shared=base"]
CASES = {
    "full": (2, FULL, []),
    "lora": (2, LORA, []),
    "full, sharded": (2, FULL, ["devices.fsdp=2"]),
    "full, experts apart": (2, FULL, ["devices.fsdp=2", "devices.ep=2"]),
    "ffn, four shards": (4, ["prepare.train=ffn"], ["devices.fsdp=4"]),
    "lora, sharded base": (2, LORA, ["devices.fsdp=2"]),
    "full, two groups": (4, FULL, ["devices.fsdp=2", "devices.ep=2", "devices.replicate=2"]),
}
"""Processes, settings of the run, how it is divided."""
QUICK = {"full", "full, sharded"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("case", some_long(CASES, QUICK))
def test_processes_do_what_one_does_also_when_one_is_killed(
    case: str, warm: Path, recipe: Path, tmp_path: Path
) -> None:
    processes, settings, devices = CASES[case]
    python = warm if case in QUICK else sys.executable
    words = ["run", str(recipe), *settings, "--out"]
    one = recipe.with_name("-".join(["one", *settings]))
    if not one.exists():  # cases with the same settings share it
        alone = begin(python, 1, *words, str(one), "prepare.micro_batch_size=8", "posttrain.micro_batch_size=8")
        said, _ = alone.communicate(timeout=120)
        assert alone.returncode == 0, said

    kill_one(begin(python, processes, *words, str(tmp_path / "two"), *devices), tmp_path / "two")
    assert not (tmp_path / "two" / "posttrain").exists()

    resumed = begin(python, processes, *words, str(tmp_path / "two"), *devices)
    said, _ = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, said
    assert said.count("posttrain: resuming ...") == 1  # one line, not one of each process
    assert said.count("posttrain: mixture of experts: resuming from checkpoint-") == 1
    two = tmp_path / "two"
    rows = json.loads((one / "prepare" / "log.json").read_text())["rows"]
    assert rows % 8  # the last step of an epoch is not full
    for stage in ("prepare", "posttrain"):
        expected, steps = log(one, stage), log(two, stage)
        assert len(expected) == len(steps) > 8
        for field in ("loss", "balance_loss", "learning_rate"):
            found = [entry.get(field, 0.0) for entry in steps]
            assert found == pytest.approx([entry.get(field, 0.0) for entry in expected], rel=1e-6), field
    assert [entry.get("load") for entry in steps] == [entry.get("load") for entry in expected]
    weights = [p.relative_to(run) for run in (one, two) for p in run.rglob("*.safetensors")]
    assert len(weights) == 2 * len(set(weights))
    for place in one.glob("*/*.safetensors"):
        twin = load_file(two / place.relative_to(one))
        for name, tensor in load_file(place).items():
            torch.testing.assert_close(twin[name], tensor, atol=2e-5, rtol=1e-3)
    scores = [json.loads((run / "evaluate" / "scores.json").read_text()) for run in (one, two)]
    assert scores[1]["MoE"]["loss"] == pytest.approx(scores[0]["MoE"]["loss"], abs=1e-5)


def under_slurm(python: Path, rank: int, port: str, cwd: Path, *words: str) -> subprocess.Popen[str]:
    """One of two tasks of a step, with the variables that srun sets."""
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    slurm |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
    return subprocess.Popen(
        [str(python), "-m", "upcycle", *words],
        env=environment(**slurm),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_a_sharded_checkpoint_is_not_resumed_by_others(recipe: Path, tmp_path: Path) -> None:
    words = ["run", str(recipe), "prepare.train=ffn", "--out", str(tmp_path / "run")]
    kill_one(begin(sys.executable, 2, *words, "devices.fsdp=2"), tmp_path / "run")
    for processes, devices in ((4, "devices.fsdp=4"), (2, "devices.fsdp=1"), (1, "devices.fsdp=1")):
        other = begin(sys.executable, processes, *words, devices)
        said, _ = other.communicate(timeout=120)
        assert other.returncode != 0
        assert "was written by 2 processes, each with a part of the model (devices.fsdp)" in said


@pytest.mark.long
def test_what_a_process_holds_falls_with_their_number(recipe: Path) -> None:
    script = Path(__file__).with_name("held.py")
    assembled = str(yaml.safe_load(recipe.read_text())["base"])
    held = {}
    for processes in (1, 4):
        command = [str(TORCHRUN), "--nproc-per-node", str(processes), "--master-port", free_port(), str(script)]
        said = subprocess.check_output([*command, assembled, str(processes)], env=environment(), text=True)
        held[processes] = max(json.loads(line) for line in said.splitlines() if line.strip().isdecimal())
    assert held[4] <= 0.3 * held[1]


ERRORS = {
    "a setting of the recipe": (["expand.num_expert=3"], "override 'expand.num_expert=3': unknown setting"),
    "rows of a step": (  # of the last training, before anything is made
        ["posttrain.batch_size=7", "posttrain.micro_batch_size=7"],
        "posttrain.batch_size is 7, which 2 processes cannot share evenly; set posttrain.batch_size=8 "
        "posttrain.micro_batch_size=4, or start 1, 7 processes",
    ),
    "a folder that is not shared": ([], "process 1 on .* does not see what the first process writes there"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_is_said_once_and_ends_all(what: str, warm: Path, recipe: Path, tmp_path: Path) -> None:
    settings, expected = ERRORS[what]
    port, folders = free_port(), [tmp_path / "a", tmp_path / ("b" if "shared" in what else "a")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    started = [
        under_slurm(warm, rank, port, folder, "run", str(recipe), "--run", "x", *settings)
        for rank, folder in enumerate(folders)
    ]
    ended = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [2, 2], ended
    errors = "".join(said for _, said in ended)
    assert errors.count("error: ") == 1, errors
    assert re.search(expected, errors), errors


def test_variables_of_slurm_are_those_of_a_step_alone() -> None:
    job = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "71"}
    assert slurm_variables(job) == {}  # the batch script itself
    step = {**job, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
    found = slurm_variables({**step, "SLURM_STEP_NODELIST": "gpu[08-09,11]"})
    assert found == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu08",
        "MASTER_PORT": "29571",
    }
    assert slurm_variables({**step, "RANK": "0"}) == {}  # torchrun within a step


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("n[3-7].x,m1", "n3.x"), ("n[12,14]", "n12"), ("r[1-2]n[01-04]", "r1n01")],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
