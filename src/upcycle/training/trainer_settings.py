"""What goes to TRL's SFTConfig: our own settings in its names, and what a recipe's `trainer` adds."""

import typing
from dataclasses import fields
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from transformers import Trainer, get_scheduler, integrations
from trl import SFTConfig

from upcycle.errors import UpcycleError, expected, nearest
from upcycle.reading import brief
from upcycle.settings import TrainingSettings

NEVER = 10**9
ATTENTION = "attn_implementation"


def config(settings: TrainingSettings, out_dir: str, seed: int, accumulation: int, report_to: str) -> SFTConfig:
    """The Trainer's arguments.

    Args:
        accumulation: micro-batches of this process in a step.
    """
    accelerator = torch.accelerator.is_available()
    made = SFTConfig(
        output_dir=out_dir,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type=_scheduler(settings),
        warmup_steps=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        activation_checkpointing=settings.gradient_checkpointing,
        bf16=accelerator,
        use_cpu=not accelerator,
        seed=seed,
        data_seed=seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        router_aux_loss_coef=0.0,  # ours is per layer
        save_strategy="steps",
        save_steps=NEVER,  # CheckpointSchedule decides
        logging_steps=1,  # a longer window would start anew at a resume, and the log differ
        logging_nan_inf_filter=False,
        report_to=report_to,
        disable_tqdm=True,
        **_defaults(accelerator) | _without_attention(settings.trainer),
    )
    made._n_gpu = min(1, made.n_gpu)  # one process uses one; more would be DataParallel, with another batch
    return made


def _scheduler(settings: TrainingSettings) -> str:
    """transformers' `constant` leaves the warm-up out."""
    warms_up = settings.lr_scheduler == "constant" and settings.warmup_fraction > 0
    return "constant_with_warmup" if warms_up else settings.lr_scheduler


def _defaults(accelerator: bool) -> dict[str, Any]:
    """What a recipe's `trainer` may say otherwise."""
    return {
        "dataloader_pin_memory": accelerator,
        "prediction_loss_only": True,
        "per_device_eval_batch_size": 1,  # the mean over rows, as `evaluate` scores; else it is that of batches' means
        "ddp_find_unused_parameters": False,  # experts lie in one tensor, which always takes part
    }


def attention(settings: TrainingSettings) -> str | None:
    """The implementation of attention that is asked for; None: transformers' choice."""
    return (settings.trainer.get("model_init_kwargs") or {}).get(ATTENTION)


def _without_attention(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "model_init_kwargs"}


def check(section: str, settings: TrainingSettings) -> None:
    """Everything that can be known of `trainer` and of the tracker before anything is trained.

    Raises:
        UpcycleError: SFTConfig has no such field, the value is of another type, or a package is missing.
    """
    _check_tracker(section, getattr(settings, "report_to", "none"))
    hints = typing.get_type_hints(SFTConfig)
    names = {field.name for field in fields(SFTConfig) if field.init}
    for name, value in settings.trainer.items():
        where = f"{section}.trainer.{name}"
        if name not in names:
            raise UpcycleError(f"{where}: TRL's SFTConfig has no such setting{nearest(name, sorted(names))}")
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise UpcycleError(f"{where}: {expected(error.errors()[0])} (found {brief(value)})") from None
    if settings.trainer.get("eval_strategy") == "epoch":
        raise UpcycleError(
            f"{section}.trainer.eval_strategy is epoch, but a checkpoint at an epoch's end is saved before its "
            "evaluation, which a resume would lose; set eval_strategy: steps, and eval_steps"
        )
    _check_checkpointing(section, settings)
    _check_model_kwargs(section, settings)
    try:
        made = config(settings, "unused", 0, 1, "none")
        if not {"galore", "apollo", "lomo"} & set(str(made.optim).replace("OptimizerNames.", "").lower().split("_")):
            Trainer.get_optimizer_cls_and_kwargs(made)  # the others want the model
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        kwargs = made.lr_scheduler_kwargs
        get_scheduler(made.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=kwargs)
    except (ValueError, ImportError, TypeError) as error:
        raise UpcycleError(f"{section}.trainer: {str(error).strip()}") from None


def _check_tracker(section: str, name: str) -> None:
    """Raises UpcycleError if the Trainer would not find it."""
    if name != "none" and not getattr(integrations, f"is_{name}_available")():
        raise UpcycleError(
            f"{section}.report_to is {name}, but the package {name} is not installed; `pip install {name}`, or leave "
            "the setting out"
        )


def _check_checkpointing(section: str, settings: TrainingSettings) -> None:
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if (settings.trainer.get(name) or {}).get("use_reentrant"):
            raise UpcycleError(
                f"{section}.trainer.{name}.use_reentrant is true, with which routers get no gradient of the balance "
                "loss; leave it out"
            )
    if settings.trainer.get("activation_offloading") and not torch.accelerator.is_available():
        raise UpcycleError(f"{section}.trainer.activation_offloading is for an accelerator, and there is none here")


def _check_model_kwargs(section: str, settings: TrainingSettings) -> None:
    given = settings.trainer.get("model_init_kwargs") or {}
    if odd := sorted(set(given) - {ATTENTION}):
        raise UpcycleError(
            f"{section}.trainer.model_init_kwargs.{odd[0]} is not for a recipe: models are loaded in the dtype and on "
            f"the device that they train in; only {ATTENTION} can be set"
        )
