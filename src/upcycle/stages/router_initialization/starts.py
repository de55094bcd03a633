"""How a router may start, as rows of a table: from the seed samples and the expert that each was given.

Legend: T tokens, E experts, H hidden, L layers, N seed samples.

A constant added to all vectors of a layer changes no softmax, so the mean over experts is taken away from vectors that
are means of hidden states: what is left tells experts apart, and can be scaled.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from upcycle.data.chat import Sample
from upcycle.settings import RouteSettings
from upcycle.stages.router_initialization.features import Pair, Tokens, TokenSample, router_inputs
from upcycle.stages.router_initialization.preoptimise import preoptimise
from upcycle.types import Model

MAX_SAMPLED_TOKENS = 16384
"""Tokens whose router inputs are kept (the hidden states of all layers); sums run over all tokens."""


@dataclass(frozen=True)
class Seed:
    """What a start may use."""

    model: Model
    samples: Sequence[Sample]
    pairs: Sequence[Pair]
    """Every sample with its expert; with equal steps, small buckets are repeated."""
    random: Sequence[Float[Tensor, "E H"]]
    """Gaussian vectors, the start of what is trained."""
    settings: RouteSettings
    pad_token_id: int
    seed: int

    @property
    def num_experts(self) -> int:
        return len(self.random[0])

    @property
    def num_tokens(self) -> int:
        """Of one pass over the pairs."""
        return sum(len(self.samples[s].input_ids) for s, _ in self.pairs)

    @property
    def num_read(self) -> Int[Tensor, " E"]:
        """Tokens of each expert that a start sees: all, or those that predict an answer."""
        counts = torch.zeros(self.num_experts, dtype=torch.long)
        for number, expert in self.pairs:
            sample = self.samples[number]
            by_answer = self.settings.tokens == "answer"
            counts[expert] += sample.num_answer_tokens if by_answer else len(sample.input_ids)
        return counts


@dataclass(frozen=True)
class Start:
    """The routing vectors of every layer, and what they cost."""

    vectors: Sequence[Float[Tensor, "E H"]]
    inputs: Tokens | None = None
    """A sample of what the routers read, if the start has read it."""
    forward_tokens: int = 0
    backward_tokens: int = 0
    log: list[dict[str, float]] = field(default_factory=list)


def random(seed: Seed) -> Start:
    """Gaussian, std `init_std`: the start of vanilla upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055)."""
    return Start(seed.random)


def mean_hidden(seed: Seed) -> Start:
    """The mean router input of an expert's own tokens (mergekit's `hidden` gate averages the layer's input instead)."""
    kept, counts = _token_sample(seed), torch.zeros(seed.num_experts)
    sums = torch.zeros(len(seed.random), *seed.random[0].shape)
    for tokens in _stream(seed):
        own = _one_hot(tokens, seed.num_experts)
        sums += (own.T @ tokens.hidden).cpu()
        counts += own.sum(dim=0).cpu()
        kept.add(tokens)
    means = sums / counts[:, None].clamp(min=1)
    return Start(list(_centred(means)), kept.take(), seed.num_tokens)


def kmeans(seed: Seed) -> Start:
    """Centroids of the router inputs, given to the experts whose tokens they hold most of (linear assignment)."""
    sample = _sample(seed)
    centroids = torch.stack([_matched_centroids(layer, sample, seed) for layer in sample.hidden])
    return Start(list(_centred(centroids)), sample, seed.num_tokens)


def ridge(seed: Seed) -> Start:
    """Ridge regression of the expert's indicator on the router input, in closed form (DUME, arXiv 2603.29765).

    R = (H^T H + lambda I)^-1 H^T (Y - 1/E), lambda being `ridge` times the mean of the diagonal; no bias, one pass,
    every expert with the same weight.
    """
    weights = _weights(seed.num_read)
    kept, layers, hidden = _token_sample(seed), len(seed.random), seed.random[0].shape[1]
    gram = torch.zeros(layers, hidden, hidden, dtype=torch.float64, device=seed.model.device)
    cross = gram.new_zeros(layers, hidden, seed.num_experts)
    for tokens in _stream(seed):
        weight = weights.to(tokens.hidden.device)[tokens.experts][:, None]
        weighted = (tokens.hidden * weight).double()
        gram += weighted.mT @ tokens.hidden.double()
        cross += weighted.mT @ (_one_hot(tokens, seed.num_experts).double() - 1 / seed.num_experts)
        kept.add(tokens)
    penalty = seed.settings.ridge * gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    vectors = torch.linalg.solve(gram + torch.diag_embed(penalty[:, None].expand(-1, hidden)), cross).mT.float().cpu()
    return Start(list(vectors), kept.take(), seed.num_tokens)


def upit(seed: Seed) -> Start:
    """The paper's pre-optimisation: each expert's vectors learn to say yes to its own samples (UpIT, section 3)."""
    vectors, log = preoptimise(
        seed.model, seed.samples, seed.pairs, seed.random, seed.settings, seed.pad_token_id, seed.seed
    )
    passes = seed.settings.epochs * seed.num_tokens
    return Start(vectors, None, passes, passes, log)


