"""What a training step of a MoE costs, against the dense model that it was made of: whole experts, and slices.

    python benchmarks/fine_grained_step.py --work DIR                          # 8 rows of 256, hidden 576, 8 layers
    python benchmarks/fine_grained_step.py --work DIR --rows 16 --length 1024  # bf16 on a GPU

Three models see the same batch in turn. A step is forward, loss, balance loss and the count of the experts' load,
backward and AdamW over all parameters. Prints the median of each, its ratio to the dense one's, and that of the FLOPs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from upcycle.architectures.mapping import map_model
from upcycle.architectures.slices import Slicing
from upcycle.console import say, table
from upcycle.distributed.device import pick_device
from upcycle.experts.kinds import KINDS, load_model
from upcycle.records.plan import ExpansionPlan, Expert
from upcycle.routing.routers import RouterRecorder, num_experts, random_routers
from upcycle.settings import AssembleSettings, LoraSettings
from upcycle.training.balance import load_balancing_loss
from upcycle.training.callbacks import LoadMonitor
from upcycle.weights.base import Base
from upcycle.weights.safetensors_io import ModelReader

EXPERTS = 8
CHOICES = {"dense": (1, 1), "whole experts, top-2": (2, 1), "4 slices each, top-1": (1, 4)}
"""Name to experts per token, and granularity."""


def make_models(work: Path, hidden: int, layers: int) -> None:
    """A dense Llama of random weights in `work`, and the MoEs of copies of it; once."""
    if (work / "done").exists():
        return
    torch.manual_seed(0)
    heads = hidden // 64
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 or 1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(work / "dense")
    base = Base(work / "dense", "dense")
    copies = tuple(Expert(name=f"copy-{e}", kind="checkpoint", checkpoint=0) for e in range(EXPERTS))
    gram = ((0.0,) * EXPERTS,) * EXPERTS
    plan = ExpansionPlan(experts=copies, merge="dare", drop_rate=0.0, seed=0, similarity="cosine", gram=gram)
    for name, (k, granularity) in list(CHOICES.items())[1:]:
        (work / name).mkdir(parents=True, exist_ok=True)
        settings = AssembleSettings(num_experts_per_tok=k, granularity=granularity)
        routers = random_routers(layers, EXPERTS, hidden, 0.02, 0)
        KINDS["ffn"].assemble(base, [base.folder], plan, settings, LoraSettings(), routers, work / name)
    (work / "done").touch()


def make_step(model: Any, rows: int, length: int, recorders: ExitStack) -> Callable[[], None]:
    device, vocabulary = pick_device(), model.config.vocab_size
    ids = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones(rows * length, dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    recorder = recorders.enter_context(RouterRecorder(model)) if num_experts(model) else None
    monitor = LoadMonitor()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            if recorder:
                recorder.clear()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if recorder:
                monitor.add(recorder.indices, mask, recorder.logits[0].shape[-1])
                loss = loss + 0.01 * load_balancing_loss(recorder.logits, recorder.indices, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.take()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models; made once")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    make_models(arguments.work, arguments.hidden, arguments.layers)
    dense = arguments.work / "dense"
    times: dict[str, list[float]] = {name: [] for name in CHOICES}
    with ExitStack() as recorders:
        steps = {}
        for name in CHOICES:
            model = load_model(arguments.work / name, torch.float32, pick_device()).train()
            steps[name] = make_step(model, arguments.rows, arguments.length, recorders)
        for _ in range(arguments.rounds + 1):
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    lines = []
    for name, (k, granularity) in CHOICES.items():
        mapping = map_model(dense, ModelReader(dense), EXPERTS, Slicing(granularity))
        flops = "1.00" if name == "dense" else f"{mapping.flops_over_dense(k):.2f}"
        lines.append((name, f"{1e3 * median[name]:.0f}", f"{median[name] / median['dense']:.2f}", flops))
    threads = f"{torch.get_num_threads()} threads" if pick_device().type == "cpu" else str(pick_device())
    title = f"a step of {arguments.rows} x {arguments.length} tokens, hidden {arguments.hidden}, {threads}"
    table(title, ("model", "ms", "over dense", "FLOPs over dense"), lines)
    say(f"median of {arguments.rounds} rounds in turn")


if __name__ == "__main__":
    main()
