"""Assembled worlds that several tests share."""

from pathlib import Path
from typing import Any

from upcycle.artifacts import ExpansionPlan, Expert
from upcycle.model_upcycling.assemble import assemble
from upcycle.recipe import AssembleSettings


def plan_of(num_checkpoints: int) -> ExpansionPlan:
    """Every checkpoint an expert, no children."""
    experts = tuple(Expert(f"c{i}", "checkpoint", checkpoint=i) for i in range(num_checkpoints))
    return ExpansionPlan(experts, "dare", 0.2, 0, "cosine", ((0.0,) * num_checkpoints,) * num_checkpoints)


def assembled(base: Path, folders: list[Path], out: Path, router_std: float = 0.02, **settings: Any) -> Path:
    out.mkdir(exist_ok=True)
    assemble(base, folders, plan_of(len(folders)), AssembleSettings(**settings), None, router_std, 0, out)
    return out
