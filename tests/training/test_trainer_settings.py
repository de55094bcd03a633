"""What a recipe passes on to TRL's SFTConfig, and that experts multiply in autocast's dtype."""

from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from trl import SFTConfig

from upcycle.data.splits import load_splits
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import load_for_training, load_model
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import Recipe, parse_recipe
from upcycle.records.files import LOG, POSTTRAIN, PREPARE
from upcycle.settings import OWNED, DevicesSettings, PosttrainSettings, TrainingSettings
from upcycle.training.fine_tune import classes_kept, fine_tune, per_process
from upcycle.training.trainer import UpcyclingTrainer
from upcycle.training.trainer_settings import check, config
from upcycle.training.training import Training
from upcycle.weights.base import load_tokenizer
from worlds import assembled, make_adapter, mixture


def settings(**trainer: Any) -> TrainingSettings:
    return TrainingSettings(epochs=1, checkpoint_every=1, batch_size=8, micro_batch_size=8, trainer=trainer)


def test_every_name_that_is_ours_is_one_of_trls() -> None:
    assert set(OWNED) - {field.name for field in fields(SFTConfig)} == set()


def test_a_tracker_that_is_not_installed_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upcycle.training.trainer_settings.integrations.is_wandb_available", lambda: False)
    said = "posttrain.report_to is wandb, but the package wandb is not installed; `pip install wandb`, or leave"
    with pytest.raises(UpcycleError, match=said):
        check(POSTTRAIN, PosttrainSettings(report_to="wandb"))
    monkeypatch.setattr("upcycle.training.trainer_settings.integrations.is_wandb_available", lambda: True)
    check(POSTTRAIN, PosttrainSettings(report_to="wandb"))


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"max_grad_nrm": 1.0}, "posttrain.trainer.max_grad_nrm: TRL's SFTConfig has no such setting; did you mean"),
        (
            {"max_grad_norm": "large"},
            r"posttrain.trainer.max_grad_norm: expected a number \(found 'large'\)",
        ),
        ({"dataloader_num_workers": 1.5}, "posttrain.trainer.dataloader_num_workers: expected a whole number"),
        ({"optim": "adamw_16bit"}, "posttrain.trainer: .*adamw_16bit.*is not a valid OptimizerNames"),
        ({"optim": "adamw_8bit"}, "posttrain.trainer: .*bitsandbytes"),
        ({"model_init_kwargs": {"dtype": "float16"}}, "model_init_kwargs.dtype is not for a recipe"),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": True}},
            "posttrain.trainer.activation_checkpointing_kwargs.use_reentrant is true, with which routers get no",
        ),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "gradient_checkpointing_kwargs.use_reentrant"),
        ({"activation_offloading": True}, "activation_offloading is for an accelerator, and there is none"),
        ({"eval_strategy": "epoch"}, "eval_strategy is epoch, but .* a resume would lose; set eval_strategy: steps"),
    ],
)
def test_what_trl_would_not_take_is_said_before_anything_runs(trainer: dict[str, Any], expected: str) -> None:
    with pytest.raises(UpcycleError, match=expected):
        check(POSTTRAIN, settings(**trainer))


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("enable_jit_checkpoint", "upcycle decides it"),
        ("learning_rate", "set learning_rate"),
        ("packing", "set pack_rows"),
        ("bf16", "training computes in bf16 on"),
    ],
)
def test_what_a_setting_says_already_is_refused_by_name(name: str, instead: str, tiny_recipe: dict[str, Any]) -> None:
    tiny_recipe["prepare"] = {**tiny_recipe["prepare"], "trainer": {name: 1}}
    with pytest.raises(UpcycleError, match=f"prepare.trainer: {name} is not for SFTConfig here; {instead}"):
        parse_recipe(tiny_recipe, "test")


def test_it_arrives_and_ours_stays() -> None:
    given = {"optim": "adafactor", "max_grad_norm": 0.5, "adam_beta2": 0.95, "prediction_loss_only": False}
    made = config(settings(**given), "unused", 3, 2, "none")
    assert (made.optim, made.max_grad_norm, made.adam_beta2) == ("adafactor", 0.5, 0.95)
    assert not made.prediction_loss_only
    assert (made.seed, made.gradient_accumulation_steps, made.learning_rate) == (3, 2, 2e-5)


