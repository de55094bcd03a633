"""Which expert each seed sample is given to, and how sure that is.

Legend: N samples, E experts, D domains.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from upcycle.data.chat import Sample
from upcycle.errors import UpcycleError, counted
from upcycle.records.route import Bucket, Difference

Losses = NDArray[np.float64]
Experts = NDArray[np.int64]
Domains = Sequence[str]

AT_ONCE = 1024
RESAMPLES = 200


def lowest_loss(losses: Losses, _domains: Domains = (), _seed: int = 0) -> Experts:
    """Each sample to the expert with the lowest loss (UpIT). Collapses onto the last checkpoint on training data."""
    return np.asarray(losses.argmin(axis=1), dtype=np.int64)


def centred(losses: Losses, _domains: Domains = (), _seed: int = 0) -> Experts:
    """Each sample to the expert that is best at it compared with the expert's own mean: favours weak experts."""
    return np.asarray((losses - losses.mean(axis=0)).argmin(axis=1), dtype=np.int64)


def balanced(losses: Losses, _domains: Domains = (), _seed: int = 0) -> Experts:
    """Equal buckets (sizes differ by at most one) of the least total loss; of many samples, of each `AT_ONCE` alone."""
    size = max(1, AT_ONCE // losses.shape[1]) * losses.shape[1]
    return np.concatenate([_balanced(losses[begin : begin + size]) for begin in range(0, len(losses), size)])


def _balanced(losses: Losses) -> Experts:
    """A linear assignment to slots, whose time grows with the cube of the samples."""
    num_samples, num_experts = losses.shape
    slots = np.arange(-(-num_samples // num_experts) * num_experts) % num_experts
    # the last round of slots costs more than any re-arrangement can gain, so no bucket falls below floor(N / E)
    last_round = np.arange(len(slots)) >= num_samples - num_samples % num_experts
    rows, chosen = linear_sum_assignment(losses[:, slots] + last_round * (num_samples * np.ptp(losses) + 1.0))
    experts = np.empty(num_samples, dtype=np.int64)
    experts[rows] = slots[chosen]
    return experts


def by_domain(losses: Losses, domains: Domains, _seed: int = 0) -> Experts:
    """All samples of a domain to one expert, domains spread over the experts evenly, at the least total loss."""
    labels = sorted(set(domains))
    members = np.array([[domain == label for label in labels] for domain in domains], dtype=float)
    mean_losses = (members.T @ losses) / members.sum(axis=0)[:, None]
    expert_of = dict(zip(labels, balanced(mean_losses).tolist(), strict=True))
    return np.array([expert_of[domain] for domain in domains], dtype=np.int64)


def at_random(losses: Losses, _domains: Domains = (), seed: int = 0) -> Experts:
    """Equal buckets, whatever the losses (the paper's ablation)."""
    return balanced(np.random.Generator(np.random.Philox(seed)).random(losses.shape))


ASSIGNMENTS: dict[str, Callable[[Losses, Domains, int], Experts]] = {
    "balanced": balanced,
    "lowest_loss": lowest_loss,
    "centred": centred,
    "domain": by_domain,
    "random": at_random,
}
"""`route.assignment` to its rule; each gets the losses, the samples' domains and a seed."""


def assign(losses: Losses, samples: Sequence[Sample], rule: str, seed: int) -> Experts:
    """Expert of each sample under a rule of `ASSIGNMENTS`.

    Raises:
        UpcycleError: a loss is not finite (the sample is named), or there are no domains to assign by.
    """
    broken = np.argwhere(~np.isfinite(losses))
    if len(broken):
        sample, expert = broken[0]
        raise UpcycleError(f"route: the loss of {samples[sample].where} under expert {expert} is not finite")
    domains = [sample.domain for sample in samples]
    if rule == "domain" and len(set(domains)) < 2:
        raise UpcycleError(
            f"route.assignment=domain: found {counted(len(samples), 'seed row')} of one domain, '{domains[0]}'; give "
            "rows a field `domain`, raise route.min_samples_per_expert, or use a different assignment"
        )
    return ASSIGNMENTS[rule](losses, domains, seed)


def assign_unseen(
    losses: Losses, samples: Sequence[Sample], rule: str, seed: int, known: Mapping[str, int]
) -> list[int]:
    """Expert of each sample that only measures the router.

    Args:
        known: the expert of each domain among the samples that start the router; with the rule `domain` it is that of
            the unseen ones too, and of a domain that is not there, the expert with the lowest loss.
    """
    if rule != "domain":
        return [int(expert) for expert in assign(losses, samples, rule, seed)]
    best = losses.argmin(axis=1)
    return [known.get(sample.domain, int(expert)) for sample, expert in zip(samples, best, strict=True)]


def fill_empty(experts: Experts, losses: Losses) -> dict[int, list[int]]:
    """For each expert without a sample: the samples nearest to being its own, by margin to the best expert.

    They are used in addition; the samples stay where they are.
    """
    size = max(1, len(losses) // losses.shape[1] // 2)
    margins = losses - losses.min(axis=1, keepdims=True)
    empty = sorted(set(range(losses.shape[1])) - set(experts.tolist()))
    return {expert: np.argsort(margins[:, expert], kind="stable")[:size].tolist() for expert in empty}


def equal_steps(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs with those of small buckets repeated in turn, until every expert has as many as the largest."""
    buckets: dict[int, list[tuple[int, int]]] = {}
    for pair in pairs:
        buckets.setdefault(pair[1], []).append(pair)
    most = max(map(len, buckets.values()))
    return [bucket[i % len(bucket)] for bucket in buckets.values() for i in range(most)]


def margins(losses: Losses) -> NDArray[np.float64]:
    """(N,) how much the second-best expert of each sample is worse than its best: what an assignment can decide."""
    two = np.partition(losses, 1, axis=1)[:, :2]
    return np.asarray(two[:, 1] - two[:, 0])


def bootstrap_gain(losses: Losses, domains: Domains, seed: int) -> Difference:
    """Do experts differ by more than noise? What choosing an expert per domain gains over the best single expert.

    In each of `RESAMPLES` bootstrap resamples both choices are made on the drawn samples, and the gain (difference of
    mean losses) is measured on those that were not drawn: so choosing the best of many after the fact counts for
    nothing. `interval` holds 95% of the resamples: experts differ by more than noise if it lies above 0.
    """
    draw = np.random.Generator(np.random.Philox(seed))
    labels = np.unique(np.array(domains), return_inverse=True)[1]
    gains = []
    for _ in range(RESAMPLES):
        drawn = draw.integers(len(losses), size=len(losses))
        rest = np.setdiff1d(np.arange(len(losses)), drawn)
        if not len(rest):
            continue
        best = int(losses[drawn].mean(axis=0).argmin())
        chosen = _best_by_domain(losses[drawn], labels[drawn], best, int(labels.max()) + 1)
        gains.append(losses[rest, best].mean() - losses[rest, chosen[labels[rest]]].mean())
    low, high = np.percentile(gains, (2.5, 97.5)) if gains else (float("nan"),) * 2
    return Difference(gain=float(np.mean(gains)), interval=[float(low), float(high)], more_than_noise=bool(low > 0))


def _best_by_domain(losses: Losses, labels: NDArray[np.int64], default: int, num_domains: int) -> Experts:
    sums = np.zeros((num_domains, losses.shape[1]))
    np.add.at(sums, labels, losses)
    seen = np.isin(np.arange(num_domains), labels)
    return np.where(seen, sums.argmin(axis=1), default)


def bucket_table(experts: Experts, samples: Sequence[Sample], losses: Losses, names: Sequence[str]) -> list[Bucket]:
    """Per expert: size of its bucket, by domain; mean loss on all seed data and on its own; mean margin there."""
    gaps = margins(losses)
    rows = []
    for expert, name in enumerate(names):
        own = np.flatnonzero(experts == expert)
        rows.append(
            Bucket(
                expert=expert,
                name=name,
                samples=len(own),
                domains=dict(sorted(Counter(samples[int(i)].domain for i in own).items())),
                mean_loss=float(losses[:, expert].mean()),
                bucket_loss=float(losses[own, expert].mean()) if len(own) else None,
                margin=float(gaps[own].mean()) if len(own) else None,
            )
        )
    return rows
