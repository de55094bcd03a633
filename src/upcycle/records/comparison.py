"""What comparisons and sweeps of recipes measure."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from upcycle.errors import counted
from upcycle.records.record import ByDomain, Count, Record, ShareByDomain, optional
from upcycle.records.scores import BASE

METRICS = {"loss": "{:.4f}", "exact_match": "{:.1%}", "benchmark": "{:.1%}"}
"""Fields of `Measures` and `Summary` that are compared, with how they are printed."""


class Dense(Record):
    """A dense model on the way."""

    loss: ByDomain
    exact_match: ShareByDomain | None = optional()


def _has_base(dense: dict[str, Dense]) -> dict[str, Dense]:
    if BASE not in dense:
        raise ValueError(f"the {BASE} is not among the models")
    return dense


class Measures(Record):
    """Of one run: a metric's values by domain (or by benchmark), the mean under `ALL`."""

    seed: Count
    data: str
    """Hash of the rows."""
    tokens: dict[str, Count]
    """Training tokens by stage."""
    flops: dict[str, Count] | None = optional()
    """Training FLOPs by stage; the scores of attention left out."""
    loss: ByDomain
    exact_match: ShareByDomain | None = optional()
    benchmark: ByDomain | None = optional()
    """By benchmark."""
    dense: Annotated[dict[str, Dense], AfterValidator(_has_base)] | None = optional()
    """Of the base and the checkpoints on the way."""
    initial_loss: ByDomain | None = optional()
    """Of the MoE before post-training."""
    by_domain: bool | None = optional()
    """Whether no checkpoint is the last one, as each is of a training of its own."""
    seconds: dict[str, float] | None = optional()
    """By stage, of those that the run made itself."""

    @property
    def total_tokens(self) -> int:
        """Training tokens of all stages."""
        return sum(self.tokens.values())

    @property
    def total_flops(self) -> int:
        """Training FLOPs of all stages; 0 where none were counted."""
        return sum((self.flops or {}).values())

    def metric(self, name: str) -> ByDomain | None:
        """One of `METRICS`; None if the run was not measured so."""
        found: ByDomain | None = getattr(self, name)
        return found


class Cell(Measures):
    """Measures that outlive their run, with what made them."""

    recipe: dict[str, Any]
    """With every setting resolved, the seed among them."""
    version: str
    """Of the code."""
    machine: str
    inputs: dict[str, str] | None = optional()
    """Name to hash of what the recipe names and the rows' hash leaves out: the base, a chat template, checkpoints."""


class Spread(Record):
    """A metric over seeds."""

    mean: float
    std: float
    """n - 1; nan for one seed."""
    difference: float | None = optional()
    """To the reference, paired by seed; None of the reference itself."""
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = optional()
    """95% of the difference; nan for one seed."""
    p: float | None = optional()
    """Two-sided, of a paired t-test; nan if none could be made."""
    p_corrected: float | None = optional()
    """After Holm, for all rows of the metric."""


class Summary(Record):
    """One variant over all seeds."""

    variant: str
    label: str
    tokens: Count
    """Training tokens of its first seed."""
    flops: Count | None = optional()
    """Training FLOPs of its first seed."""
    loss: Spread | None = optional()
    exact_match: Spread | None = optional()
    benchmark: Spread | None = optional()
    settings: dict[str, str] | None = optional()
    """Of a point of a sweep."""

    def metric(self, name: str) -> Spread:
        """One of `METRICS` that all variants have."""
        found: Spread | None = getattr(self, name)
        assert found is not None
        return found

    def setting(self, name: str) -> str:
        """The value of a setting at this point of a sweep."""
        assert self.settings is not None
        return self.settings[name]


class Found(Record):
    """What comparisons and sweeps have in common."""

    variants: dict[str, list[Measures]] = Field(min_length=1)
    """By the variant's words; a run for each seed."""
    summary: list[Summary] = Field(min_length=1)

    @model_validator(mode="after")
    def _a_row_for_each_variant(self) -> "Found":
        if (rows := [row.variant for row in self.summary]) != list(self.variants):
            raise ValueError(f"summary has rows of {rows}, but the variants are {list(self.variants)}")
        if len(counts := {len(runs) for runs in self.variants.values()}) > 1 or 0 in counts:
            raise ValueError(f"variants have different numbers of seeds, or none: {sorted(counts)}")
        return self

    @model_validator(mode="after")
    def _the_same_metrics_for_all(self) -> "Found":
        if "loss" not in self.metrics:
            raise ValueError("the first row of summary has no loss")
        if [row.metric("loss").difference for row in self.summary].count(None) != 1:
            raise ValueError("summary has not one row that the others are compared with")
        for row, runs in zip(self.summary, self.variants.values(), strict=True):
            for name in METRICS:
                has, expected = getattr(row, name) is not None, name in self.metrics
                if has != expected or (expected and any(run.metric(name) is None for run in runs)):
                    raise ValueError(f"{name} is not there for all variants, or not for none: see {row.variant}")
        return self

    @property
    def seeds(self) -> int:
        return len(next(iter(self.variants.values())))

    @property
    def over(self) -> str:
        """`1 seed`, `5 seeds`."""
        return counted(self.seeds, "seed")

    @property
    def reference(self) -> str:
        """Label of the variant that the others are compared with."""
        return next(row.label for row in self.summary if row.metric("loss").difference is None)

    @property
    def metrics(self) -> list[str]:
        """Those of `METRICS` that all variants have."""
        return [name for name in METRICS if getattr(self.summary[0], name) is not None]


class Comparison(Found):
    """Variants against one of them."""

    not_comparable: list[str]
    """What speaks against the comparison."""
    match: Literal["flops"] | None = optional()
    """What the variants' epochs were scaled to have alike; None: they have their own, and tokens are alike."""

    @property
    def budget(self) -> str:
        """What all variants have alike."""
        return "training FLOPs" if self.match else "training tokens"


class Sweep(Found):
    """Every combination of some settings."""

    recipe: str
    grid: list[str]
    """`section.field=value,value` as given."""
    axes: list[str] = Field(min_length=1)
    """The settings' names."""

    @model_validator(mode="after")
    def _a_value_on_each_axis(self) -> "Sweep":
        for row in self.summary:
            if missing := set(self.axes) - set(row.settings or ()):
                raise ValueError(f"settings of {row.variant}: there is no {min(missing)}")
        return self
