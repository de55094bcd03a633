"""One forward pass over a batch: the loss of each sample's answer.

Legend: B samples, S tokens, V vocabulary.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upcycle.routing.batch import IGNORED, Batch
from upcycle.types import Model


def answer_losses(model: Model, batch: Batch) -> tuple[Float[Tensor, " B"], Bool[Tensor, "B S"]]:
    """Mean token loss of each sample's answer (log perplexity), and which positions predict an answer token.

    Logits are made only where some sample of the batch has an answer: over a whole batch of prompts they would be
    the largest tensor by far.
    """
    targets, predicts = answer_targets(batch.labels)
    columns = predicts.any(dim=0).nonzero()[:, 0]
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=columns).logits
    chosen = predicts[:, columns]
    losses = torch.nn.functional.cross_entropy(logits[chosen].float(), targets[:, columns][chosen], reduction="none")
    sums = torch.zeros(len(targets), device=losses.device).index_add(0, chosen.nonzero()[:, 0], losses)
    return sums / predicts.sum(dim=1), predicts


def answer_targets(labels: Int[Tensor, "B S"]) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """The next token's label at each position, and where it is one of the answer's."""
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return targets, targets != IGNORED


def token_mask(batch: Batch, predicts: Bool[Tensor, "B S"], tokens: str) -> Bool[Tensor, "B S"]:
    """The tokens that count for the router: those that predict the answer (`answer`), or all but padding (`all`)."""
    return predicts if tokens == "answer" else batch.attention_mask.bool()
