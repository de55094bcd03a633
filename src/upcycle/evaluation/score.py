"""Held-out loss, exact match of greedy answers, and the share of tokens that each expert gets, by domain.

Legend: L layers, E experts, B samples in a batch, S tokens.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import GenerationConfig

from upcycle.console import Progress
from upcycle.data.batches import make_batches, token_batches
from upcycle.data.chat import Sample, end_of_turn
from upcycle.data.skeletons import behind_thoughts
from upcycle.records.record import ALL
from upcycle.records.scores import ModelScores
from upcycle.routing.answers import answer_losses
from upcycle.routing.batch import IGNORED
from upcycle.routing.routers import RouterRecorder, num_experts
from upcycle.settings import EvaluateSettings
from upcycle.types import Model, Tokenizer
from upcycle.weights.folders import with_end


def score(
    model: Model, tokenizer: Tokenizer, samples: Sequence[Sample], settings: EvaluateSettings, name: str
) -> ModelScores:
    """Scores of one model by domain; of a MoE the share of tokens of each expert too."""
    losses, shares = held_out(model, samples, settings, tokenizer.pad_token_id, name)
    chosen = short_answers(samples, settings) if settings.exact_match else None
    matches = None if chosen is None else exact_matches(model, tokenizer, chosen, settings, name)
    return ModelScores(
        loss=_by_domain(zip(samples, losses, strict=True)),
        expert_share={domain: share.tolist() for domain, share in shares.items()} if shares else None,
        exact_match=None if chosen is None or matches is None else _by_domain(zip(chosen, matches, strict=True)),
        exact_match_rows=None if chosen is None else len(chosen),
    )


@torch.no_grad()
def held_out(
    model: Model, samples: Sequence[Sample], settings: EvaluateSettings, pad_token_id: int, name: str
) -> tuple[list[float], dict[str, Float[Tensor, "L E"]]]:
    """Loss of each sample, and for a MoE the share of routed slots per layer and expert of each domain."""
    losses = torch.zeros(len(samples))
    counts: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    batches = make_batches(samples, settings.tokens_per_batch, pad_token_id, model.device)
    recorder = RouterRecorder(model) if num_experts(model) else None
    with recorder or nullcontext(), Progress(f"evaluate {name}: loss", len(batches), "batches") as bar:
        for batch in batches:
            if recorder:
                recorder.clear()
            losses[batch.indices] = answer_losses(model, batch)[0].cpu()
            if recorder:
                for row, slots in enumerate(_slots(recorder, batch.attention_mask)):
                    for domain in {samples[batch.indices[row]].domain, ALL}:
                        counts[domain] = counts[domain] + slots
            bar.advance()
    shares = {domain: slots / slots.sum(dim=1, keepdim=True) for domain, slots in sorted(counts.items())}
    return losses.tolist(), shares


@torch.no_grad()
def routed_share(
    model: Model, sequences: Sequence[list[int]], tokens_per_batch: int, pad_token_id: int
) -> Float[Tensor, "L E"]:
    """Share of routed slots per layer and expert over all tokens of some sequences."""
    samples = [Sample(ids, [IGNORED] * len(ids), "", "", "", len(ids), "") for ids in sequences]
    total = torch.zeros(())
    with RouterRecorder(model) as recorder:
        for batch in make_batches(samples, tokens_per_batch, pad_token_id, model.device):
            recorder.clear()
            model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            total = total + _slots(recorder, batch.attention_mask).sum(dim=0)
    return total / total.sum(dim=1, keepdim=True)


def _slots(recorder: RouterRecorder, mask: Tensor) -> Float[Tensor, "B L E"]:
    """Routed slots of each sample per layer and whole expert, padding left out."""
    num_experts = recorder.logits[0].shape[-1] // recorder.granularity
    layers = []
    for indices in recorder.experts:
        slots = torch.nn.functional.one_hot(indices, num_experts).sum(dim=1).view(*mask.shape, num_experts)
        layers.append((slots * mask[:, :, None]).sum(dim=1))
    return torch.stack(layers, dim=1).float().cpu()


def short_answers(samples: Sequence[Sample], settings: EvaluateSettings) -> list[Sample]:
    """The rows whose last answer is short enough to be compared word by word."""
    longest = settings.max_answer_tokens
    # a row that was cut within its answer has no prompt
    chosen = [s for s in samples if s.answer_start and len(s.input_ids) - s.answer_start <= longest]
    return chosen[: settings.max_generated]


@torch.no_grad()
def exact_matches(
    model: Model, tokenizer: Tokenizer, samples: Sequence[Sample], settings: EvaluateSettings, name: str
) -> list[float]:
    """1.0 where the greedy answer to the prompt equals the reference, white space at the ends and thoughts aside."""
    matches, end = [0.0] * len(samples), end_of_turn(tokenizer)
    lengths = [s.answer_start + settings.max_answer_tokens for s in samples]
    groups = token_batches(lengths, settings.tokens_per_batch)
    with Progress(f"evaluate {name}: answers", len(samples), "rows") as bar:
        for group in groups:
            answers = _greedy(model, tokenizer, [samples[i] for i in group], settings.max_answer_tokens, end)
            for index, answer in zip(group, answers, strict=True):
                matches[index] = float(samples[index].answer in (answer.strip(), behind_thoughts(answer)))
            bar.advance(len(group))
    return matches


def _greedy(
    model: Model, tokenizer: Tokenizer, samples: Sequence[Sample], max_new_tokens: int, end: int | None = None
) -> list[str]:
    longest = max(s.answer_start for s in samples)
    pad = tokenizer.pad_token_id
    prompts = [s.input_ids[: s.answer_start] for s in samples]
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with _nothing_but_the_end(model, end):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
    return [str(text) for text in tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]


@contextmanager
def _nothing_but_the_end(model: Model, end: int | None) -> Iterator[None]:
    """Of the model's settings for generation only where it stops, at the end of a turn too: with a penalty or beams,
    answers are not greedy."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=with_end(own.eos_token_id, end))
    try:
        yield
    finally:
        model.generation_config = own


def _by_domain(values: Iterable[tuple[Sample, float]]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for sample, value in values:
        for domain in {sample.domain, ALL}:
            groups[domain].append(value)
    return {domain: sum(group) / len(group) for domain, group in sorted(groups.items())}
