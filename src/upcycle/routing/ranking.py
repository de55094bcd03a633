"""Does a router rank the expert first that a sample was assigned to?

Legend: B samples in a batch, S tokens, T = B x S, E experts.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upcycle.records.route import Ranking
from upcycle.routing.answers import answer_losses, token_mask
from upcycle.routing.batch import Batch
from upcycle.routing.routers import RouterRecorder
from upcycle.types import Model


@torch.no_grad()
def ranking(model: Model, batches: Sequence[Batch], expected: Sequence[int], tokens: str) -> Ranking:
    """How often the router ranks the assigned expert first, per layer and overall.

    A sample's rank is by its mean router probability over `tokens` (`answer` or `all`); overall, over the layers too.

    Args:
        expected: the expert that each sample was assigned to, by the batches' indices.
    """
    probabilities = []
    order: list[int] = []
    with RouterRecorder(model) as recorder:
        for batch in batches:
            recorder.clear()
            mask = token_mask(batch, answer_losses(model, batch)[1], tokens)
            slices = torch.stack([_mean_probability(layer, mask) for layer in recorder.logits], dim=1)
            probabilities.append(slices.view(*slices.shape[:2], -1, recorder.granularity).sum(dim=3))
            order += batch.indices
    ranked = torch.cat(probabilities).cpu()  # (samples, layers, experts)
    truth = torch.tensor(expected)[order]
    return Ranking(
        samples=len(order),
        accuracy=float((ranked.mean(dim=1).argmax(dim=1) == truth).float().mean()),
        accuracy_by_layer=(ranked.argmax(dim=2) == truth[:, None]).float().mean(dim=0).tolist(),
        most_frequent_share=max(Counter(expected).values()) / len(expected),
        chance=1 / ranked.shape[2],
    )


def _mean_probability(logits: Float[Tensor, "T E"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B E"]:
    probabilities = torch.softmax(logits.float(), dim=-1).view(*mask.shape, -1)
    return (probabilities * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
