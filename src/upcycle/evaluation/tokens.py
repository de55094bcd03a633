"""Which expert reads which token: sample texts with the routing of every layer."""

from collections.abc import Sequence

import torch

from upcycle.data.chat import Sample
from upcycle.records.description import RoutedText
from upcycle.routing.routers import RouterRecorder
from upcycle.types import Model, Tokenizer


@torch.no_grad()
def routed_tokens(model: Model, tokenizer: Tokenizer, samples: Sequence[Sample]) -> list[RoutedText]:
    """Of each sample the texts of its tokens, and per layer each token's first choice."""
    found = []
    with RouterRecorder(model) as recorder:
        for sample in samples:
            recorder.clear()
            model(torch.tensor([sample.input_ids], device=model.device), use_cache=False)
            tokens = [str(tokenizer.decode([token])) for token in sample.input_ids]
            found.append(RoutedText(sample.domain, tokens, [layer[:, 0].tolist() for layer in recorder.experts]))
    return found


def one_of_each_domain(samples: Sequence[Sample], at_most: int, longest: int) -> list[Sample]:
    """The first sample of each domain that is not too long, in the order of their domains."""
    chosen: dict[str, Sample] = {}
    for sample in samples:
        if len(sample.input_ids) <= longest:
            chosen.setdefault(sample.domain, sample)
    return [chosen[domain] for domain in sorted(chosen)][:at_most]
