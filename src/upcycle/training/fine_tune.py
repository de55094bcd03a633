"""Supervised fine-tuning of a dense model or a MoE with TRL's SFTTrainer, resumable to the byte."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

from datasets import Dataset, concatenate_datasets
from transformers import PrinterCallback

from upcycle.console import say
from upcycle.data.chat import Sample
from upcycle.data.samples import dataset, lengths, num_answer_tokens
from upcycle.distributed.device import idle_devices
from upcycle.distributed.heap import kept_heap
from upcycle.distributed.shards import check_resumable, is_sharded
from upcycle.distributed.world import is_main, on_main, wait, world_size
from upcycle.errors import UpcycleError
from upcycle.records.training import Evaluation, TrainingRecord, log_entry
from upcycle.settings import TrainingSettings
from upcycle.training.callbacks import CheckpointSchedule, ShowProgress, StepBias, StripOlder
from upcycle.training.checkpoints import last_checkpoint, leave_newest
from upcycle.training.packing import SideBySide, can_pack
from upcycle.training.rows import EMPTY
from upcycle.training.trainer import UpcyclingTrainer
from upcycle.training.trainer_settings import attention, config
from upcycle.training.training import Training
from upcycle.types import Model, Tokenizer


def fine_tune(
    model: Model,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    training: Training,
    validation: Sequence[Sample] = (),
) -> TrainingRecord:
    """Train `model` in place; goes on from the last complete checkpoint if there is one. All processes come.

    Args:
        validation: rows for an evaluation while training, if `trainer.eval_strategy` asks for one.

    Returns:
        What was trained on, and the Trainer's log without wall-clock figures.

    Raises:
        UpcycleError: the loss or a weight is not finite, the checkpoints would be less than a step apart, or the rows
            of a step cannot be divided among the processes.
    """
    settings, bar = per_process(training.settings, world_size()), ShowProgress(training.title)
    training = replace(training, settings=settings)
    resume = on_main(lambda: last_checkpoint(training.out_dir))  # it removes what is half written
    if idle := idle_devices():
        command = f"torchrun --nproc-per-node {idle + 1} -m upcycle run RECIPE --out FOLDER"
        say(f"{training.title}: one of {idle + 1} devices is used; to use all of them: {command}")
    if resume:
        check_resumable(resume, is_sharded(model))
        say(f"{training.title}: resuming from {resume.name}")
        training = replace(training, moments=None)  # the checkpoint has its own
    if wanted := attention(settings):
        model.set_attn_implementation(wanted)
    uneven = len(samples) % (settings.micro_batch_size * world_size()) > 0
    schedule = CheckpointSchedule(settings.epochs, settings.checkpoint_every, training.newest_alone)
    with classes_kept(model):
        trainer = UpcyclingTrainer(
            model=model,
            training=training,
            rows=len(samples),
            args=config(
                settings,
                str(training.out_dir),
                training.seed,
                settings.batch_size // (settings.micro_batch_size * world_size()),
                training.balance.report_to if training.balance else "none",
            ),
            train_dataset=_dataset(samples, with_empty=world_size() > 1 and uneven),
            eval_dataset=_dataset(validation) if "eval_strategy" in settings.trainer else None,
            processing_class=tokenizer,
            data_collator=SideBySide(tokenizer.pad_token_id) if settings.pack_rows and can_pack(model) else None,
            callbacks=[schedule, bar, StripOlder(training.newest_alone)],
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.bias:
            trainer.add_callback(StepBias(trainer.bias))
        with trainer.watching(), closing(bar), kept_heap():
            if resume is None or not trainer.take_finished(resume):
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if (done := trainer.state.global_step) < (wanted_steps := trainer.state.max_steps):
            raise UpcycleError(f"{training.title}: ended at step {done} of {wanted_steps}; the same command continues")
        if training.newest_alone and is_main():
            leave_newest(training.out_dir)
        wait()
    epochs = _epochs_of(trainer.state.global_step, len(samples), training.settings.batch_size)
    log = [log_entry(entry) for entry in trainer.state.log_history if "loss" in entry]
    return TrainingRecord(
        rows=len(samples),
        tokens=round(epochs * sum(lengths(samples))),
        answer_tokens=round(epochs * num_answer_tokens(samples)),
        steps=len(log),
        log=log,
        evaluations=[Evaluation.of(entry) for entry in trainer.state.log_history if "eval_loss" in entry] or None,
    )


def _epochs_of(steps: int, rows: int, batch_size: int) -> float:
    """Those of whole steps: of a last epoch that is not whole, a little more than was asked for."""
    whole, rest = divmod(steps, -(-rows // batch_size))
    return whole + min(rows, rest * batch_size) / rows


@contextmanager
def classes_kept(model: Model) -> Iterator[None]:
    """Liger's kernels replace classes of a model's Python modules, for all models to come; here they are put back."""
    names = {type(part).__module__ for part in model.modules()}
    before = {name: dict(vars(sys.modules[name])) for name in names if name.startswith("transformers.models.")}
    try:
        yield
    finally:
        for name, values in before.items():
            vars(sys.modules[name]).update(values)


def per_process(settings: TrainingSettings, processes: int) -> TrainingSettings:
    """With the largest micro-batch that divides what one process has of a step, and is not above the one asked for.

    Raises:
        UpcycleError: the rows of a step cannot be divided evenly.
    """
    if uneven := settings.uneven(processes):
        raise UpcycleError(uneven)
    micro = settings.micro_batch(processes)
    if micro != settings.micro_batch_size:
        say(f"micro_batch_size is {micro} in each of {processes} processes: batch_size={settings.batch_size} is global")
    return settings.model_copy(update={"micro_batch_size": micro})


def _dataset(samples: Sequence[Sample], with_empty: bool = False) -> Dataset:
    found: Dataset = dataset(samples, list(EMPTY))
    return concatenate_datasets([found, Dataset.from_list([EMPTY], features=found.features)]) if with_empty else found
