"""Where a training step's time goes: a dense model's beside a MoE's, dense LoRA's beside a LoRA mixture's.

    python benchmarks/profile_steps.py --work DIR                       # whole FFNs; 4 rows of 256 tokens, hidden 576
    python benchmarks/profile_steps.py --work DIR --base SMOLLM2_FOLDER # LoRA on this base
    python benchmarks/profile_steps.py --work DIR --rows 16             # 4,096 tokens

Steps are those of `training_step.py` and `lora_mixture_step.py`. Prints, for each model, the milliseconds of a step by
what torch's own operators do, as torch's profiler counts them (its own cost included), and the total without it. On a
CPU a MoE's experts are computed in threads that it does not see: their products, gathers and activations are one line.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import lora_mixture_step
import torch
import training_step
from torch.profiler import ProfilerActivity, profile

from upcycle.console import say, table
from upcycle.distributed.device import pick_device
from upcycle.distributed.heap import kept_heap
from upcycle.experts.kinds import load_model

GROUPS = {
    "experts, in threads of their own": ("expertffns",),
    "products": ("mm", "linear", "matmul"),
    "attention": ("attention", "sdpa"),
    "optimizer": ("adam", "foreach", "optimizer"),
    "gather and scatter": ("index", "gather", "scatter", "sort", "embedding", "searchsorted", "topk"),
    "new and cleared memory": ("empty", "zero", "fill", "resize"),
    "copies and casts": ("copy", "_to", "clone", "contiguous", "cat"),
}
"""What an operator does, by a part of its name; the first that fits. The rest is element by element."""
REST, TOTAL = "element by element", "a step, not profiled"
ROUNDS = 3


def group_of(name: str) -> str:
    """The group of an operator, by its name."""
    return next((group for group, parts in GROUPS.items() if any(part in name.lower() for part in parts)), REST)


def by_group(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a step for each group, and of one without the profiler."""
    step()
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    on_gpu = pick_device().type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities) as found:
        for _ in range(ROUNDS):
            step()
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[group_of(event.key)] += own / ROUNDS / 1e3
    return {**spent, TOTAL: 1e3 * statistics.median(seconds)}


def steps_of_ffns(work: Path, rows: int, length: int, stack: ExitStack) -> dict[str, Callable[[], None]]:
    """Of a dense model, one of the MoE's active width, and the MoE."""
    size = training_step.Size(rows=rows, length=length)
    training_step.make_models(work, size)
    names = (training_step.DENSE, training_step.WIDE, *training_step.CHOICES)
    models = {name: load_model(work / name, torch.float32, pick_device()).train() for name in names}
    return {name: training_step.make_step(model, size, stack) for name, model in models.items()}


def steps_of_lora(base: Path, work: Path, rows: int, length: int) -> dict[str, Callable[[], None]]:
    """Of dense LoRA and of a mixture."""
    lora_mixture_step.make_models(base, work, 8, 2, 16)
    names = lora_mixture_step.NAMES[:2]
    models = {name: lora_mixture_step.load(name, base, work, 16) for name in names}
    return {name: lora_mixture_step.make_step(model, rows, length) for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models; made once")
    parser.add_argument("--base", type=Path, help="dense model for LoRA; without it, whole FFNs of random models")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    work, shape = arguments.work, (arguments.rows, arguments.length)
    with kept_heap(), ExitStack() as stack:
        steps = steps_of_lora(arguments.base, work, *shape) if arguments.base else steps_of_ffns(work, *shape, stack)
        found = {name: by_group(step) for name, step in steps.items()}
    lines = [(group, *(f"{costs.get(group, 0):.0f}" for costs in found.values())) for group in (*GROUPS, REST, TOTAL)]
    threads = f"{torch.get_num_threads()} threads" if pick_device().type == "cpu" else str(pick_device())
    table(f"a step of {shape[0]} x {shape[1]} tokens, {threads}: milliseconds", ("", *found), lines)
    say(f"mean of {ROUNDS} profiled steps; the last line is the median of {ROUNDS} others")


if __name__ == "__main__":
    main()
