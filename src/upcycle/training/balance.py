"""Load balancing per layer.

Legend: T tokens, E experts, k experts per token, L layers.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upcycle.routing.load import expert_share


def load_balancing_loss(
    logits: Sequence[Float[Tensor, "T E"]],
    indices: Sequence[Int[Tensor, "T k"]],
    mask: Int[Tensor, " T"],
    group: int = 1,
) -> Float[Tensor, ""]:
    """Mean over layers of E * sum_i f_i P_i; 1 when balanced, at most E.

    f_i is the share of the k * T routed slots that expert i gets, P_i its mean router probability, both over
    the tokens of one layer that are not padding (Switch Transformer, Fedus et al. 2022, eq. 4 to 6, for top-k).
    transformers pools f and P over all layers before it multiplies them, so layers that each collapse onto another
    expert look balanced there.

    Args:
        group: so many successive experts count as one: the slices of an expert.
    """
    losses = []
    for layer_logits, layer_indices in zip(logits, indices, strict=True):
        num_experts = layer_logits.shape[-1] // group
        share = expert_share(layer_indices // group, mask, num_experts)
        probability = masked_mean(torch.softmax(layer_logits.float(), dim=-1), mask).view(num_experts, group).sum(dim=1)
        losses.append(num_experts * (share * probability).sum())
    return torch.stack(losses).mean()


def router_z_loss(logits: Sequence[Float[Tensor, "T E"]], mask: Int[Tensor, " T"]) -> Float[Tensor, ""]:
    """Mean over layers and unmasked tokens of logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""
    weights = mask.float()
    squares = [torch.logsumexp(layer.float(), dim=-1).square() for layer in logits]
    return torch.stack([(square * weights).sum() / weights.sum().clamp(min=1) for square in squares]).mean()


def masked_mean(values: Float[Tensor, "T E"], mask: Int[Tensor, " T"]) -> Float[Tensor, " E"]:
    """Mean over the unmasked tokens."""
    weights = mask.to(values.dtype)
    return (values * weights[:, None]).sum(dim=0) / weights.sum().clamp(min=1)
