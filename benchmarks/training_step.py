"""What a training step of a MoE costs, against dense models: the one that it was made of, and one of its active width.

    python benchmarks/training_step.py --work DIR                          # 8 rows of 256, hidden 576, 8 layers
    python benchmarks/training_step.py --work DIR --rows 16 --length 1024  # bf16 on a GPU

Each MoE is measured in turn with the models that it is compared with, on the same batch. A step is forward, loss,
balance loss and the count of the experts' load, backward and AdamW over all parameters. Prints the median of each, its
ratio to the dense ones, and that of the FLOPs; and the ratio to the same FFNs in plain PyTorch without a router, each
with its share of the tokens as they stand.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from upcycle.architectures.mapping import map_model
from upcycle.architectures.slices import Slicing
from upcycle.console import say, table
from upcycle.distributed.device import pick_device
from upcycle.distributed.heap import kept_heap
from upcycle.experts.grouped import use_own_products
from upcycle.experts.kinds import KINDS, load_model
from upcycle.records.plan import ExpansionPlan, Expert
from upcycle.routing.routers import RouterRecorder, num_experts, random_routers
from upcycle.settings import AssembleSettings, LoraSettings
from upcycle.training.balance import load_balancing_loss
from upcycle.training.callbacks import LoadMonitor
from upcycle.training.step_load import StepLoad, count
from upcycle.weights.base import Base
from upcycle.weights.safetensors_io import ModelReader

EXPERTS = 8
DENSE, WIDE = "dense", "dense, twice as wide"
CHOICES = {"whole experts, top-2": (2, 1), "4 slices each, top-1": (1, 4)}
"""Name to experts per token, and granularity."""
FLOOR = "{}, without routing"


class Unrouted(nn.Module):
    """Plain FFNs, each of which computes an equal share of the tokens."""

    def __init__(self, config: LlamaConfig, count: int, per_token: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(count))
        self.per_token = per_token

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, -2)
        share = len(tokens) * self.per_token // len(self.experts)
        begins = [expert * share % len(tokens) for expert in range(len(self.experts))]
        found = [expert(tokens[at : at + share]) for expert, at in zip(self.experts, begins, strict=True)]
        return torch.cat(found).view(self.per_token, *hidden.shape).sum(0)


@dataclass(frozen=True)
class Size:
    """Of a step and of the dense model."""

    rows: int = 8
    length: int = 256
    hidden: int = 576
    layers: int = 8
    rounds: int = 8


def make_models(work: Path, size: Size) -> None:
    """Dense Llamas of random weights in `work`, and MoEs of copies of the first; once."""
    if (work / "done").exists():
        return
    for name, width in ((DENSE, 1), (WIDE, 2)):
        torch.manual_seed(0)
        heads = max(1, size.hidden // 64)
        config = LlamaConfig(
            vocab_size=8192,
            hidden_size=size.hidden,
            intermediate_size=size.hidden * 8 // 3 // 64 * 64 * width or 64 * width,
            num_hidden_layers=size.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3 or 1,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(work / name)
    base = Base(work / DENSE, DENSE)
    copies = tuple(Expert(name=f"copy-{e}", kind="checkpoint", checkpoint=0) for e in range(EXPERTS))
    gram = ((0.0,) * EXPERTS,) * EXPERTS
    plan = ExpansionPlan(experts=copies, merge="dare", drop_rate=0.0, seed=0, similarity="cosine", gram=gram)
    for name, (k, granularity) in CHOICES.items():
        (work / name).mkdir(parents=True, exist_ok=True)
        settings = AssembleSettings(num_experts_per_tok=k, granularity=granularity)
        routers = random_routers(size.layers, EXPERTS, size.hidden, 0.02, 0)
        KINDS["ffn"].assemble(base, [base.folder], plan, settings, LoraSettings(), routers, work / name)
    (work / "done").touch()


def unrouted(dense: Any, k: int, granularity: int) -> Any:
    """The dense model with as many FFNs of random weights in each layer as the MoE has."""
    config = LlamaConfig(**dense.config.to_dict())
    config.intermediate_size //= granularity
    for layer in dense.model.layers:
        layer.mlp = Unrouted(config, EXPERTS * granularity, k * granularity).to(dense.device)
    return dense


def make_step(model: Any, size: Size, recorders: ExitStack) -> Callable[[], None]:
    """A step as the Trainer makes it, hooks and balance loss included."""
    device, vocabulary = pick_device(), model.config.vocab_size
    ids = torch.randint(vocabulary, (size.rows, size.length), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones(size.rows * size.length, dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    recorder = recorders.enter_context(RouterRecorder(model)) if num_experts(model) else None
    monitor, load = LoadMonitor(), StepLoad()
    use_own_products(model)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            if recorder:
                recorder.clear()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if recorder:
                routed = count(recorder.indices, mask, recorder.logits[0].shape[-1])
                monitor.add(routed.everywhere)
                share = load.add(routed, last=True)
                loss = loss + 0.01 * load_balancing_loss(recorder.logits, share, mask, num_tokens=routed.num_tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.take()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(work: Path, size: Size) -> dict[str, dict[str, float]]:
    """Of each MoE: median seconds of its step and of those of the models that it is compared with."""
    make_models(work, size)
    with kept_heap():
        return {choice: in_turn(work, size, choice) for choice in CHOICES}


def in_turn(work: Path, size: Size, choice: str) -> dict[str, float]:
    """Median seconds of a step of a MoE, both dense models and its FFNs without a router."""
    times: dict[str, list[float]] = {name: [] for name in (DENSE, WIDE, choice, FLOOR.format(choice))}
    with ExitStack() as recorders:

        def load(name: str) -> Any:
            return load_model(work / name, torch.float32, pick_device())

        models = {name: load(name).train() for name in (DENSE, WIDE, choice)}
        models[FLOOR.format(choice)] = unrouted(load(DENSE), *CHOICES[choice]).train()
        steps = {name: make_step(model, size, recorders) for name, model in models.items()}
        for _ in range(size.rounds + 1):
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def compared(work: Path, median: dict[str, float]) -> list[tuple[str, ...]]:
    """A line for each model: its milliseconds, and its ratios to the others of its group."""
    dense, lines = work / DENSE, []
    for name, seconds in median.items():
        k, granularity = CHOICES.get(name.removesuffix(FLOOR.format("")), (1, 1))
        mapping = map_model(dense, ModelReader(dense), EXPERTS, Slicing(granularity))
        flops = "1.00" if name == DENSE else f"{mapping.flops_over_dense(2 if name == WIDE else k):.2f}"
        floor = f"{seconds / median[FLOOR.format(name)]:.2f}" if name in CHOICES else ""
        over = (f"{seconds / median[d]:.2f}" for d in (DENSE, WIDE))
        lines.append((name, f"{1e3 * seconds:.0f}", *over, floor, flops))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models; made once")
    for field, value in asdict(Size()).items():
        parser.add_argument(f"--{field}", type=int, default=value)
    arguments = vars(parser.parse_args())
    work, size = arguments.pop("work"), Size(**arguments)
    lines = [line for median in measure(work, size).values() for line in compared(work, median)]
    threads = f"{torch.get_num_threads()} threads" if pick_device().type == "cpu" else str(pick_device())
    title = f"a step of {size.rows} x {size.length} tokens, hidden {size.hidden}, {size.layers} layers, {threads}"
    heads = ("model", "ms", "over dense", "over the wide one", "over the same without routing", "FLOPs over dense")
    table(title, heads, lines)
    say(f"median of {size.rounds} rounds in turn")


if __name__ == "__main__":
    main()
