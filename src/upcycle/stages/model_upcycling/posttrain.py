"""The whole MoE is trained with top-k routing and a load-balancing loss."""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from upcycle.console import say
from upcycle.data.chat import Sample
from upcycle.distributed.device import release
from upcycle.distributed.world import is_main, on_main, wait
from upcycle.experts.kinds import load_for_training, load_routers, save_model, trained_parameters
from upcycle.recipe import Recipe
from upcycle.records.files import LOG, is_whole, note_sizes
from upcycle.training.fine_tune import fine_tune
from upcycle.training.moments import Moments
from upcycle.training.training import Training
from upcycle.types import Model
from upcycle.weights.base import Base
from upcycle.weights.folders import require_space
from upcycle.weights.whole import more_bytes, source_of_others, write_whole

TRAINER = "trainer"
"""Folder of the Trainer's own checkpoints while the stage runs."""


def posttrain(
    base: Base,
    initial: Path,
    router: Path,
    train: Sequence[Sample],
    recipe: Recipe,
    out_dir: Path,
    moments: Callable[[Model, Path], Moments] | None = None,
    validation: Sequence[Sample] = (),
) -> None:
    """Train the MoE in `initial` with the routing vectors in `router`; write it as a model folder.

    Resumes from its own last checkpoint. All processes come.

    Args:
        moments: (model, scratch folder): the optimizer state to begin with; None: a fresh one.
        validation: rows for an evaluation while training, if one is asked for.

    Raises:
        UpcycleError: training diverges.
    """
    if not on_main(lambda: is_whole(out_dir, _of_the_trainer)):  # else only the Trainer's folder is left to be removed
        settings = recipe.posttrain
        model = load_for_training(initial, base.folder, recipe.lora.four_bit, settings.freeze, recipe.devices)
        load_routers(model, router)
        keeps = recipe.assemble.keep_vision
        whole = source_of_others(base.folder, base.last)
        _require_space(model, out_dir, more_bytes(initial, whole) if keeps else 0)
        title = "posttrain: mixture of experts"
        begin = recipe.dense_share if recipe.dense_share < 1 else 0.0
        if recipe.prepare.checkpoints:
            say(
                "posttrain: its own schedule, with a warm-up, because given checkpoints do not say how far theirs "
                "had come"
            )
        trainer = out_dir / TRAINER
        begun = partial(moments, model, trainer / "moments") if moments else None
        training = Training(settings, recipe.seed, title, trainer, True, settings, span=(begin, 1.0), moments=begun)
        record = fine_tune(model, base.tokenizer, train, training, validation)
        text = trainer / "text" if keeps else out_dir
        save_model(model, text, initial)
        if is_main():
            if keeps:
                say(f"posttrain: the parts that are no text are those of {whole}")
                write_whole(text, whole, out_dir)
            LOG.write(out_dir, record)
            note_sizes(out_dir)
        del model
        release()
    wait()
    if is_main():
        if (events := out_dir / TRAINER / "runs").is_dir():  # tensorboard's
            shutil.copytree(events, out_dir.parent / "tensorboard", dirs_exist_ok=True)
        shutil.rmtree(out_dir / TRAINER, ignore_errors=True)


def _of_the_trainer(name: str) -> bool:
    return name.startswith(f"{TRAINER}/")


def _require_space(model: Model, out_dir: Path, more: int) -> None:
    # two checkpoints at once with Adam's two moments, and the result, in fp32
    needed = 4 * trained_parameters(model) * (2 * 3 + 1) + more
    require_space(out_dir, needed, "post-training", "lower expand.num_experts")
