"""What comparisons and sweeps of recipes measure."""

from typing import Annotated, Any

from pydantic import Field

from upcycle.records.record import ByDomain, Count, Record, Share, optional

METRICS = {"loss": "{:.4f}", "exact_match": "{:.1%}", "benchmark": "{:.1%}"}
"""Fields of `Measures` and `Summary` that are compared, with how they are printed."""


class Dense(Record):
    """A dense model on the way."""

    loss: ByDomain
    exact_match: dict[str, Share] | None = optional()


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
    exact_match: dict[str, Share] | None = optional()
    benchmark: ByDomain | None = optional()
    """By benchmark."""
    dense: dict[str, Dense] | None = optional()
    """Of the base and the checkpoints on the way."""
    initial_loss: ByDomain | None = optional()
    """Of the MoE before post-training."""

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
    seconds: dict[str, float]
    """By stage, of those that the run made itself."""


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

    @property
    def seeds(self) -> int:
        return len(next(iter(self.variants.values())))

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


class Sweep(Found):
    """Every combination of some settings."""

    recipe: str
    grid: list[str]
    """`section.field=value,value` as given."""
    axes: list[str]
    """The settings' names."""
