"""How well each expert alone does on each sample.

Legend: N samples, E experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upcycle.console import Progress
from upcycle.data.batches import make_batches
from upcycle.data.chat import Sample
from upcycle.models.forward import answer_losses
from upcycle.models.routers import ForcedRouter, RowExperts, swapped_routers


@torch.no_grad()
def expert_losses(
    model: Any, samples: Sequence[Sample], num_experts: int, tokens_per_batch: int, pad_token_id: int
) -> Float[Tensor, "N E"]:
    """Mean token loss of each sample's answer under each expert alone (UpIT: log perplexity).

    Expert i alone is the MoE with every token routed to expert i; batches are sorted by length.

    Raises:
        UpcycleError: a loss is not finite (in `assign`, which names the sample).
    """
    rows = RowExperts()
    losses = torch.zeros(len(samples), num_experts)
    batches = make_batches(samples, tokens_per_batch, pad_token_id, model.device)
    with (
        swapped_routers(model, lambda _: ForcedRouter(rows, num_experts)),
        Progress("route: scoring seed data under each expert", len(batches) * num_experts) as bar,
    ):
        for batch in batches:
            for expert in range(num_experts):
                rows.experts = torch.full((len(batch.indices),), expert, device=model.device)
                losses[batch.indices, expert] = answer_losses(model, batch)[0].cpu()
                bar.advance()
    return losses
