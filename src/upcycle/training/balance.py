"""Load balancing per layer.

Legend: T tokens, E experts, L layers.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def load_balancing_loss(
    logits: Sequence[Float[Tensor, "T E"]],
    share: Float[Tensor, "L E"],
    mask: Int[Tensor, " T"],
    group: int = 1,
    num_tokens: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Mean over layers of E * sum_i f_i P_i; 1 when balanced, at most E.

    f_i is the share of the routed slots that expert i gets, P_i its mean router probability over the tokens of one
    layer that are not padding (Switch Transformer, Fedus et al. 2022, eq. 4 to 6, for top-k). transformers pools f and
    P over all layers before it multiplies them, so layers that each collapse onto another expert look balanced there.

    Args:
        share: f, of these tokens or of more (the whole step: Qiu et al. 2025, arXiv 2501.11873).
        group: this many successive experts, the slices of one expert, count as one.
        num_tokens: that P is the mean over, where others have a part of them; none given: the unmasked ones here.
    """
    losses = []
    for layer_logits, layer_share in zip(logits, share, strict=True):
        num_experts = layer_logits.shape[-1] // group
        probability = masked_mean(torch.softmax(layer_logits.float(), dim=-1), mask, num_tokens)
        grouped = layer_share.view(num_experts, group).sum(dim=1), probability.view(num_experts, group).sum(dim=1)
        losses.append(num_experts * (grouped[0] * grouped[1]).sum())
    return torch.stack(losses).mean()


def router_z_loss(
    logits: Sequence[Float[Tensor, "T E"]], mask: Int[Tensor, " T"], num_tokens: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """Mean over layers and unmasked tokens of logsumexp(logits)^2 (Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""
    squares = [torch.logsumexp(layer.float(), dim=-1).square() for layer in logits]
    return torch.stack([masked_mean(square[:, None], mask, num_tokens)[0] for square in squares]).mean()


def masked_mean(
    values: Float[Tensor, "T E"], mask: Int[Tensor, " T"], num_tokens: Float[Tensor, ""] | None = None
) -> Float[Tensor, " E"]:
    """Sum over the unmasked tokens, over their number or the given one."""
    weights = mask.to(values.dtype)
    count = weights.sum() if num_tokens is None else num_tokens
    return (values * weights[:, None]).sum(dim=0) / count.clamp(min=1)
