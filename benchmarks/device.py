"""What training costs on this machine's device, in one call: steps, whole runs, memory, options. Writes JSON.

    python benchmarks/device.py --out results.json --work DIR                        # a GPU, or the CPU
    python benchmarks/device.py --out results.json --work DIR --base SMOLLM2_FOLDER  # runs on a real model too
    python benchmarks/device.py --out results.json --work DIR --toy                  # two minutes, anywhere

Steps are timed alone; whole runs go side by side, as many as there are cores, so their seconds are no measure. A part
that fails is recorded with its error, and the next one goes on. What is done already is not done again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import training_step

from upcycle.console import say
from upcycle.disk import write_json
from upcycle.distributed.device import memory, pick_device
from upcycle.experts.grouped import use_own_products
from upcycle.experts.kinds import load_model
from upcycle.records.manifest import library_versions

SIZES = (
    training_step.Size(rows=1, length=1024),
    training_step.Size(rows=2, length=1024),
    training_step.Size(rows=16, length=1024),
    training_step.Size(rows=16, length=1024, hidden=1152, layers=12),
    training_step.Size(rows=4, length=4096, hidden=1152, layers=12),
)
TOY = (training_step.Size(rows=1, length=32, hidden=64, layers=1, rounds=1),)
SHORT = "data.fraction=0.2 prepare.epochs=1 posttrain.epochs=1 data.max_validation=20"
LEAST = "data.fraction=0.1 expand.num_experts=2 assemble.num_experts_per_tok=1 posttrain.freeze=router"
ROWS = "data.train=builtin:train data.validation=builtin:validation data.max_validation=60 evaluate.exact_match=false"
TINY = f"base=builtin:tiny {ROWS} {SHORT} route.min_samples_per_expert=10"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")


def both(setting: str) -> str:
    """Of both stages that train."""
    return f"prepare.{setting} posttrain.{setting}"


def option(name: str, value: str) -> str:
    return both(f"trainer={{{name}: {value}}}")


REAL = f"{ROWS} data.max_length=512 {both('batch_size=32')} {both('micro_batch_size=16')}"


@dataclass(frozen=True)
class Whole:
    """A command as a user types it."""

    recipe: str
    settings: str = ""
    launcher: tuple[str, ...] = ()
    real: bool = False
    """Whether it is run on the base that is given."""


WHOLE = {
    "quickstart": Whole("quickstart"),
    "as it is": Whole("quickstart", SHORT),
    "again": Whole("quickstart", SHORT),
    "torchrun": Whole("quickstart", SHORT, TORCHRUN),
    "AdamW in 8 bits": Whole("quickstart", f"{SHORT} {option('optim', 'adamw_8bit')}"),
    "AdamW in 8 bits, paged": Whole("quickstart", f"{SHORT} {option('optim', 'paged_adamw_8bit')}"),
    "adafactor": Whole("quickstart", f"{SHORT} {option('optim', 'adafactor')}"),
    "Liger": Whole("quickstart", f"{SHORT} {option('use_liger_kernel', 'true')}"),
    "torch.compile": Whole("quickstart", f"{SHORT} {option('torch_compile', 'true')}"),
    "rows padded": Whole("quickstart", f"{SHORT} {both('pack_rows=false')}"),
    "gradient checkpointing": Whole("quickstart", f"{SHORT} {both('gradient_checkpointing=true')}"),
    "slices": Whole("upit-fine", TINY),
    "LoRA": Whole("upit-lora", TINY),
    "LoRA of rank 4": Whole("upit-lora", f"{TINY} lora.rank=4"),
    "real, full": Whole("smollm2-cpu", f"{REAL} data.fraction=0.1 prepare.train=full", real=True),
    "real, FFN": Whole("smollm2-cpu", f"{REAL} data.fraction=0.1", real=True),
    "real, FFN, checkpointing": Whole(
        "smollm2-cpu",
        f"{REAL} data.fraction=0.1 {both('gradient_checkpointing=true')}",
        real=True,
    ),
    "real, LoRA": Whole("smollm2-lora-cpu", f"{REAL} data.fraction=0.1", real=True),
}
TOYS = ("as it is", "torchrun", "LoRA")


def machine() -> dict[str, Any]:
    device = pick_device()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    gigabytes = round(memory() / 1e9, 1)
    threads = torch.get_num_threads()
    return {"device": str(device), "gpu": gpu, "gb": gigabytes, "threads": threads, "versions": library_versions()}


def steps(work: Path, size: training_step.Size) -> dict[str, Any]:
    """Milliseconds of a step of each MoE and of the models that it is compared with, in turn."""
    found = training_step.measure(work / f"step-{size.hidden}-{size.layers}", size)
    ms = {choice: {name: round(1e3 * taken, 3) for name, taken in median.items()} for choice, median in found.items()}
    return {"size": vars(size), "ms": ms}


def agreement(work: Path, size: training_step.Size) -> dict[str, Any]:
    """Relative errors of a MoE's loss and gradients here, against transformers' eager experts in fp32 on the CPU."""
    folder = work / f"step-{size.hidden}-{size.layers}"
    training_step.make_models(folder, size)
    ids = torch.randint(8192, (2, min(size.length, 256)), generator=torch.Generator().manual_seed(1))
    found = {}
    for choice in training_step.CHOICES:
        loss, expected = passed(folder / choice, ids, torch.device("cpu"), ours=False, half=False)
        for what, half in {"fp32": False, "bf16": True}.items():
            here, gradients = passed(folder / choice, ids, pick_device(), ours=True, half=half)
            error = norm(gradients[name] - gradient for name, gradient in expected.items()) / norm(expected.values())
            found[f"{choice}, {what}"] = {"loss": abs(here - loss) / loss, "gradient": error}
    return found


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return sum(float(tensor.square().sum()) for tensor in tensors) ** 0.5


def passed(
    folder: Path, ids: torch.Tensor, device: torch.device, ours: bool, half: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    model = load_model(folder, torch.float32, device).train()
    if ours:
        use_own_products(model)
    else:
        model.set_experts_implementation("eager")
    with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        loss = model(input_ids=ids.to(device), labels=ids.to(device), use_cache=False).loss
    loss.backward()
    return loss.item(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def waits(work: Path, size: training_step.Size) -> dict[str, Any]:
    """Where a step waits for the GPU, by the line that does."""
    if pick_device().type != "cuda":
        return {}
    found = {}
    for name in (training_step.DENSE, *training_step.CHOICES):
        model = load_model(work / f"step-{size.hidden}-{size.layers}" / name, torch.float32, pick_device()).train()
        with ExitStack() as recorders, warnings.catch_warnings(record=True) as caught:
            step = training_step.make_step(model, size, recorders)
            step()
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            step()
            torch.cuda.set_sync_debug_mode("default")
        lines = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
        found[name] = {line: lines.count(line) for line in sorted(set(lines))}
    return found


def lora_step(work: Path, rows: int, length: int) -> dict[str, Any]:
    """The table of benchmarks/lora_mixture_step.py."""
    script, base = Path(__file__).with_name("lora_mixture_step.py"), next(work.glob("step-*")) / training_step.DENSE
    shape = ["--rows", str(rows), "--length", str(length)]
    command = [sys.executable, str(script), "--base", str(base), "--work", str(work / "lora"), *shape]
    return {"table": subprocess.check_output(command, text=True, stderr=subprocess.STDOUT).splitlines()[-8:]}


def run(name: str, whole: Whole, work: Path, more: str) -> dict[str, Any]:
    """Seconds and memory of every stage of a whole command, what it forecast, and the losses at its end."""
    folder = work / name.replace(" ", "-").replace(",", "")
    words = [*split(whole.settings), *split(more), "--out", str(folder)]
    command = [sys.executable, *whole.launcher, "-m", "upcycle", "run", whole.recipe, *words]
    said = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "400"})
    if said.returncode:
        raise RuntimeError(said.stderr.strip()[-1500:] or said.stdout[-1500:])
    scores = json.loads((folder / "evaluate" / "scores.json").read_text())
    log = json.loads((folder / "posttrain" / "log.json").read_text())
    return {
        "command": command[1:],
        "costs": json.loads((folder / "costs.json").read_text()),
        "forecast": [line for line in said.stdout.splitlines() if ": needs about" in line],
        "loss": {model: entry["loss"]["all"] for model, entry in scores.items()},
        "posttrain_tokens": log["tokens"],
    }


def split(settings: str) -> list[str]:
    """Words; what is between braces is one."""
    return re.findall(r"[^\s{]+(?:\{[^}]*\})?", settings)


def alone(work: Path, toy: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured, by name, one after the other."""
    sizes = TOY if toy else SIZES
    yield "agreement", lambda: agreement(work, sizes[0])
    yield "waits", lambda: waits(work, sizes[0])
    for size in sizes:
        yield f"step {size.rows} x {size.length}, hidden {size.hidden}", lambda size=size: steps(work, size)
    yield "LoRA step", lambda: lora_step(work, *((1, 32) if toy else (16, 1024)))


