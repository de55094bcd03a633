"""TRL's SFTTrainer for dense models and MoEs, for one process or several."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Sampler
from transformers import TrainerState
from trl import SFTTrainer

from upcycle.distributed.shards import OPTIMIZER, is_sharded, load_optimizer, local, reshard, save_optimizer
from upcycle.distributed.world import gathered, summed, wait, world_size
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import kind_of
from upcycle.experts.sharded import save_checkpoint
from upcycle.records.files import TRAINER_STATE, note_sizes
from upcycle.routing.batch import IGNORED
from upcycle.routing.load import shares
from upcycle.routing.routers import RouterRecorder, parts
from upcycle.training.balance import load_balancing_loss, router_z_loss
from upcycle.training.callbacks import LoadMonitor
from upcycle.training.checkpoints import last_checkpoint
from upcycle.training.loss_free import LossFreeBias
from upcycle.training.moments import put_moments, save_moments
from upcycle.training.packing import TOKEN_MASK
from upcycle.training.rows import EvenRows
from upcycle.training.step_load import StepLoad, count
from upcycle.training.training import Training
from upcycle.types import Model

Inputs = dict[str, torch.Tensor]
"""A batch, as the model takes it."""
ROUNDING = 1e-6
"""Of steps that are computed from shares of epochs."""


class UpcyclingTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that resumes a MoE with its experts, balances its routers per layer and stops at NaN."""

    def __init__(self, model: Model, training: Training, rows: int, **arguments: Any):
        """
        Args:
            rows: of the data, without one that fills up.
        """
        self.training = training
        self.rows = rows
        self.balance = balance = training.balance
        self.load_monitor = LoadMonitor() if balance else None
        self.step_load = StepLoad()
        arguments["args"].save_only_model = is_sharded(model)  # else refused: what is saved besides is ours
        super().__init__(model=model, **arguments)
        self.args.save_only_model = False
        # now the model is where it trains
        self.recorder = RouterRecorder(model) if balance else None
        rate = balance.balance_bias_rate if balance else 0.0
        self.bias = LossFreeBias(model, rate) if rate else None

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The part of the schedule that this training takes; each part has whole steps."""
        begin, end = self.training.span
        epochs = self.args.num_train_epochs / (end - begin)
        per_epoch = math.ceil(self.rows / self.training.settings.batch_size)
        skipped, left = (math.ceil(share * epochs * per_epoch - ROUNDING) for share in (begin, 1 - end))
        scheduler: LambdaLR = super().create_scheduler(skipped + num_training_steps + left, optimizer)
        if skipped:
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
        mask = inputs.pop(TOKEN_MASK) if TOKEN_MASK in inputs else _token_mask(inputs)
        if self.recorder is not None:
            self.recorder.clear()
        if self.recorder is None or not self.model.training:
            return self._finite(super().compute_loss(model, inputs, return_outputs, **kwargs))
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        # the language-model loss is already divided by the tokens of the whole step: so is this, by its parts
        return self._finite(loss + self._router_loss(mask.reshape(-1)) / self.current_gradient_accumulation_steps)

    def _router_loss(self, mask: Int[torch.Tensor, " T"]) -> torch.Tensor:
        """`router_aux_loss_coef` times the per-layer load-balancing loss, and the z-loss; counts the load."""
        assert self.recorder is not None
        assert self.balance is not None
        assert self.load_monitor is not None
        logits = self.recorder.logits
        routed = count(self.recorder.indices, mask, logits[0].shape[-1])
        self.load_monitor.add(routed.everywhere)
        if self.bias:
            self.bias.add(routed.everywhere)
        group = self.recorder.granularity if self.balance.balance_over == "experts" else 1
        if self.balance.balance_scope == "step":
            share, num_tokens = self.step_load.add(routed, self.accelerator.sync_gradients), routed.num_tokens
        else:
            share, num_tokens = shares(routed.own), None
        balance = load_balancing_loss(logits, share, mask, group, num_tokens)
        z_loss = router_z_loss(logits, mask, num_tokens)
        self._metrics["train"]["balance_loss"].append(balance.item())
        self._metrics["train"]["router_z_loss"].append(z_loss.item())
        return self.balance.router_aux_loss_coef * balance + self.balance.router_z_loss_coef * z_loss

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """Afterwards a sharded model is as a training step leaves it."""
        found: dict[str, float] = super().evaluate(*arguments, **named)
        reshard(self.model)
        return found

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
        if world_size() > 1:
            self._average_over_processes("balance_loss", "router_z_loss")
        added = {"language_loss": logs["loss"] - self._added_loss(), **self.load_monitor.take()}
        super().log(logs | added, start_time)
        self.state.log_history[-1]["load"] = self.load_monitor.load

    def _added_loss(self) -> float:
        """What the routers added to the loss of the step that is logged."""
        assert self.balance is not None
        balance, z_loss = (fmean(self._metrics["train"][name]) for name in ("balance_loss", "router_z_loss"))
        return self.balance.router_aux_loss_coef * balance + self.balance.router_z_loss_coef * z_loss

    def _average_over_processes(self, *names: str) -> None:
        metrics = self._metrics["train"]
        own = torch.tensor([fmean(metrics[name]) for name in names], device=self.args.device)
        for name, total in zip(names, summed(own).tolist(), strict=True):
            metrics[name] = [total / world_size()]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        """Where processes would get unequal numbers of rows, some are given rows that count nothing."""
        if world_size() == 1:
            sampler: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return sampler
        return EvenRows(self.rows, self.args.train_batch_size * world_size(), self.args.data_seed)

    def create_model_card(self, *_: object, **__: object) -> None:
        """No card per checkpoint: the run's own says where a model comes from."""

    def _finite(self, loss: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(loss):
            self._stop_at("the loss is not finite")
        return loss

    def _save_checkpoint(self, model: Model, trial: object) -> None:
        if not all(gathered(all(torch.isfinite(local(p)).all() for p in self.model.parameters() if p.requires_grad))):
            self._stop_at("a weight is not finite")
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and self.training.moments_to and self.state.global_step == self.state.max_steps:
            save_moments(self.model, self.optimizer, self.training.moments_to, self._save)
        if self.args.should_save and self.bias:
            self.bias.save(folder)
        super()._save_checkpoint(model, trial)
        wait()  # every process has files of its own there
        if self.args.should_save:
            note_sizes(folder)

    def _save(self, output_dir: str | None = None, state_dict: Inputs | None = None) -> None:
        """As the kind of experts wants it."""
        save = kind_of(self.model).save_checkpoint
        if save is None and is_sharded(self.model):
            save_checkpoint(self.model, Path(output_dir or self.args.output_dir))
        elif save is None:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save(self.model, Path(output_dir or self.args.output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Of a sharded model each process writes its part."""
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_optimizer(self.model, self.optimizer.optimizer, Path(output_dir) / OPTIMIZER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.model, self.optimizer.optimizer, Path(checkpoint) / OPTIMIZER)
        with warnings.catch_warnings():  # it is asked to step before the optimizer, which has stepped as often already
            warnings.simplefilter("ignore")
            self.lr_scheduler.step(self.state.global_step)

    def _stop_at(self, problem: str) -> None:
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written"
        raise UpcycleError(
            f"{problem} at step {self.state.global_step} of {self.state.max_steps}; {kept}. "
            "Lower the learning rate, or look at the data around that step"
        )

    def take_finished(self, checkpoint: Path) -> bool:
        """Take the weights and the log of a checkpoint that is the last of its training; False for any other.

        The stock Trainer (transformers 5.23) trains a step more where the last epoch is not a whole one.
        """
        state = TrainerState.load_from_json(str(TRAINER_STATE.of(checkpoint)))
        if state.global_step < state.max_steps:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Model | None = None) -> None:
        """The stock method (transformers 5.23) would go on from a MoE's initial experts."""
        target = model if model is not None else self.model
        if self.bias:
            self.bias.load(Path(resume_from_checkpoint))
        resume = kind_of(target).resume
        if resume is None:
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


def _token_mask(inputs: Inputs) -> torch.Tensor:
    """1 for the tokens of a row that has an answer; a row that fills up a batch has none."""
    return inputs["attention_mask"] * (inputs["labels"] != IGNORED).any(dim=1, keepdim=True)
