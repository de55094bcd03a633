"""What a training step of a mixture of LoRA experts costs, against a dense LoRA and against full experts.

    python benchmarks/lora_mixture_step.py --base SMOLLM2_FOLDER --work DIR
    python benchmarks/lora_mixture_step.py --base ... --work DIR --rows 16 --length 1024     # bf16 on a GPU

Three models on one base see the same batch in turn: PEFT's LoRA on gate, up and down; 8 LoRA experts top-2 of the
same rank (this package); and the same mixture folded into a plain MoE, its experts frozen, so that only the compute
differs. A step is forward, loss, backward and AdamW. Prints the median of each and its ratio to the mixture's; then the
peak memory of each, in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from upcycle.console import say, table
from upcycle.distributed.device import compute_dtype, pick_device
from upcycle.distributed.heap import kept_heap
from upcycle.experts.adapter_files import ffn_shapes
from upcycle.experts.kinds import load_model
from upcycle.experts.lora import LORA, LORA_MIXTURE, lora_tensors
from upcycle.experts.mixture import MixtureConfig, router_names, write_mixture
from upcycle.routing.routers import freeze, random_routers
from upcycle.weights.folders import load_dense, read_config

NAMES = ("dense LoRA", "LoRA mixture", "full experts")
FFN = ["gate_proj", "up_proj", "down_proj"]


def make_models(base: Path, work: Path, num_experts: int, k: int, rank: int) -> None:
    """A mixture of random adapters in `work/mixture`, and the same as a plain MoE in `work/plain`."""
    if (work / "plain" / "config.json").exists():
        return
    config = read_config(base)
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    tensors = dict(zip(router_names(layers), random_routers(layers, num_experts, hidden, 0.02, 0), strict=True))
    draw = torch.Generator().manual_seed(0)
    for expert in range(num_experts):
        for name, (outputs, inputs) in ffn_shapes(config).items():
            a = torch.randn(rank, inputs, generator=draw) / inputs**0.5
            tensors |= lora_tensors(name, expert, a, 0.01 * torch.randn(outputs, rank, generator=draw))
    for folder in (work / "mixture", work / "plain"):
        folder.mkdir(parents=True, exist_ok=True)
    mixture = MixtureConfig(
        peft_type=LORA_MIXTURE,
        base_model_name_or_path=str(base.resolve()),
        num_experts=num_experts,
        num_experts_per_tok=k,
        expert_ranks=(rank,) * num_experts,
        expert_scaling=(2.0,) * num_experts,
        r=rank,
    )
    write_mixture(work / "mixture", mixture, tensors)
    LORA.fold(work / "mixture", work / "plain", "source", None)


def load(name: str, base: Path, work: Path, rank: int) -> Any:
    device = pick_device()
    dtype = compute_dtype(device)
    if name == "dense LoRA":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=FFN)
        return get_peft_model(load_dense(base, dtype), config).to(device).train()
    model = load_model(work / ("mixture" if name == "LoRA mixture" else "plain"), dtype, device).train()
    if name == "LoRA mixture":
        freeze(model, LORA.frozen)
    else:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.endswith("mlp.gate.weight"))
    return model


def make_step(model: Any, rows: int, length: int) -> Callable[[], None]:
    device = pick_device()
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak_memory(name: str, arguments: argparse.Namespace) -> int:
    """Bytes, of two steps in a fresh process."""
    shape = ["--rows", str(arguments.rows), "--length", str(arguments.length), "--rank", str(arguments.rank)]
    command = [sys.executable, __file__, "--base", str(arguments.base), "--work", str(arguments.work), *shape]
    return int(json.loads(subprocess.check_output([*command, "--memory-of", name]).splitlines()[-1]))


def measure_memory(name: str, arguments: argparse.Namespace) -> None:
    step = make_step(load(name, arguments.base, arguments.work, arguments.rank), arguments.rows, arguments.length)
    step()
    step()
    on_gpu = pick_device().type == "cuda"
    print(torch.cuda.max_memory_allocated() if on_gpu else peak_resident())


def peak_resident() -> int:
    """Bytes; not `ru_maxrss`, which a child inherits from the process that started it."""
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return 1024 * int(status.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models; made once")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_memory(arguments.memory_of, arguments)
        return
    make_models(arguments.base, arguments.work, 8, 2, arguments.rank)
    models = [load(name, arguments.base, arguments.work, arguments.rank) for name in NAMES]
    steps = [make_step(model, arguments.rows, arguments.length) for model in models]
    times: list[list[float]] = [[] for _ in NAMES]
    for _ in range(arguments.rounds + 1):
        for step, seconds in zip(steps, times, strict=True):
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
    median = [statistics.median(seconds[1:]) for seconds in times]
    memory = [peak_memory(name, arguments) for name in NAMES]
    lines = [
        (name, f"{1e3 * t:.0f}", f"{median[1] / t:.2f}", f"{m / 1e6:.0f}", f"{memory[1] / m:.2f}")
        for name, t, m in zip(NAMES, median, memory, strict=True)
    ]
    threads = f"{torch.get_num_threads()} threads" if pick_device().type == "cpu" else str(pick_device())
    title = f"a step of {arguments.rows} x {arguments.length} tokens, rank {arguments.rank}, {threads}"
    table(title, ("model", "ms", "mixture over it", "peak MB", "mixture over it"), lines)
    say(f"median of {arguments.rounds} rounds in turn")


if __name__ == "__main__":
    with kept_heap():
        main()