def contrastive(seed: Seed) -> Start:
    """Softmax cross-entropy of each token's own expert against the others: what `upit` lacks, negatives.

    The experts are fixed, so the router inputs are too: they are read once, and the vectors are trained on them for
    `epochs` passes without the model. `alpha` has no meaning here, there is no language-model loss.
    """
    sample = _sample(seed)
    vectors = torch.stack(list(seed.random)).requires_grad_()
    optimizer = torch.optim.AdamW([vectors], lr=seed.settings.learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed.seed)
    weights = _weights(torch.bincount(sample.experts, minlength=seed.num_experts))
    log = []
    for _ in range(seed.settings.epochs):
        losses = []
        shuffled = torch.randperm(len(sample.experts), generator=order)
        for chosen in (shuffled[i : i + CONTRASTIVE_BATCH] for i in range(0, len(shuffled), CONTRASTIVE_BATCH)):
            logits = sample.hidden[:, chosen] @ vectors.mT  # (L, T, E)
            targets = sample.experts[chosen].expand(len(logits), -1)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=weights)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        log.append({"contrastive_loss": sum(losses) / len(losses)})
    return Start(list(vectors.detach()), sample, seed.num_tokens, 0, log)


CONTRASTIVE_BATCH = 256
"""Tokens per step of the contrastive start."""

STARTS: dict[str, Callable[[Seed], Start]] = {
    "random": random,
    "mean_hidden": mean_hidden,
    "kmeans": kmeans,
    "ridge": ridge,
    "upit": upit,
    "contrastive": contrastive,
}


def start(seed: Seed) -> Start:
    """The start that the settings name; with equal norms, if asked for; its logits as far apart as `logit_std` says."""
    made, settings = STARTS[seed.settings.start](seed), seed.settings
    if settings.logit_std is None and not settings.equal_norms:
        return made
    read = made.forward_tokens + (seed.num_tokens if made.inputs is None else 0)
    inputs = _sample(seed) if made.inputs is None else made.inputs
    return replace(made, vectors=_scaled(torch.stack(list(made.vectors)), inputs, settings), forward_tokens=read)


def _stream(seed: Seed) -> Iterator[Tokens]:
    settings = seed.settings
    return router_inputs(
        seed.model,
        seed.samples,
        seed.pairs,
        settings.tokens,
        settings.tokens_per_batch,
        seed.pad_token_id,
    )


def _token_sample(seed: Seed) -> TokenSample:
    return TokenSample(MAX_SAMPLED_TOKENS, int(seed.num_read.sum()), seed.seed)


def _sample(seed: Seed) -> Tokens:
    """The router inputs of one pass, or of so many of its tokens as are kept."""
    kept = _token_sample(seed)
    for tokens in _stream(seed):
        kept.add(tokens)
    return kept.take()


def _weights(counts: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    """Weights with which each expert counts the same, however many tokens it has; their mean over tokens is 1."""
    return counts.sum() / (len(counts) * counts.clamp(min=1))


def _one_hot(tokens: Tokens, num_experts: int) -> Float[Tensor, "T E"]:
    return torch.nn.functional.one_hot(tokens.experts, num_experts).to(tokens.hidden)


def _centred(vectors: Float[Tensor, "L E H"]) -> Float[Tensor, "L E H"]:
    return vectors - vectors.mean(dim=1, keepdim=True)


def _scaled(vectors: Float[Tensor, "L E H"], sample: Tokens, settings: RouteSettings) -> list[Float[Tensor, "E H"]]:
    """With equal norms, if asked for; then so that a layer's logits have the standard deviation `logit_std`."""
    if settings.equal_norms:
        norms = vectors.norm(dim=2, keepdim=True)
        vectors = vectors / norms.clamp(min=1e-12) * norms.mean(dim=1, keepdim=True)
    if settings.logit_std is not None:
        deviations = (sample.hidden @ vectors.mT).std(dim=2).mean(dim=1)  # over experts, mean over tokens
        vectors = vectors * (settings.logit_std / deviations.clamp(min=1e-12))[:, None, None]
    return list(vectors)


def _matched_centroids(hidden: Float[Tensor, "T H"], sample: Tokens, seed: Seed) -> Float[Tensor, "E H"]:
    """The centroids of one layer, in the order of the experts that they are given to."""
    centroids, labels = kmeans2(hidden.double().numpy(), seed.num_experts, minit="++", seed=seed.seed)
    overlap = torch.zeros(seed.num_experts, seed.num_experts)
    overlap.index_put_((sample.experts, torch.from_numpy(labels).long()), torch.ones(len(labels)), accumulate=True)
    share = overlap / overlap.sum(dim=1, keepdim=True).clamp(min=1)
    _, chosen = linear_sum_assignment(share.numpy(), maximize=True)
    return torch.from_numpy(centroids[chosen]).float()
