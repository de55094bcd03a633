"""UpIT's pre-optimisation: each expert's routing vectors learn to say yes to the expert's own samples.

Legend: B samples in a batch, T = B x S tokens, E experts, H hidden, L layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upcycle.console import Progress, warn
from upcycle.data.batches import collate, token_batches
from upcycle.data.chat import Sample
from upcycle.routing.answers import answer_losses, token_mask
from upcycle.routing.batch import Batch
from upcycle.routing.routers import (
    GatedRouter,
    RowExperts,
    granularity,
    parts,
    router_modules,
    routing_vectors,
    swapped_routers,
)
from upcycle.settings import RouteSettings
from upcycle.types import Model

Pair = tuple[int, int]
"""(sample, expert)"""
POST_NORM = "post_feedforward_layernorm"
"""What transformers calls a norm between an FFN and the residual stream."""


def preoptimise(
    model: Model,
    samples: Sequence[Sample],
    pairs: Sequence[Pair],
    start: Sequence[Float[Tensor, "E H"]],
    settings: RouteSettings,
    pad_token_id: int,
    seed: int,
) -> tuple[list[Float[Tensor, "E H"]], list[dict[str, float]]]:
    """Train the routing vectors of all experts in one run over the model, which is frozen unless experts may move.

    UpIT, section 3: each sample runs through its expert alone, the FFN gated by sigmoid(h . r_i), and minimises
    `alpha L_lm + (1 - alpha) L_aux` with L_aux = mean softplus(-h . r_i) over tokens and layers. A step takes
    `batch_size` samples, of all experts, in batches of at most `tokens_per_batch` tokens; its loss is the mean over
    its samples, so long samples do not outweigh short ones.

    Returns:
        The routing vectors (E, H) of each layer, and the mean losses of each epoch.
    """
    if any(name.rpartition(".")[2].startswith(POST_NORM) for name, _ in model.named_modules()):
        warn(
            "route: this model normalises what an FFN gives, which takes the gate's scale away: the language-model "
            "loss hardly reaches the routing vectors here, L_aux alone trains them; route.start=contrastive has no gate"
        )
    rows = RowExperts(granularity(model))
    order = torch.Generator().manual_seed(seed)
    experts = _moving_experts(model, settings)
    places = [routing_vectors(router).device for router in router_modules(model)]
    log = []
    with (
        swapped_routers(model, lambda layer: GatedRouter(rows, start[layer].to(places[layer]))) as routers,
        Progress("route: pre-optimising routing vectors", len(pairs) * settings.epochs, "samples") as bar,
    ):
        vectors: list[Tensor] = [router.vectors for router in routers]
        trained: list[dict[str, Any]] = [{"params": vectors, "lr": settings.learning_rate}]
        if experts:
            trained.append({"params": experts, "lr": settings.expert_learning_rate})
        optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
        for _ in range(settings.epochs):
            epoch = []
            shuffled = [pairs[i] for i in torch.randperm(len(pairs), generator=order).tolist()]
            for begin in range(0, len(pairs), settings.batch_size):
                chosen = shuffled[begin : begin + settings.batch_size]
                lengths = [len(samples[s].input_ids) for s, _ in chosen]
                for part in token_batches(lengths, settings.tokens_per_batch):
                    group = [chosen[i] for i in part]
                    batch = collate(samples, [s for s, _ in group], pad_token_id, model.device)
                    rows.experts = torch.tensor([e for _, e in group], device=model.device)
                    language, auxiliary = gated_losses(model, batch, routers, settings.tokens)
                    loss = settings.alpha * language + (1 - settings.alpha) * auxiliary
                    torch.autograd.backward(loss * (len(group) / len(chosen)))
                    epoch.append((language.item(), auxiliary.item(), len(group)))
                    bar.advance(len(group))
                optimizer.step()
                optimizer.zero_grad()
            log.append(_epoch_means(epoch))
    return [vector.detach().cpu() for vector in vectors], log


def _moving_experts(model: Model, settings: RouteSettings) -> list[Tensor]:
    """The experts' weights if they may move; everything else is frozen."""
    moving: list[Tensor] = []
    for part, parameter in parts(model):
        parameter.requires_grad_(settings.expert_learning_rate is not None and part == "experts")
        if parameter.requires_grad:
            moving.append(parameter)
    return moving


def gated_losses(
    model: Model, batch: Batch, routers: Sequence[GatedRouter], tokens: str
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """(L_lm, L_aux) of a batch: means over samples, of token means."""
    language, predicts = answer_losses(model, batch)
    mask = token_mask(batch, predicts, tokens)
    scores = torch.stack([router.scores for router in routers])
    return language.mean(), auxiliary_loss(scores, mask)


def auxiliary_loss(scores: Float[Tensor, "L T"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, ""]:
    """L_aux = CrossEntropy(sigmoid(h . r), 1) = softplus(-h . r), mean over layers, tokens and samples."""
    per_token = torch.nn.functional.softplus(-scores).mean(dim=0).view(mask.shape)
    return ((per_token * mask).sum(dim=1) / mask.sum(dim=1)).mean()


def _epoch_means(epoch: Sequence[tuple[float, float, int]]) -> dict[str, float]:
    weights: Int[Tensor, " n"] = torch.tensor([n for *_, n in epoch])
    sums = torch.tensor([[lm * n, aux * n] for lm, aux, n in epoch]).sum(dim=0) / weights.sum()
    return {"language_model_loss": sums[0].item(), "auxiliary_loss": sums[1].item()}
