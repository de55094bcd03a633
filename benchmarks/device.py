"""What training costs on this machine's device, in one call: steps, stages of whole runs, memory. Writes JSON.

    python benchmarks/device.py --out results.json --work DIR                        # a GPU, or the CPU
    python benchmarks/device.py --out results.json --work DIR --base SMOLLM2_FOLDER  # a run on a real model too
    python benchmarks/device.py --out results.json --work DIR --toy                  # a minute anywhere: does it run?

A part that fails is recorded with its error, and the next one goes on. What is done already is not done again.
"""

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import training_step

from upcycle.console import say
from upcycle.disk import write_json
from upcycle.distributed.device import pick_device
from upcycle.records.manifest import library_versions

SIZES = (
    training_step.Size(rows=8, length=1024),
    training_step.Size(rows=16, length=1024, hidden=1152, layers=12),
    training_step.Size(rows=4, length=4096, hidden=1152, layers=12),
)
TOY = (training_step.Size(rows=1, length=32, hidden=64, layers=1, rounds=1),)
SHORT = "data.fraction=0.1 prepare.epochs=1 posttrain.epochs=1 data.max_validation=20"
OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor")


def machine() -> dict[str, Any]:
    device = pick_device()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {"device": str(device), "gpu": gpu, "threads": torch.get_num_threads(), "versions": library_versions()}


def steps(work: Path, size: training_step.Size) -> dict[str, Any]:
    """Milliseconds of a step, and what the device held at most, of dense models and MoEs in turn."""
    folder = work / f"step-{size.hidden}-{size.layers}"
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found = training_step.measure(folder, size)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    return {"size": vars(size), "ms": {name: 1e3 * seconds for name, seconds in found.items()}, "peak_gb": peak}


def run(name: str, words: list[str], work: Path) -> dict[str, Any]:
    """Seconds and memory of every stage of a whole command, and the losses at its end."""
    folder = work / name
    command = [sys.executable, "-m", "upcycle", "run", *words, "--run", str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(said.stderr.strip() or said.stdout[-2000:])
    scores = json.loads((folder / "evaluate" / "scores.json").read_text())
    log = json.loads((folder / "posttrain" / "log.json").read_text())
    costs = json.loads((folder / "costs.json").read_text())
    loss = {model: entry["loss"]["all"] for model, entry in scores.items()}
    return {"command": command[2:], "costs": costs, "loss": loss, "posttrain_tokens": log["tokens"]}


def parts(work: Path, base: str | None, toy: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured, by name."""
    for size in TOY if toy else SIZES:
        yield f"step {size.rows} x {size.length}, hidden {size.hidden}", lambda size=size: steps(work, size)
    short = SHORT.split() if toy else []
    experts = ["expand.num_experts=2", "assemble.num_experts_per_tok=1", "posttrain.freeze=router"] if toy else []
    yield "quickstart", lambda: run("quickstart", ["quickstart", *short, *experts], work)
    for optimizer in OPTIMIZERS[:1] if toy else OPTIMIZERS:
        setting = f"posttrain.trainer={{optim: {optimizer}}}"
        words = ["quickstart", *SHORT.split(), *experts, "data.fraction=0.2", setting]
        yield f"optimizer {optimizer}", lambda words=words, o=optimizer: run(f"optimizer-{o}", words, work)
    if base:
        rows = ["data.train=builtin:train", "data.validation=builtin:validation", "data.max_validation=60"]
        for kind in ("ffn", "lora"):
            words = ["smollm2-cpu", f"base={base}", *rows, "data.fraction=0.1", "data.max_length=512"]
            yield f"SmolLM2, {kind}", lambda words=words, k=kind: run(f"real-{k}", [*words, f"prepare.train={k}"], work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--base", help="a dense model for whole runs")
    parser.add_argument("--toy", action="store_true", help="everything as small as can be")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"machine": machine(), "parts": {}}
    for name, measure in parts(arguments.work, arguments.base, arguments.toy):
        if "error" not in found["parts"].get(name, {"error": "not done"}):
            continue
        say(f"{name} ...")
        try:
            found["parts"][name] = measure()
        except Exception as error:  # whatever it is, the other parts are worth having
            found["parts"][name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            say(f"{name}: {error}")
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
