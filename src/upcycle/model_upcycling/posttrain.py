"""Stage 4, model upcycling: the whole MoE is trained with top-k routing and a load-balancing loss."""

import shutil
from pathlib import Path
from typing import Any

import torch

from upcycle.artifacts import write_json
from upcycle.data.chat import Sample
from upcycle.models.adapters import is_adapter
from upcycle.models.folders import compute_dtype, load_model, load_routers, pick_device, require_space, save_model
from upcycle.models.mixture import mixture_of
from upcycle.models.routers import parts
from upcycle.settings import PosttrainSettings
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
    base: Path | None = None,
    four_bit: bool = False,
) -> None:
    """Train the MoE in `initial` with the routing vectors in `router`; write it as a plain model folder.

    Of a mixture of adapters the dense model is frozen, and the folder is compact. Resumes from its own last checkpoint.

    Args:
        base: the dense model of a mixture of adapters.
        four_bit: train the mixture on a base in 4 bits.

    Raises:
        UpcycleError: training diverges.
    """
    record = out_dir / "log.json"
    if not record.exists():  # else only the Trainer's folder is left to be removed
        dtype = compute_dtype(pick_device()) if is_adapter(initial) else torch.float32  # a frozen base needs no fp32
        model = load_model(initial, dtype, base=base, four_bit=four_bit).train()
        load_routers(model, router)
        freeze(model, settings.freeze)
        _require_space(model, out_dir)
        name = "posttrain: mixture of experts"
        log = fine_tune(model, tokenizer, train, settings, out_dir / TRAINER, seed, name, keep=1, balance=settings)
        save_model(model, out_dir, initial)
        write_json(record, training_record(train, settings, log))
    shutil.rmtree(out_dir / TRAINER, ignore_errors=True)


def freeze(model: Any, what: str) -> None:
    """Leave the routers, the experts, or all the rest (`shared`) of a MoE as they are; `none` trains everything.

    Of a mixture of adapters the rest, which is the dense model, is always left as it is. What trains is in fp32.
    """
    fixed = {what, "shared"} if mixture_of(model) else {what}
    for part, parameter in parts(model):
        if part not in fixed:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(part not in fixed)


def _require_space(model: Any, out_dir: Path) -> None:
    trained = (p for p in model.parameters() if p.requires_grad or not mixture_of(model))
    parameters = sum(p.numel() for p in trained)
    needed = 4 * parameters * (2 * 3 + 1)  # two checkpoints at once with Adam's two moments, and the result, in fp32
    require_space(out_dir, needed, "post-training", "lower expand.num_experts")
