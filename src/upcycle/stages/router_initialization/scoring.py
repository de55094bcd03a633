"""How well each expert alone does on each sample.

Legend: N samples, E experts.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from upcycle.console import Progress
from upcycle.data.batches import make_batches
from upcycle.data.chat import Sample
from upcycle.distributed.world import share, summed
from upcycle.routing.answers import answer_losses
from upcycle.routing.routers import ForcedRouter, RowExperts, granularity, num_experts, swapped_routers
from upcycle.types import Model


@torch.no_grad()
def expert_losses(
    model: Model, samples: Sequence[Sample], tokens_per_batch: int, pad_token_id: int, shared: bool = True
) -> Float[Tensor, "N E"]:
    """Mean token loss of each sample's answer under each expert alone (UpIT: log perplexity).

    Expert i alone is the MoE with every token routed to expert i; batches are sorted by length. Several processes
    share them, and all get all losses.

    Args:
        shared: whether they do; else this process is alone with the model.

    Raises:
        UpcycleError: a loss is not finite (in `assign`, which names the sample).
    """
    rows, count = RowExperts(granularity(model)), num_experts(model)
    losses = torch.zeros(len(samples), count)
    batches = make_batches(samples, tokens_per_batch, pad_token_id, model.device)
    batches = [*share(batches)] if shared else batches
    with (
        swapped_routers(model, lambda _: ForcedRouter(rows, count)),
        Progress("route: scoring seed data under each expert", len(batches) * count, "forward passes") as bar,
    ):
        for batch in batches:
            for expert in range(count):
                rows.experts = torch.full((len(batch.indices),), expert, device=model.device)
                losses[batch.indices, expert] = answer_losses(model, batch)[0].cpu()
                bar.advance()
    total: Tensor = summed(losses.to(model.device)) if shared else losses
    return total.cpu()
