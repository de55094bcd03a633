"""What a training saw, step by step."""

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import ConfigDict, Field, model_serializer

from upcycle.records.record import Count, Record, optional

PER_STEP = ("runtime", "per_second", "flos", "num_tokens")
"""Figures of the Trainer's that a resumed training does not repeat."""


class LogEntry(Record):
    """A step. Besides the fields below, any scalar that the Trainer logs, under the Trainer's name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    step: Count
    epoch: float
    loss: float
    """What is minimised, with what keeps routers balanced."""
    language_loss: float | None = optional()
    """Of a MoE, without that."""
    learning_rate: float | None = optional()
    balance_loss: float | None = optional()
    """Per-layer load-balancing loss of a MoE; 1 when balanced."""
    max_load: float | None = optional()
    min_load: float | None = optional()
    load: list[list[float]] | None = optional()
    """(layers, experts) of a MoE; 1 for each expert when balanced."""

    @model_serializer(mode="wrap")
    def _in_order_of_names(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return dict(sorted(handler(self).items()))


class Evaluation(Record):
    """Of the held-out rows while training."""

    step: Count
    epoch: float
    loss: float

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Evaluation":
        """From what the Trainer logs."""
        return cls(step=entry["step"], epoch=entry["epoch"], loss=entry["eval_loss"])


class TrainingRecord(Record):
    """What a training stage saw, and its log."""

    rows: Count
    tokens: Count
    """Over all epochs, padding left out."""
    answer_tokens: Count
    steps: Count
    log: list[LogEntry]
    evaluations: list[Evaluation] | None = optional()

    @classmethod
    def of_all(cls, records: Sequence["TrainingRecord"]) -> "TrainingRecord":
        """Several trainings, one after the other."""
        totals = {name: sum(getattr(r, name) for r in records) for name in ("rows", "tokens", "answer_tokens", "steps")}
        evaluations = [entry for record in records for entry in record.evaluations or ()]
        log = [entry for record in records for entry in record.log]
        return cls(**totals, log=log, evaluations=evaluations or None)


def log_entry(values: dict[str, Any]) -> LogEntry:
    """An entry from what the Trainer logs, without what a resumed training would not repeat."""
    return LogEntry(**{k: v for k, v in values.items() if not any(part in k for part in PER_STEP)})
