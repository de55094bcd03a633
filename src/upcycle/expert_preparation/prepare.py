"""Stage 1: one instruction-tuning run of the dense model leaves the checkpoints that become experts."""

from pathlib import Path
from typing import Any

import torch

from upcycle.artifacts import Checkpoint, write_json
from upcycle.data.chat import Sample
from upcycle.expert_preparation.checkpoints import write_checkpoints
from upcycle.models.families import family_of
from upcycle.models.folders import copy_companions, load_model, read_config, require_space, write_config
from upcycle.models.layouts import ffn_tensors
from upcycle.recipe import PrepareSettings
from upcycle.training.checkpoints import step_of, strip_resume_files
from upcycle.training.fine_tune import fine_tune, training_record


def tune(
    base: Path,
    tokenizer: Any,
    chat_template: str | None,
    train: list[Sample],
    settings: PrepareSettings,
    seed: int,
    out_dir: Path,
) -> list[Checkpoint]:
    """Instruction-tune the base and keep a checkpoint every `checkpoint_every` epochs (UpIT, section 3).

    Writes `checkpoint-<step>/` folders, `checkpoints.json` and `log.json`. Resumes from its own last checkpoint.

    Raises:
        UpcycleError: training diverges, or the checkpoints would not fit on the disk.
    """
    record = out_dir / "log.json"
    if not record.exists():  # else only the folders are left to be finished
        model = load_model(base, dtype=torch.float32).train()
        if settings.train == "ffn":
            freeze_all_but_ffn(model, base)
        _require_space(model, settings, out_dir)
        log = fine_tune(model, tokenizer, train, settings, out_dir, seed, "prepare: instruction tuning")
        write_json(record, training_record(train, settings, log))
    folders = sorted(out_dir.glob("checkpoint-*"), key=step_of)
    last_step = step_of(folders[-1])
    checkpoints = []
    for folder in folders:
        strip_resume_files(folder)
        (folder / "trainer_state.json").unlink(missing_ok=True)
        _finish(folder, base, chat_template)
        epoch = round(settings.epochs * step_of(folder) / last_step, 4)
        checkpoints.append(Checkpoint(folder.name, folder.name, epoch))
    write_checkpoints(out_dir, checkpoints)
    return checkpoints


def _require_space(model: Any, settings: PrepareSettings, out_dir: Path) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = 4 * (parameters * (settings.num_checkpoints or 0) + 2 * trainable)  # fp32, and Adam's two moments once
    hint = "raise prepare.checkpoint_every"
    require_space(out_dir, needed, f"preparation ({settings.num_checkpoints} checkpoints)", hint)


def freeze_all_but_ffn(model: Any, base: Path) -> None:
    """Leave only the FFN weights trainable: the experts then differ in nothing else."""
    config = read_config(base)
    names = ffn_tensors(family_of(config, str(base)).layout, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _finish(folder: Path, base: Path, chat_template: str | None) -> None:
    # training switches the cache off in the saved configuration; the architecture is the base's
    write_config(folder, {**read_config(base), "dtype": "float32"})
    copy_companions(base, folder, chat_template)
