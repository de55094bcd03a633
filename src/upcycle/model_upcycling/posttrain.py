"""Stage 4, model upcycling: the whole MoE is trained with top-k routing and a load-balancing loss."""

import shutil
from pathlib import Path
from typing import Any

import torch

from upcycle.artifacts import write_json
from upcycle.data.chat import Sample
from upcycle.models.folders import finish_moe_folder, load_model, load_routers, read_config, require_space
from upcycle.models.routers import parts
from upcycle.recipe import PosttrainSettings
from upcycle.training.fine_tune import fine_tune, training_record

TRAINER = "trainer"
"""Folder of the Trainer's own checkpoints while the stage runs."""


def posttrain(
    initial: Path,
    router: Path,
    tokenizer: Any,
    train: list[Sample],
    settings: PosttrainSettings,
    seed: int,
    out_dir: Path,
) -> None:
    """Train the MoE in `initial` with the routing vectors in `router`; write it as a plain model folder.

    Resumes from its own last checkpoint.

    Raises:
        UpcycleError: training diverges.
    """
    record = out_dir / "log.json"
    if not record.exists():  # else only the Trainer's folder is left to be removed
        model = load_model(initial, dtype=torch.float32).train()
        load_routers(model, router)
        freeze(model, settings.freeze)
        _require_space(model, out_dir)
        name = "posttrain: mixture of experts"
        log = fine_tune(model, tokenizer, train, settings, out_dir / TRAINER, seed, name, keep=1, balance=settings)
        model.to(getattr(torch, read_config(initial)["dtype"])).save_pretrained(out_dir)
        finish_moe_folder(out_dir, initial)
        write_json(record, training_record(train, settings, log))
    shutil.rmtree(out_dir / TRAINER, ignore_errors=True)


def freeze(model: Any, what: str) -> None:
    """Leave the routers, the experts, or all the rest (`shared`) of a MoE as they are; `none` trains everything."""
    for part, parameter in parts(model):
        parameter.requires_grad_(part != what)


def _require_space(model: Any, out_dir: Path) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    needed = 4 * parameters * (2 * 3 + 1)  # two checkpoints at once with Adam's two moments, and the result, in fp32
    require_space(out_dir, needed, "post-training", "lower expand.num_experts")
