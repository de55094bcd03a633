"""One instruction-tuning run of the dense model leaves the checkpoints that become experts."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from upcycle.data.chat import Sample
from upcycle.data.samples import by_domain
from upcycle.distributed.device import release
from upcycle.distributed.world import is_main, on_main, wait
from upcycle.errors import UpcycleError, counted
from upcycle.experts.kind import Kind
from upcycle.recipe import Recipe
from upcycle.records.files import CHECKPOINTS, LOG, MOMENTS, is_whole, note_sizes
from upcycle.records.plan import Checkpoint
from upcycle.records.training import TrainingRecord
from upcycle.settings import PrepareSettings
from upcycle.training.checkpoints import finish, step_of
from upcycle.training.fine_tune import fine_tune
from upcycle.training.training import Training
from upcycle.types import Model
from upcycle.weights.base import Base
from upcycle.weights.folders import copy_companions, require_space


def tune(
    kind: Kind,
    base: Base,
    train: Sequence[Sample],
    recipe: Recipe,
    out_dir: Path,
    validation: Sequence[Sample] = (),
) -> list[Checkpoint]:
    """Instruction-tune the base and keep a checkpoint every `checkpoint_every` epochs (UpIT, section 3).

    With `by_domain` there is a training for each domain label, and the end of each is a checkpoint. Writes
    `checkpoint-<step>/` folders (models or adapters), `checkpoints.json` and `log.json`. Resumes from its own last
    checkpoint. All processes come.

    Args:
        kind: what the checkpoints will be experts of.
        validation: rows for an evaluation while training, if one is asked for.

    Raises:
        UpcycleError: training diverges, the checkpoints would not fit on the disk, or there are no domains.
    """
    trainings = _trainings(train, recipe)
    for name, samples in trainings:
        if not on_main(partial(is_whole, out_dir / name, _is_rewritten)):  # else checkpoints are left to be finished
            _train(kind, base, samples, recipe, out_dir, name, validation)
            release()
    if is_main():
        _collect(kind, base, [name for name, _ in trainings], recipe.prepare, out_dir)
    wait()
    return CHECKPOINTS.read(out_dir)


def _train(
    kind: Kind,
    base: Base,
    samples: Sequence[Sample],
    recipe: Recipe,
    out_dir: Path,
    name: str,
    validation: Sequence[Sample],
) -> None:
    settings, folder = recipe.prepare, out_dir / name
    folder.mkdir(exist_ok=True)
    model = kind.trainable(base, recipe.lora, recipe.seed, recipe.devices)
    _require_space(kind, model, recipe, out_dir)
    title, span = f"prepare: instruction tuning {name}".strip(), (0.0, recipe.dense_share)
    moments = out_dir / MOMENTS.name if recipe.carries else None
    training = Training(settings, recipe.seed, title, folder, settings.by_domain, span=span, moments_to=moments)
    record = fine_tune(model, base.tokenizer, samples, training, validation)
    if is_main():
        LOG.write(folder, record)
        note_sizes(folder)


def _collect(kind: Kind, base: Base, names: Sequence[str], settings: PrepareSettings, out_dir: Path) -> None:
    """Finish the checkpoints of every training, and list them."""
    checkpoints = []
    for name in names:
        saved = sorted((out_dir / name).glob("checkpoint-*"), key=step_of)
        if not saved:
            raise UpcycleError(
                f"prepare: the training left no checkpoint in {out_dir / name}; remove it, and run again"
            )
        for checkpoint in reversed(saved):  # the newest first: without it, no training goes on with half of the others
            _finish(kind, checkpoint, base)
            kind.check_checkpoint(base, saved[-1], checkpoint)
        for checkpoint in saved:
            epoch = round(settings.epochs * step_of(checkpoint) / step_of(saved[-1]), 4)
            place = str(checkpoint.relative_to(out_dir))
            checkpoints.append(Checkpoint(name=name or checkpoint.name, path=place, epoch=epoch))
    for moments in out_dir.glob(f"{MOMENTS.name}/*"):
        _finish(kind, moments, base)
    if settings.by_domain:
        LOG.write(out_dir, TrainingRecord.of_all([LOG.read(out_dir / name) for name in names]))
    CHECKPOINTS.write(out_dir, checkpoints)


def _trainings(train: Sequence[Sample], recipe: Recipe) -> list[tuple[str, Sequence[Sample]]]:
    """(folder, samples) of each training: one over all, or one for each domain."""
    if not recipe.prepare.by_domain:
        return [("", train)]
    parts = by_domain(train)
    domains = list(parts)
    if len(domains) < 2:
        raise UpcycleError(
            f"prepare.by_domain: found {counted(len(train), 'training row')} of one domain, '{domains[0]}'; give rows "
            "a field `domain`, or set prepare.by_domain=false"
        )
    room = recipe.expand.num_experts - recipe.expand.keep_base
    if recipe.expand.num_checkpoints is None and recipe.expand.copies_of == "none" and len(domains) > room:
        raise UpcycleError(
            f"prepare.by_domain trains once for each of {len(domains)} domains, but expand.num_experts leaves room for "
            f"{counted(room, 'expert')}, so some trainings would be in vain; set expand.num_experts="
            f"{len(domains) + recipe.expand.keep_base}, or expand.num_checkpoints={room} to leave some out"
        )
    folders = [f"domain-{re.sub(r'[^A-Za-z0-9_-]+', '_', domain)}" for domain in domains]
    unique = [name if folders.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(folders)]
    return list(zip(unique, parts.values(), strict=True))


def _require_space(kind: Kind, model: Model, recipe: Recipe, out_dir: Path) -> None:
    settings, trained = recipe.prepare, sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = kind.num_saved(model) * ((settings.num_checkpoints or 1) + 2 * recipe.carries)  # with the moments kept
    needed = 4 * (saved + 2 * trained)  # fp32, and Adam's two moments once
    hint = "raise prepare.checkpoint_every"
    require_space(out_dir, needed, f"preparation ({settings.num_checkpoints or 'its'} checkpoints)", hint)


def _is_rewritten(name: str) -> bool:
    """Whether finishing a checkpoint may change or remove a file."""
    return not (name.endswith(".safetensors") or name == LOG.name)


def _finish(kind: Kind, folder: Path, base: Base) -> None:
    """Leave a checkpoint as others expect it: without the Trainer's files, and with the base's own settings."""
    finish(folder)
    kind.finish_checkpoint(folder, base)
    copy_companions(base.folder, folder, base.chat_template)
