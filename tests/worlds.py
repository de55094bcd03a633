"""Assembled worlds that several tests share."""

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from upcycle.architectures.layouts import ffn_layers, moe_layers
from upcycle.architectures.mapping import with_layers
from upcycle.data.chat import Sample
from upcycle.data.formats import Row
from upcycle.data.rows import open_rows
from upcycle.experts.kinds import KINDS, load_model
from upcycle.experts.linears import FFN_WEIGHTS
from upcycle.experts.lora import target_linears
from upcycle.recipe import Recipe, load_recipe, parse_recipe
from upcycle.records.plan import ExpansionPlan, Expert
from upcycle.routing.routers import ForcedRouter, RowExperts, granularity, random_routers, swapped_routers
from upcycle.settings import AssembleSettings, LoraSettings, Source
from upcycle.types import Model
from upcycle.weights.base import Base

IDS = torch.randint(3, 99, (2, 60), generator=torch.Generator().manual_seed(0))


def plan_of(num_checkpoints: int, **changes: Any) -> ExpansionPlan:
    """Every checkpoint an expert, no children."""
    experts = tuple(Expert(name=f"c{i}", kind="checkpoint", checkpoint=i) for i in range(num_checkpoints))
    gram = ((0.0,) * num_checkpoints,) * num_checkpoints
    values = {"experts": experts, "merge": "dare", "drop_rate": 0.2, "seed": 0, "similarity": "cosine", "gram": gram}
    return ExpansionPlan(**{**values, **changes})


def a_sample(where: str = "a", domain: str = "x") -> Sample:
    """A sample of which only its place and its domain matter."""
    return Sample([3, 4], [-100, 4], domain, "q", "a", 1, where)


def as_base(folder: Path | Base) -> Base:
    return folder if isinstance(folder, Base) else Base(folder, str(folder))


def assemble(
    kind: str,
    base: Path | Base,
    folders: list[Path],
    plan: ExpansionPlan,
    out: Path,
    router_std: float = 0.02,
    rank: int = 16,
    **settings: Any,
) -> Path:
    """What the stage writes, with a random router of seed 0."""
    out.mkdir(exist_ok=True)
    chosen = AssembleSettings(**settings)
    dense = as_base(base)
    if chosen.layers != "all":
        dense = replace(dense, layers=chosen.chosen_layers(ffn_layers(dense.config), dense.config["num_hidden_layers"]))
    hidden = dense.config["hidden_size"]
    routers = random_routers(
        len(moe_layers(with_layers(dense.config, dense.layers))), len(plan.experts), hidden, router_std, 0
    )
    KINDS[kind].assemble(dense, folders, plan, chosen, LoraSettings(rank=rank), routers, out)
    return out


def shrunk(name: str, tiny: dict[str, Any], **changes: Any) -> Recipe:
    """A shipped recipe with the sizes of the tiny one."""
    values = load_recipe(name).model_dump() | {key: tiny[key] for key in ("base", "data")}
    for section in ("prepare", "posttrain", "route", "evaluate"):
        values[section] |= tiny[section]
    values["lora"] |= {"rank": 4}
    values["evaluate"] |= {"exact_match": False, "models": "ends"}
    for section, settings in changes.items():
        values[section] |= settings
    return parse_recipe(values, name)


def make_adapter(base: Path, folder: Path, seed: int, rank: int = 4, **config: Any) -> Path:
    """A LoRA adapter of the FFN weights, saved by PEFT, whose B is not zero."""
    from peft import LoraConfig, get_peft_model

    dense = load_model(base, torch.float32)
    targets = config.pop("target_modules", None) or target_linears(dense, FFN_WEIGHTS)
    torch.manual_seed(seed)
    settings = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=targets, **config)
    model = get_peft_model(dense, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def mixture(base: Path, folders: list[Path], out: Path, router_std: float = 0.5, **settings: Any) -> Path:
    """A mixture with an expert for each adapter."""
    return assemble("lora", base, folders, plan_of(len(folders), adapters="average"), out, router_std, **settings)


def assembled(base: Path | Base, folders: list[Path], out: Path, router_std: float = 0.02, **settings: Any) -> Path:
    """A plain MoE with an expert for each checkpoint."""
    return assemble("ffn", base, folders, plan_of(len(folders)), out, router_std, **settings)


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """Of a model in fp32, for IDS."""
    return load_model(folder, torch.float32)(IDS).logits


@torch.no_grad()
def forced_logits(model: Model, experts: list[int], num_experts: int) -> torch.Tensor:
    """Of a MoE for IDS, with every token of a row sent to the row's expert."""
    rows = RowExperts(granularity(model))
    rows.experts = torch.tensor(experts)
    with swapped_routers(model, lambda _: ForcedRouter(rows, num_experts)):
        return model(IDS).logits


def assert_experts_are(folders: list[Path], moe: Path) -> None:
    """Forced to expert i, the MoE gives the logits of the i-th dense model."""
    model = load_model(moe, torch.float32)
    for expert, folder in enumerate(folders):
        found = forced_logits(model, [expert, expert], len(folders))
        torch.testing.assert_close(found, logits(folder), rtol=0, atol=1e-5)


def rows_of(path: str | Path, max_bad: float = 0.0, **settings: Any) -> list[Row]:
    """All rows of one source."""
    rows = open_rows([Source(path=str(path), **settings)], max_bad)
    copies = rows.table["copies"].to_pylist()
    return [row for row, count in zip(rows.take(range(len(rows))), copies, strict=True) for _ in range(count)]


def some_long(names: Iterable[str], quick: AbstractSet[str]) -> list[Any]:
    """Parameters of a test, of which those that are not quick run in `make test-long` alone."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.long) for name in names]
