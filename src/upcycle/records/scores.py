"""Scores of models on held-out rows, and what routers do with them."""

from collections.abc import Mapping

from upcycle.records.record import ALL, ByDomain, Count, Loss, Record, Share, Shares, optional
from upcycle.records.route import Ranking

BASE = "base"
MOE_INIT = "MoE before post-training"
MOE = "MoE"
RESERVED = (BASE, MOE, MOE_INIT)
"""Names in tables of scores that no checkpoint may have."""
STEP_0, AGAINST_BEST = "step_0", "against_best_expert"
"""Keys of `Routing` besides the names of MoEs."""


class LayerFigures(Record):
    """What a MoE's routers do with the rows of a domain: a figure for each layer."""

    entropy: list[float]
    """1 when all experts get the same, 0 when one gets all."""
    max_over_mean: list[float]
    """Load of the most loaded expert."""
    dead: list[Count]
    """Number of experts with hardly any load."""


class ModelRouting(Record):
    """What a MoE's routers do with held-out rows."""

    by_domain: dict[str, LayerFigures]
    specialisation: list[float]
    """Per layer: 0 if every domain is routed alike, 1 - 1/E at most."""
    agreement: Ranking | None = optional()
    """With the assignment of seed samples that no router was started from."""


class ModelScores(Record):
    """Of one model, by domain."""

    loss: ByDomain
    """Mean over samples of the mean token loss of the answer."""
    expert_share: dict[str, Shares] | None = optional()
    """Of a MoE: over all tokens but padding."""
    exact_match: dict[str, Share] | None = optional()
    """Of greedy answers; empty if no answer is short."""
    exact_match_rows: Count | None = optional()


class Scored(ModelScores):
    """What is kept of a model until all are scored."""

    routing: ModelRouting | None = optional()


class AgainstDense(Record):
    """The MoE before post-training against the last checkpoint, which it came from."""

    loss: Loss
    dense: str
    dense_loss: Loss
    difference: float


class AgainstBest(Record):
    """The MoE's loss in a domain against the single expert with the lowest."""

    best_expert: str
    loss_above_it: float


Scores = dict[str, ModelScores]
"""By name of the model, in the order of training."""
Routing = dict[str, ModelRouting | AgainstDense | dict[str, AgainstBest]]
"""By name of the MoE; `STEP_0` against the last checkpoint; `AGAINST_BEST` by domain."""


def checkpoint_names(scores: Mapping[str, ModelScores]) -> list[str]:
    """The checkpoints among the models, in the order of training."""
    return [name for name, entry in scores.items() if name != BASE and entry.expert_share is None]


def best_checkpoint(scores: Mapping[str, ModelScores]) -> str | None:
    """The checkpoint with the lowest held-out loss: chosen after the fact, so it flatters the checkpoints."""
    return min(checkpoint_names(scores), key=lambda name: scores[name].loss[ALL], default=None)


def standard_error(share: float, rows: int) -> float:
    """Of a share of that many rows."""
    return float((share * (1 - share) / rows) ** 0.5) if rows else 0.0
