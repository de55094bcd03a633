"""What the router's initialization did with the seed data."""

from typing import Annotated, Literal

from pydantic import Field

from upcycle.records.record import Count, Record, Share, optional


class Bucket(Record):
    """The seed samples that one expert was given."""

    expert: Count
    name: str
    samples: Count
    domains: dict[str, Count]
    mean_loss: float
    """Of the expert on all seed samples."""
    bucket_loss: float | None
    """Of the expert on its own samples; None if it has none."""
    margin: float | None
    """By how much the second-best expert is worse on them."""


class Difference(Record):
    """What choosing an expert per domain gains over the best single expert, over bootstrap resamples."""

    gain: float
    interval: Annotated[list[float], Field(min_length=2, max_length=2)]
    """95% of the resamples."""
    more_than_noise: bool


class SeedSample(Record):
    """A seed sample, the expert that it was given to, and its loss under each expert."""

    where: str
    domain: str
    expert: Count
    losses: list[float]


class RouteCost(Record):
    """Tokens that went through the model."""

    scoring: Count
    """Forward, under every expert."""
    forward: Count
    backward: Count
    """Training tokens of the router's start."""


class Ranking(Record):
    """How often the router ranks first the expert that a sample was assigned to."""

    samples: Count
    accuracy: Share
    accuracy_by_layer: list[Share]
    most_frequent_share: Share
    """Accuracy of always naming the most frequent expert."""
    chance: Share


class HeldOut(Ranking):
    """On seed samples that the router was not started from."""

    assigned: list[Count]
    """The expert of each sample."""


class RouteReport(Record):
    """Buckets, cost and quality of the router's start; hardly anything of it where there is one expert."""

    start: Literal["upit", "contrastive", "ridge", "kmeans", "mean_hidden", "random"]
    assignment: Literal["balanced", "lowest_loss", "centred", "domain", "random"]
    buckets: list[Bucket]
    difference: Difference | None = optional()
    samples: list[SeedSample]
    log: list[dict[str, float]] | None = optional()
    """Mean losses of each epoch of a start that trains."""
    cosine: list[float] | None = optional()
    """Of each layer, between its trained router and the random one that it began from, without their means over
    experts, which no softmax sees: 1 is a router that has not moved."""
    cost: RouteCost | None = optional()
    condition: list[Annotated[float, Field(ge=0)]] | None = optional()
    """Condition number of each layer's router, its mean over experts taken away."""
    held_out: HeldOut | None = optional()
