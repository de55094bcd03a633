"""Supervised fine-tuning of a dense model or a MoE with TRL's SFTTrainer, resumable to the byte.

The only place that imports TRL.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from upcycle.console import say
from upcycle.data.chat import Sample
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import kind_of
from upcycle.records.files import note_sizes
from upcycle.records.training import TrainingRecord, log_entry
from upcycle.routing.routers import RouterRecorder, parts
from upcycle.settings import PosttrainSettings, TrainingSettings
from upcycle.training.balance import load_balancing_loss, router_z_loss
from upcycle.training.callbacks import CheckpointSchedule, LoadMonitor, ShowProgress, StepBias, StripOlder
from upcycle.training.checkpoints import last_checkpoint, leave_newest
from upcycle.training.loss_free import LossFreeBias
from upcycle.training.moments import Moments, put_moments, save_moments
from upcycle.training.packing import TOKEN_MASK, SideBySide, can_pack
from upcycle.types import Model, Tokenizer

NEVER = 10**9
Inputs = dict[str, torch.Tensor]
"""A batch, as the model takes it."""


class UpcyclingTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that resumes a MoE with its experts, balances its routers per layer and stops at NaN."""

    def __init__(self, model: Model, training: "Training", **arguments: Any):
        self.training = training
        self.balance = balance = training.balance
        self.recorder = RouterRecorder(model) if balance else None
        self.load_monitor = LoadMonitor() if balance else None
        rate = balance.balance_bias_rate if balance else 0.0
        self.bias = LossFreeBias(model, rate) if rate else None
        super().__init__(model=model, **arguments)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The part of the schedule that this training takes."""
        begin, end = self.training.span
        steps = round(num_training_steps / (end - begin))
        scheduler: LambdaLR = super().create_scheduler(steps, optimizer)
        if skipped := round(begin * steps):
            rate = scheduler.lr_lambdas[0]
            scheduler = LambdaLR(scheduler.optimizer, lambda step: rate(step + skipped))
        self.lr_scheduler = scheduler
        return scheduler

    def create_optimizer(self, model: Model | None = None) -> Optimizer:
        """With a learning rate for each part of a MoE, and the moments to begin with."""
        optimizer: Optimizer = super().create_optimizer(model)
        if self.balance:
            optimizer.param_groups[:] = list(_by_part(self.model, optimizer.param_groups, self.balance.rates))
        if self.training.moments:
            put_moments(self.model, optimizer, self.training.moments())
        return optimizer

    def compute_loss(self, model: Model, inputs: Inputs, return_outputs: bool = False, **kwargs: Any) -> torch.Tensor:
        """TRL's loss plus what keeps a MoE's routers balanced."""
        mask = inputs.pop(TOKEN_MASK) if TOKEN_MASK in inputs else inputs["attention_mask"]
        if self.recorder is None:
            return self._finite(super().compute_loss(model, inputs, return_outputs, **kwargs))
        self.recorder.clear()
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        # the language-model loss is already divided by the tokens of the whole step: so is this, by its parts
        return self._finite(loss + self._router_loss(mask.reshape(-1)) / self.current_gradient_accumulation_steps)

    def _router_loss(self, mask: Int[torch.Tensor, " T"]) -> torch.Tensor:
        """`router_aux_loss_coef` times the per-layer load-balancing loss, and the z-loss; counts the load."""
        assert self.recorder is not None
        assert self.balance is not None
        assert self.load_monitor is not None
        logits, indices = self.recorder.logits, self.recorder.indices
        self.load_monitor.add(indices, mask, logits[0].shape[-1])
        if self.bias:
            self.bias.add(indices, mask)
        group = self.recorder.granularity if self.balance.balance_over == "experts" else 1
        balance, z_loss = load_balancing_loss(logits, indices, mask, group), router_z_loss(logits, mask)
        self._metrics["train"]["balance_loss"].append(balance.item())
        self._metrics["train"]["router_z_loss"].append(z_loss.item())
        return self.balance.router_aux_loss_coef * balance + self.balance.router_z_loss_coef * z_loss

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The routers' hooks, around the training: the bias first, so that what it chooses is what is recorded."""
        with self.bias or nullcontext(), self.recorder or nullcontext():
            yield

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the routers' load to what the Trainer logs; that of each layer to its history alone, being no scalar."""
        if self.load_monitor is None or "loss" not in logs:
            super().log(logs, start_time)
            return
        super().log(logs | self.load_monitor.take(), start_time)
        self.state.log_history[-1]["load"] = self.load_monitor.load

    def create_model_card(self, *_: object, **__: object) -> None:
        """No card per checkpoint: the run's own says where a model comes from."""

    def _finite(self, loss: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(loss):
            self._stop_at("the loss is not finite")
        return loss

    def _save_checkpoint(self, model: Model, trial: object) -> None:
        if not all(torch.isfinite(p).all() for p in self.model.parameters() if p.requires_grad):
            self._stop_at("a weight is not finite")
        if self.training.moments_to and self.state.global_step == self.state.max_steps:
            save_moments(self.model, self.optimizer, self.training.moments_to, self._save)
        if self.bias:
            self.bias.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            note_sizes(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _save(self, output_dir: str | None = None, state_dict: Inputs | None = None) -> None:
        """As the kind of experts wants it."""
        save = kind_of(self.model).save_checkpoint
        if save is None:
            super()._save(output_dir, state_dict)
        else:
            save(self.model, Path(output_dir or self.args.output_dir))

    def _stop_at(self, problem: str) -> None:
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
        raise UpcycleError(
            f"{problem} at step {self.state.global_step} of {self.state.max_steps}; {kept}. "
            "Lower the learning rate, or look at the data around that step"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Model | None = None) -> None:
        """The stock method (transformers 5.23) would go on from a MoE's initial experts."""
        target = model if model is not None else self.model
        if self.bias:
            self.bias.load(Path(resume_from_checkpoint))
        resume = kind_of(target).resume
        if resume is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            resume(target, Path(resume_from_checkpoint))


def _by_part(model: Model, groups: Sequence[dict[str, Any]], rates: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """The optimizer's groups, each divided by the rates of the MoE's parts."""
    part_of = {id(parameter): part for part, parameter in parts(model)}
    for group in groups:
        for rate in dict.fromkeys(rates.values()):
            chosen = [p for p in group["params"] if rates[part_of[id(p)]] == rate]
            if chosen:
                yield {**group, "params": chosen, "lr": rate * group["lr"]}


@dataclass(frozen=True)
class Training:
    """How a model is trained, and where its checkpoints go."""

    settings: TrainingSettings
    seed: int
    title: str
    """What progress is called."""
    out_dir: Path
    newest_alone: bool = False
    """Whether older checkpoints go, or stay without their optimizer state."""
    balance: PosttrainSettings | None = None
    """How a MoE's routers are balanced; None for a dense model."""
    span: tuple[float, float] = (0.0, 1.0)
    """From where to where on the learning-rate schedule, of which the whole is 1."""
    moments: Callable[[], Moments] | None = None
    """Makes the optimizer state to begin with; None: a fresh one."""
    moments_to: Path | None = None
    """Where the optimizer's moments at the end are kept."""


def fine_tune(model: Model, tokenizer: Tokenizer, samples: Sequence[Sample], training: Training) -> TrainingRecord:
    """Train `model` in place; goes on from the last complete checkpoint if there is one.

    Returns:
        What was trained on, and the Trainer's log without wall-clock figures.

    Raises:
        UpcycleError: the loss or a weight is not finite, or the checkpoints would be less than a step apart.
    """
    settings, bar = training.settings, ShowProgress(training.title)
    resume = last_checkpoint(training.out_dir)
    if resume:
        say(f"{training.title}: resuming from {resume.name}")
        training = replace(training, moments=None)  # the checkpoint has its own
    schedule = CheckpointSchedule(settings.epochs, settings.checkpoint_every)
    trainer = UpcyclingTrainer(
        model=model,
        training=training,
        args=_arguments(training),
        train_dataset=Dataset.from_dict(
            {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]}
        ),
        processing_class=tokenizer,
        data_collator=SideBySide(tokenizer.pad_token_id) if settings.pack_rows and can_pack(model) else None,
        callbacks=[schedule, bar, StripOlder(training.newest_alone)],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.bias:
        trainer.add_callback(StepBias(trainer.bias))
    with trainer.watching(), closing(bar):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if training.newest_alone:
        leave_newest(training.out_dir)
    log = [log_entry(entry) for entry in trainer.state.log_history if "loss" in entry]
    return TrainingRecord(
        rows=len(samples),
        tokens=round(settings.epochs * sum(len(s.input_ids) for s in samples)),
        answer_tokens=round(settings.epochs * sum(s.num_answer_tokens for s in samples)),
        steps=len(log),
        log=log,
    )


def _arguments(training: Training) -> SFTConfig:
    settings, seed = training.settings, training.seed
    accelerator = torch.accelerator.is_available()
    return SFTConfig(
        output_dir=str(training.out_dir),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.batch_size // settings.micro_batch_size,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        activation_checkpointing=settings.gradient_checkpointing,
        bf16=accelerator,
        seed=seed,
        data_seed=seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,  # ours is per layer
        save_strategy="steps",
        save_steps=NEVER,  # CheckpointSchedule decides
        logging_steps=1,  # a longer window would start anew at a resume, and the log differ
        logging_nan_inf_filter=False,
        report_to=training.balance.report_to if training.balance else "none",
        disable_tqdm=True,
        dataloader_pin_memory=accelerator,
    )