def test_of_several_gpus_one_process_uses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer would make it a DataParallel, with a batch of all of them."""
    setup = TrainingArguments._setup_devices.func

    def eight(self: TrainingArguments) -> torch.device:
        device: torch.device = setup(self)
        self._n_gpu = 8
        return device

    patched = cached_property(eight)
    patched.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", patched)
    assert SFTConfig(output_dir="unused", bf16=False, activation_checkpointing=False).n_gpu == 8
    assert config(settings(), "unused", 0, 1, "none").n_gpu == 1


def test_a_whole_run_with_another_optimizer_attention_and_evaluation(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, str]] = []
    create = UpcyclingTrainer.create_optimizer

    def spied(self: UpcyclingTrainer, model: Any = None) -> Any:
        optimizer = create(self, model)
        used.append((type(optimizer).__name__, self.model.config._attn_implementation))
        return optimizer

    monkeypatch.setattr(UpcyclingTrainer, "create_optimizer", spied)
    more = {
        "optim": "adafactor",
        "eval_strategy": "steps",
        "eval_steps": 0.5,
        "per_device_eval_batch_size": 64,
        "model_init_kwargs": {"attn_implementation": "eager"},
    }
    tiny_recipe["posttrain"] = {**tiny_recipe["posttrain"], "epochs": 2, "trainer": more}
    run = Run(parse_recipe(tiny_recipe, "test"), tmp_path / "run")
    run_stages(run, (PREPARE, "expand", "assemble", "route", POSTTRAIN))
    assert used == [("AdamW", "sdpa"), ("Adafactor", "eager")]
    record = LOG.read(run.folder / POSTTRAIN)
    assert [found.epoch for found in record.evaluations or ()] == [1.0, 2.0]
    own = fine_tune(  # the held-out rows alone, at a rate that changes nothing: the same loss
        load_model(run.folder / POSTTRAIN, torch.float32).train(),
        run.base.tokenizer,
        run.splits.validation,
        Training(
            settings().model_copy(update={"learning_rate": 1e-12, "batch_size": 64, "micro_batch_size": 64}),
            0,
            "",
            tmp_path / "one",
        ),
    )
    assert (record.evaluations or ())[-1].loss == pytest.approx(own.log[0].loss, rel=1e-4)


@pytest.mark.parametrize("kind", ["plain", "mixture"])
def test_experts_multiply_in_autocasts_dtype_and_learn_in_fp32(
    kind: str, base: Path, checkpoints: list[Path], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has no autocast rule for grouped products: transformers would multiply fp32 by fp32."""
    if kind == "plain":
        folder = assembled(base, checkpoints, tmp_path / "moe")
    else:
        folder = mixture(base, [make_adapter(base, tmp_path / str(i), i) for i in (1, 2)], tmp_path / "moe")
    model = load_for_training(folder, base, False, "none", DevicesSettings())
    seen = []
    product = torch.nn.functional.grouped_mm

    def spied(left: torch.Tensor, right: torch.Tensor, **more: Any) -> torch.Tensor:
        seen.append((left.dtype, right.dtype))
        return product(left, right, **more)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", spied)
    samples = load_splits(recipe, load_tokenizer(base, None), 128).train[:8]
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(s.input_ids) for s in samples], batch_first=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=rows, labels=rows).loss.backward()
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "experts" in name]
    assert seen
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert trained
    assert {(p.dtype, p.grad.dtype) for p in trained if p.grad is not None} == {(torch.float32, torch.float32)}
    seen.clear()
    model(input_ids=rows)
    assert set(seen) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [(16, 4, 1, 4), (16, 4, 2, 4), (16, 4, 8, 2), (24, 16, 2, 12), (6, 4, 2, 3)],
)
def test_batch_size_is_that_of_all_processes(batch: int, micro: int, processes: int, expected: int) -> None:
    given = TrainingSettings().model_copy(update={"batch_size": batch, "micro_batch_size": micro})
    found = per_process(given, processes)
    assert found.micro_batch_size == expected
    assert found.batch_size == batch


def test_classes_that_a_training_replaces_are_put_back(tmp_path: Path, base: Path, checkpoints: list[Path]) -> None:
    """Liger's do, in the Python module of the model: models on a CPU could not use them afterwards."""
    from transformers.models.mixtral import modeling_mixtral

    before = modeling_mixtral.MixtralRMSNorm, modeling_mixtral.apply_rotary_pos_emb
    model = load_model(assembled(base, checkpoints, tmp_path / "moe"), torch.float32)
    with classes_kept(model):
        modeling_mixtral.MixtralRMSNorm = modeling_mixtral.apply_rotary_pos_emb = None
    assert (modeling_mixtral.MixtralRMSNorm, modeling_mixtral.apply_rotary_pos_emb) == before


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"lr_scheduler": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "min_lr"),
        ({"trainer": {"lr_scheduler_kwargs": {"num_cycle": 1}}}, "num_cycle"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_said_before_anything_runs(changes: dict[str, Any], missing: str) -> None:
    with pytest.raises(UpcycleError, match=rf"posttrain\.trainer: .*{missing}"):
        check(POSTTRAIN, PosttrainSettings(**changes))


def test_a_constant_rate_has_the_warm_up_that_is_asked_for() -> None:
    def scheduler(warmup: float) -> str:
        made = PosttrainSettings(lr_scheduler="constant", warmup_fraction=warmup)
        return str(config(made, "unused", 0, 1, "none").lr_scheduler_type.value)

    assert scheduler(0.1) == "constant_with_warmup"
    assert scheduler(0.0) == "constant"
