"""What the routers read: the MoE blocks' real inputs (post-norm) while each sample runs through its own expert.

Legend: T tokens, E experts, H hidden, L layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upcycle.console import Progress
from upcycle.data.batches import collate, token_batches
from upcycle.data.chat import Sample
from upcycle.routing.answers import answer_targets
from upcycle.routing.routers import ForcedRouter, RowExperts, granularity, num_experts, swapped_routers
from upcycle.types import Model

Pair = tuple[int, int]
"""(sample, expert)"""


@dataclass(frozen=True)
class Tokens:
    """Inputs of all routers for the tokens of one batch, and the expert that each is to go to."""

    hidden: Float[Tensor, "L T H"]
    experts: Int[Tensor, " T"]


def router_inputs(
    model: Model,
    samples: Sequence[Sample],
    pairs: Sequence[Pair],
    tokens: str,
    tokens_per_batch: int,
    pad_token_id: int,
) -> Iterator[Tokens]:
    """One forward pass over the pairs; padding left out, and the prompt too if `tokens` is `answer`."""
    rows, count = RowExperts(granularity(model)), num_experts(model)
    groups = token_batches([len(samples[s].input_ids) for s, _ in pairs], tokens_per_batch)
    with (
        swapped_routers(model, lambda _: ForcedRouter(rows, count)) as routers,
        _inputs_of(routers) as inputs,
        Progress("route: reading the routers' inputs", len(groups), "batches") as bar,
    ):
        for group in groups:
            chosen = [pairs[i] for i in group]
            batch = collate(samples, [s for s, _ in chosen], pad_token_id, model.device)
            rows.experts = torch.tensor([e for _, e in chosen], device=model.device)
            inputs.clear()
            with torch.no_grad():  # not around the yield: the caller may train
                model.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            mask = answer_targets(batch.labels)[1] if tokens == "answer" else batch.attention_mask.bool()
            flat = mask.reshape(-1)
            hidden = torch.stack([layer.to(model.device).reshape(len(flat), -1)[flat] for layer in inputs])
            yield Tokens(hidden.float(), rows.of_tokens(len(flat))[flat])
            bar.advance()


@contextmanager
def _inputs_of(modules: Sequence[torch.nn.Module]) -> Iterator[list[Tensor]]:
    """The first argument of each module's last forward, in order."""
    seen: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class TokenSample:
    """A seeded uniform sample of at most about `size` tokens from a stream of known length."""

    def __init__(self, size: int, total: int, seed: int) -> None:
        self._share = min(1.0, size / max(1, total))
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[Tokens] = []

    def add(self, tokens: Tokens) -> None:
        kept = torch.rand(len(tokens.experts), generator=self._generator) < self._share
        kept = kept.to(tokens.experts.device)
        self._parts.append(Tokens(tokens.hidden[:, kept].cpu(), tokens.experts[kept].cpu()))

    def take(self) -> Tokens:
        return Tokens(
            torch.cat([part.hidden for part in self._parts], dim=1), torch.cat([part.experts for part in self._parts])
        )