def together(
    work: Path, base: str | None, names: list[str], toy: bool
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Whole runs, by name."""
    for name in names:
        whole = WHOLE[name]
        if base or not whole.real:
            more = f"base={base}" if whole.real else LEAST if toy and whole.recipe == "quickstart" else ""
            yield name, lambda name=name, whole=whole, more=more: run(name, whole, work, more)


def measured(name: str, measure: Callable[[], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    say(f"{name} ...")
    try:
        return name, measure()
    except Exception as error:  # whatever it is, the other parts are worth having
        say(f"{name}: {error}")
        return name, {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--base", help="a dense model for whole runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts alone")
    parser.add_argument("--toy", action="store_true", help="everything as small as can be")
    arguments = parser.parse_args()
    work, toy = arguments.work, arguments.toy
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"machine": machine(), "parts": {}}

    def open_ones(parts: Iterator[tuple[str, Any]]) -> list[tuple[str, Any]]:
        wanted = [part for part in parts if arguments.only is None or part[0] in arguments.only]
        return [part for part in wanted if "error" in found["parts"].get(part[0], {"error": "not done"})]

    def keep(part: tuple[str, dict[str, Any]]) -> None:
        found["parts"].update([part])
        write_json(arguments.out, found)

    for part in open_ones(alone(work, toy)):
        keep(measured(*part))
    runs = open_ones(together(work, arguments.base, list(TOYS if toy else WHOLE), toy))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool:
        for part in pool.map(lambda part: measured(*part), runs):
            keep(part)
    if failed := [name for name, part in found["parts"].items() if "error" in part]:
        raise SystemExit(
            f"failed: {', '.join(failed)}; {arguments.out} has the traces, and the same command tries them again"
        )


if __name__ == "__main__":
    main()
