"""Scores of models on benchmarks, as lm-evaluation-harness gives them."""

from collections.abc import Mapping
from statistics import fmean
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from upcycle.records.record import Count, Record, Shares, optional

MAIN = ("acc_norm,none", "acc,none", "exact_match,answer", "exact_match,none", "pass_at_1,none")
"""The figure of a task that a table shows: the first of these that it has."""


class TaskScores(Record):
    """Of one model on one task: besides the fields below, lm-eval's figures under its own names (`acc,none`)."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    rows: Count
    expert_share: Shares | None = optional()
    """Of a MoE: over the tokens of the questions."""

    @model_validator(mode="after")
    def _has_a_figure(self) -> "TaskScores":
        if all("stderr" in name for name in self.figures):
            raise ValueError("there is no figure of lm-eval's")
        return self

    @property
    def figures(self) -> dict[str, float]:
        """lm-eval's own."""
        return self.__pydantic_extra__

    @property
    def main(self) -> tuple[float, float]:
        """The figure that a table shows, and its standard error."""
        figures = self.figures
        key = next((key for key in MAIN if key in figures), None)
        if key is None:
            key = next(key for key in figures if "stderr" not in key)
        metric, _, kind = key.partition(",")
        return figures[key], figures.get(f"{metric}_stderr,{kind}", float("nan"))


def _of_the_same_tasks(found: dict[str, dict[str, TaskScores]]) -> dict[str, dict[str, TaskScores]]:
    if len({tuple(scores) for scores in found.values()}) != 1 or {} in found.values():
        raise ValueError("models are scored on different tasks, or on none")
    return found


BenchmarkScores = Annotated[dict[str, dict[str, TaskScores]], AfterValidator(_of_the_same_tasks)]
"""Model to task to scores; the tasks are the same, in the same order."""


class ScoredModel(Record):
    """Which model of a run its benchmark scores are of."""

    posttrain: str
    """Hash of the folder's content."""


def score_table(found: Mapping[str, Mapping[str, TaskScores]], sign: str = "+-") -> tuple[list[str], list[list[str]]]:
    """Heads (with rows of each task) and rows: model, mean, figures with standard error; `*` marks a task's best."""
    tasks = list(next(iter(found.values())))
    best = {task: max(scores[task].main[0] for scores in found.values()) for task in tasks}
    rows = []
    for model, scores in found.items():
        figures = [scores[task].main for task in tasks]
        cells = [
            f"{value:.1%}" + f" {sign} {error:.1%}" * (error == error) + "*" * (value == best[task])  # one row has none
            for task, (value, error) in zip(tasks, figures, strict=True)
        ]
        rows.append([model, f"{fmean(value for value, _ in figures):.1%}", *cells])
    asked = next(iter(found.values()))
    return ["model", "mean", *(f"{task} ({asked[task].rows})" for task in tasks)], rows
