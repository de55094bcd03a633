"""Supervised fine-tuning of a dense model or a MoE with TRL's SFTTrainer, resumable to the byte.

The only place that imports TRL.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from upcycle.console import say
from upcycle.data.chat import Sample
from upcycle.errors import UpcycleError
from upcycle.models.folders import load_model
from upcycle.models.mixture import load_tensors, mixture_of, save_mixture
from upcycle.models.routers import RouterRecorder
from upcycle.settings import PosttrainSettings, TrainingSettings
from upcycle.training.balance import load_balancing_loss, router_z_loss
from upcycle.training.callbacks import CheckpointSchedule, LoadMonitor, ShowProgress, StepBias, StripOlder
from upcycle.training.checkpoints import last_checkpoint
from upcycle.training.loss_free import LossFreeBias

NEVER = 10**9
NOT_REPRODUCED = ("runtime", "per_second", "flos", "num_tokens")


class UpcyclingTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that resumes a MoE with its experts, balances its routers per layer and stops at NaN."""

    def __init__(self, model: Any, balance: PosttrainSettings | None, **arguments: Any):
        self.balance = balance
        self.recorder = RouterRecorder(model) if balance else None
        self.load_monitor = LoadMonitor() if balance else None
        rate = balance.balance_bias_rate if balance else 0.0
        self.bias = LossFreeBias(model, rate) if rate else None
        super().__init__(model=model, **arguments)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """TRL's loss plus what keeps a MoE's routers balanced."""
        if self.recorder is None:
            return self._finite(super().compute_loss(model, inputs, return_outputs, **kwargs))
        self.recorder.clear()
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        # the language-model loss is already divided by the tokens of the whole step: so is this, by its parts
        return self._finite(loss + self._router_loss(inputs) / self.current_gradient_accumulation_steps)

    def _router_loss(self, inputs: Any) -> torch.Tensor:
        """`router_aux_loss_coef` times the per-layer load-balancing loss, and the z-loss; counts the load."""
        assert self.recorder is not None
        assert self.balance is not None
        assert self.load_monitor is not None
        logits, indices = self.recorder.logits, self.recorder.indices
        mask = inputs["attention_mask"].reshape(-1)
        self.load_monitor.add(indices, mask, logits[0].shape[-1])
        if self.bias:
            self.bias.add(indices, mask)
        balance, z_loss = load_balancing_loss(logits, indices, mask), router_z_loss(logits, mask)
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

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No card per checkpoint: the run's own says where a model comes from."""

    def _finite(self, loss: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(loss):
            self._stop_at("the loss is not finite")
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not all(torch.isfinite(p).all() for p in self.model.parameters() if p.requires_grad):
            self._stop_at("a weight is not finite")
        if self.bias:  # before the rest, which says that the checkpoint is complete
            self.bias.save(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A mixture of adapters is saved in its compact form."""
        if mixture_of(self.model):
            save_mixture(self.model, Path(output_dir or self.args.output_dir), "float32")
        else:
            super()._save(output_dir, state_dict)

    def _stop_at(self, problem: str) -> None:
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
        raise UpcycleError(
            f"{problem} at step {self.state.global_step} of {self.state.max_steps}; {kept}. "
            "Lower the learning rate, or look at the data around that step"
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load through from_pretrained, which maps the per-expert names on disk to the fused ones in memory.

        The stock method does not (transformers 5.23): it would go on from the initial experts.
        """
        target = model if model is not None else self.model
        if self.bias:
            self.bias.load(Path(resume_from_checkpoint))
        if mixture_of(target):
            load_tensors(target, Path(resume_from_checkpoint))
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(target, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        source = load_model(Path(resume_from_checkpoint), dtype=torch.float32)
        target.load_state_dict(source.state_dict(), strict=True)


def fine_tune(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    settings: TrainingSettings,
    out_dir: Path,
    seed: int,
    description: str,
    keep: int | None = None,
    balance: PosttrainSettings | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place; goes on from the last complete checkpoint in `out_dir` if there is one.

    Args:
        keep: how many checkpoints stay (None: all; only the newest keeps its optimizer state).
        balance: how a MoE's routers are balanced; None for a dense model.

    Returns:
        The Trainer's log without wall-clock figures: a list of {step, epoch, loss, ...}.

    Raises:
        UpcycleError: the loss or a weight is not finite, or the checkpoints would be less than a step apart.
    """
    bar = ShowProgress(description)
    trainer = UpcyclingTrainer(
        model=model,
        balance=balance,
        args=_arguments(settings, out_dir, seed, keep, balance.report_to if balance else "none"),
        train_dataset=Dataset.from_dict(
            {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]}
        ),
        processing_class=tokenizer,
        callbacks=[
            CheckpointSchedule(settings.epochs, settings.checkpoint_every),
            bar,
            StripOlder(),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.bias:
        trainer.add_callback(StepBias(trainer.bias))
    resume = last_checkpoint(out_dir)
    if resume:
        say(f"{description}: resuming from {resume.name}")
    with trainer.watching(), closing(bar):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return [_without_runtime(entry) for entry in trainer.state.log_history if "loss" in entry]


def training_record(samples: Sequence[Sample], settings: TrainingSettings, log: list[dict[str, Any]]) -> dict[str, Any]:
    """What a training stage saw, and its log."""
    return {
        "rows": len(samples),
        "tokens": round(settings.epochs * sum(len(s.input_ids) for s in samples)),
        "answer_tokens": round(settings.epochs * sum(s.num_answer_tokens for s in samples)),
        "steps": len(log),
        "log": log,
    }


def _without_runtime(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in sorted(entry.items()) if not any(part in k for part in NOT_REPRODUCED)}


def _arguments(settings: TrainingSettings, out_dir: Path, seed: int, keep: int | None, report_to: str) -> SFTConfig:
    accelerator = torch.accelerator.is_available()
    return SFTConfig(
        output_dir=str(out_dir),
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
        save_total_limit=keep,
        logging_steps=1,  # a longer window would start anew at a resume, and the log differ
        logging_nan_inf_filter=False,
        report_to=report_to,
        disable_tqdm=True,
        dataloader_pin_memory=accelerator,
    )
