"""The mixture of adapters from the plan: the base stays where it is, experts are small additions to its FFNs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from upcycle.artifacts import ExpansionPlan
from upcycle.console import say
from upcycle.merging.lineage import Child
from upcycle.merging.low_rank import Adapter, LowRank, fresh, materialise_adapters
from upcycle.models.adapters import ffn_shapes, read_adapter
from upcycle.models.folders import LINEAGE, copy_companions, read_config
from upcycle.models.layouts import Config
from upcycle.models.mixture import (
    BOTTLENECK,
    LORA,
    MixtureConfig,
    bottleneck_tensors,
    lora_tensors,
    router_names,
    write_mixture,
)
from upcycle.models.routers import random_routers
from upcycle.settings import AssembleSettings, LoraSettings


def assemble_mixture(
    base: Path,
    base_name: str,
    folders: Sequence[Path],
    plan: ExpansionPlan,
    settings: AssembleSettings,
    lora: LoraSettings,
    bottleneck: bool,
    chat_template: str | None,
    router_std: float,
    seed: int,
    out_dir: Path,
) -> None:
    """Write the compact folder of a mixture of LoRA or bottleneck experts; its router is random.

    An expert that is the base itself starts as a fresh adapter, which adds nothing.

    Args:
        base_name: what the folder calls its dense model.
        folders: every prepared adapter, in order.

    Raises:
        UpcycleError: see `read_adapter`.
    """
    config = read_config(base)
    m, layers, hidden = len(plan.experts), config["num_hidden_layers"], config["hidden_size"]
    routers = dict(zip(router_names(layers), random_routers(layers, m, hidden, router_std, seed), strict=True))
    if bottleneck:
        kind, ranks, scalings = BOTTLENECK, [lora.rank] * m, [1.0] * m
        tensors = bottleneck_tensors(layers, hidden, lora.rank, m, torch.Generator().manual_seed(seed))
    else:
        experts = lora_experts(plan, [read_adapter(folder, config) for folder in folders], lora, config)
        kind, (ranks, scalings, tensors) = LORA, _uniform(experts, config)
    dtype = "float32" if settings.dtype == "source" else settings.dtype
    mixture = MixtureConfig(
        kind, base_name, m, settings.num_experts_per_tok, tuple(ranks), tuple(scalings), dtype=dtype
    )
    write_mixture(out_dir, mixture, {**tensors, **routers})
    copy_companions(base, out_dir, chat_template)
    plan.save(out_dir / LINEAGE)
    added = sum(tensor.numel() for tensor in (*tensors.values(), *routers.values()))
    say(f"assemble: {m} experts of rank {max(ranks)} on {base_name}, {added / 1e6:.1f}M parameters besides the base's")


def lora_experts(plan: ExpansionPlan, adapters: Sequence[Adapter], lora: LoraSettings, config: Config) -> list[Adapter]:
    """Every expert of the plan as an adapter; the base itself is a fresh one, and adds nothing to its children."""
    sources: list[Adapter] = [{} if e.checkpoint is None else adapters[e.checkpoint] for e in plan.sources]
    children = [Child(e.parents, e.weights) for e in plan.children]
    assert plan.adapters is not None
    made = materialise_adapters(sources, children, plan.merge, plan.drop_rate, plan.adapters, plan.seed)
    return [*(source or _fresh(i, lora, config, plan.seed) for i, source in enumerate(sources)), *made]


def _fresh(number: int, lora: LoraSettings, config: Config, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed * 65_537 + number)
    return {name: fresh(shape, lora.rank, lora.scaling, draw) for name, shape in ffn_shapes(config).items()}


def _uniform(
    experts: Sequence[Mapping[str, LowRank]], config: Config
) -> tuple[list[int], list[float], dict[str, Tensor]]:
    """(ranks, scalings, tensors): one rank and scaling per expert, with zeros where it adds nothing."""
    ranks = [max(update.rank for update in expert.values()) for expert in experts]
    scalings = [next(iter(expert.values())).scaling for expert in experts]
    tensors: dict[str, Tensor] = {}
    for number, (expert, rank, scaling) in enumerate(zip(experts, ranks, scalings, strict=True)):
        for name, (outputs, inputs) in ffn_shapes(config).items():
            update = expert.get(name, LowRank(torch.zeros(1, inputs), torch.zeros(outputs, 1), scaling))
            a = torch.nn.functional.pad(update.a.float(), (0, 0, 0, rank - update.rank))
            b = torch.nn.functional.pad(update.b.float() * (update.scaling / scaling), (0, rank - update.rank))
            tensors |= lora_tensors(name, number, a, b)
    return ranks, scalings, tensors
