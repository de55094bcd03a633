"""What the routers of a MoE do, per layer and domain, in figures.

Legend: L layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence

from upcycle.records.record import ByDomain, Shares
from upcycle.records.scores import AgainstBest, LayerFigures
from upcycle.routing.load import DEAD


def routing_metrics(shares: Mapping[str, Shares]) -> dict[str, LayerFigures]:
    """Per domain, figures for each layer."""
    return {
        domain: LayerFigures(
            entropy=[entropy(layer) for layer in layers],
            max_over_mean=[max(layer) * len(layer) for layer in layers],
            dead=[sum(share * len(layer) < DEAD for share in layer) for layer in layers],
        )
        for domain, layers in shares.items()
    }


def entropy(shares: Sequence[float]) -> float:
    """-sum_i s_i log s_i over log E: 1 when all experts get the same (or there is one), 0 when one gets all."""
    if len(shares) == 1:
        return 1.0
    return -sum(s * math.log(s) for s in shares if s > 0) / math.log(len(shares))


def specialisation(shares: Mapping[str, Shares], everything: str) -> list[float]:
    """Per layer, the mean over domains of the total variation distance between a domain's shares and those of all.

    0: every domain is routed alike; 1 - 1/E at most when each domain has experts of its own.
    """
    domains = [domain for domain in shares if domain != everything]
    return [
        sum(sum(abs(a - b) for a, b in zip(shares[domain][layer], overall, strict=True)) / 2 for domain in domains)
        / max(1, len(domains))
        for layer, overall in enumerate(shares[everything])
    ]


def regressions(moe: ByDomain, experts: Mapping[str, ByDomain]) -> dict[str, AgainstBest]:
    """Per domain: the single expert with the lowest held-out loss, and by how much the MoE's is higher (or lower)."""
    found = {}
    for domain, loss in moe.items():
        best = min(experts, key=lambda name: experts[name][domain])
        found[domain] = AgainstBest(best_expert=best, loss_above_it=loss - experts[best][domain])
    return found
