"""Does a router rank the expert first that a sample was assigned to?

Legend: B samples in a batch, S tokens, T = B x S, E experts.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from upcycle.data.batches import Batch, make_batches
from upcycle.data.chat import Sample
from upcycle.models.forward import answer_losses
from upcycle.models.routers import RouterRecorder


@torch.no_grad()
def ranking(
    model: Any,
    samples: Sequence[Sample],
    expected: Sequence[int],
    tokens: str,
    tokens_per_batch: int,
    pad_token_id: int,
) -> dict[str, Any]:
    """How often the router ranks the assigned expert first, per layer and overall.

    A sample's rank is by its mean router probability over `tokens` (`answer` or `all`); overall, over the layers too.
    """
    probabilities = []
    order: list[int] = []
    with RouterRecorder(model) as recorder:
        for batch in make_batches(samples, tokens_per_batch, pad_token_id, model.device):
            recorder.clear()
            mask = token_mask(batch, answer_losses(model, batch)[1], tokens)
            probabilities.append(torch.stack([_mean_probability(layer, mask) for layer in recorder.logits], dim=1))
            order += batch.indices
    ranked = torch.cat(probabilities).cpu()  # (samples, layers, experts)
    truth = torch.tensor(expected)[order]
    return {
        "samples": len(samples),
        "accuracy": float((ranked.mean(dim=1).argmax(dim=1) == truth).float().mean()),
        "accuracy_by_layer": (ranked.argmax(dim=2) == truth[:, None]).float().mean(dim=0).tolist(),
        "most_frequent_share": max(Counter(expected).values()) / len(expected),
        "chance": 1 / ranked.shape[2],
    }


def token_mask(batch: Batch, predicts: Bool[Tensor, "B S"], tokens: str) -> Bool[Tensor, "B S"]:
    """The tokens that count for the router: those that predict the answer, or all but padding."""
    return predicts if tokens == "answer" else batch.attention_mask.bool()


def _mean_probability(logits: Float[Tensor, "T E"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B E"]:
    probabilities = torch.softmax(logits.float(), dim=-1).view(*mask.shape, -1)
    return (probabilities * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
