"""Stage 1: one instruction-tuning run of the dense model leaves the checkpoints that become experts."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from upcycle.artifacts import Checkpoint, write_json
from upcycle.data.chat import Sample
from upcycle.errors import UpcycleError
from upcycle.expert_preparation.checkpoints import write_checkpoints
from upcycle.models.adapters import is_adapter, name_base
from upcycle.models.families import family_of
from upcycle.models.folders import (
    compute_dtype,
    copy_companions,
    load_dense,
    load_model,
    pick_device,
    read_config,
    require_space,
    write_config,
)
from upcycle.models.layouts import ffn_tensors
from upcycle.settings import LoraSettings, PrepareSettings
from upcycle.training.checkpoints import step_of, strip_resume_files
from upcycle.training.fine_tune import fine_tune, training_record


def tune(
    base: Path,
    base_name: str,
    tokenizer: Any,
    chat_template: str | None,
    train: list[Sample],
    settings: PrepareSettings,
    lora: LoraSettings,
    seed: int,
    out_dir: Path,
) -> list[Checkpoint]:
    """Instruction-tune the base and keep a checkpoint every `checkpoint_every` epochs (UpIT, section 3).

    With `by_domain` there is a training for each domain label, and the end of each is a checkpoint. Writes
    `checkpoint-<step>/` folders (models or adapters), `checkpoints.json` and `log.json`. Resumes from its own last
    checkpoint.

    Args:
        base_name: what adapters call the base.

    Raises:
        UpcycleError: training diverges, the checkpoints would not fit on the disk, or there are no domains.
    """
    checkpoints, logs = [], []
    for name, samples in _trainings(train, settings):
        folder = out_dir / name
        folder.mkdir(exist_ok=True)
        record = folder / "log.json"
        if not record.exists():  # else only the folders are left to be finished
            model = _trainable(base, settings, lora, seed)
            _require_space(model, settings, out_dir)
            title = f"prepare: instruction tuning {name}".strip()
            keep = 1 if settings.by_domain else None
            log = fine_tune(model, tokenizer, samples, settings, folder, seed, title, keep)
            write_json(record, training_record(samples, settings, log))
        logs.append(json.loads(record.read_text()))
        saved = sorted(folder.glob("checkpoint-*"), key=step_of)
        for checkpoint in saved[-1:] if settings.by_domain else saved:
            _finish(checkpoint, base, base_name, chat_template)
            epoch = round(settings.epochs * step_of(checkpoint) / step_of(saved[-1]), 4)
            place = str(checkpoint.relative_to(out_dir))
            checkpoints.append(Checkpoint(name or checkpoint.name, place, epoch))
    if settings.by_domain:
        write_json(out_dir / "log.json", {k: sum((log[k] for log in logs), [] if k == "log" else 0) for k in logs[0]})
    write_checkpoints(out_dir, checkpoints)
    return checkpoints


def _trainings(train: list[Sample], settings: PrepareSettings) -> list[tuple[str, list[Sample]]]:
    """(folder, samples) of each training: one over all, or one for each domain."""
    if not settings.by_domain:
        return [("", train)]
    domains = sorted({sample.domain for sample in train})
    if len(domains) < 2:
        raise UpcycleError(
            f"prepare.by_domain: the {len(train)} training rows have one domain, '{domains[0]}'; give rows a field "
            "`domain`, or set prepare.by_domain=false"
        )
    folders = [f"domain-{re.sub(r'[^A-Za-z0-9_-]+', '_', domain)}" for domain in domains]
    unique = [name if folders.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(folders)]
    return [(name, [s for s in train if s.domain == d]) for name, d in zip(unique, domains, strict=True)]


def _trainable(base: Path, settings: PrepareSettings, lora: LoraSettings, seed: int) -> Any:
    """The model with what is tuned: all of it, its FFNs, or adapters on them."""
    if settings.train != "lora":
        model = load_model(base, dtype=torch.float32).train()
        if settings.train == "ffn":
            freeze_all_but_ffn(model, base)
        return model
    from peft import LoraConfig, get_peft_model

    dtype = compute_dtype(pick_device())  # frozen: not worth fp32 where bf16 is quick
    model = load_dense(base, dtype, lora.four_bit)
    torch.manual_seed(seed)  # of A
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    return get_peft_model(model.train(), config)


def _require_space(model: Any, settings: PrepareSettings, out_dir: Path) -> None:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = trainable if settings.train == "lora" else sum(p.numel() for p in model.parameters())
    needed = 4 * (saved * (settings.num_checkpoints or 1) + 2 * trainable)  # fp32, and Adam's two moments once
    hint = "raise prepare.checkpoint_every"
    require_space(out_dir, needed, f"preparation ({settings.num_checkpoints or 'its'} checkpoints)", hint)


def freeze_all_but_ffn(model: Any, base: Path) -> None:
    """Leave only the FFN weights trainable: the experts then differ in nothing else."""
    config = read_config(base)
    names = ffn_tensors(family_of(config, str(base)).layout, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _finish(folder: Path, base: Path, base_name: str, chat_template: str | None) -> None:
    """Leave a checkpoint as others expect it: without the Trainer's files, and with the base's own settings."""
    strip_resume_files(folder)
    (folder / "trainer_state.json").unlink(missing_ok=True)
    if is_adapter(folder):
        name_base(folder, base_name)
    else:  # training switches the cache off in the saved configuration; the architecture is the base's
        write_config(folder, {**read_config(base), "dtype": "float32"})
    copy_companions(base, folder, chat_template)
