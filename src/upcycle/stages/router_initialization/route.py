"""Score the seed data, assign them, start the router, measure it on seed data it has not seen."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from upcycle.console import say, table, warn
from upcycle.data.batches import make_batches
from upcycle.data.chat import Sample
from upcycle.data.splits import SeedData
from upcycle.distributed.world import is_main, wait
from upcycle.errors import UpcycleError, counted
from upcycle.experts.kinds import load_for_scoring, load_routers, must_spread, router_keys, save_model
from upcycle.records.files import MOVED, ROUTE_REPORT, ROUTER
from upcycle.records.route import Bucket, Difference, HeldOut, RouteCost, RouteReport, SeedSample
from upcycle.routing.ranking import ranking
from upcycle.routing.routers import granularity, random_routers, router_modules
from upcycle.settings import RouteSettings
from upcycle.stages.router_initialization.assignment import (
    Experts,
    Losses,
    assign,
    assign_unseen,
    bootstrap_gain,
    bucket_table,
    equal_steps,
    fill_empty,
)
from upcycle.stages.router_initialization.scoring import expert_losses
from upcycle.stages.router_initialization.starts import Seed, Start
from upcycle.stages.router_initialization.starts import start as make_start
from upcycle.types import Model
from upcycle.weights.base import Base

DEGENERATE = 1e4
"""Condition number of a router from which on it is called degenerate."""
UNMOVED = 0.9
"""Cosine from which on a trained router is called that which it began from."""


def route(
    base: Base,
    moe: Path,
    seed_data: SeedData,
    names: Sequence[str],
    settings: RouteSettings,
    seed: int,
    out_dir: Path,
) -> RouteReport:
    """Write `router.safetensors` (a (num_experts, hidden) matrix per layer), `report.json`; `moe/` if experts moved.

    Args:
        seed_data: what the router is started from, and what it is measured on.
        names: the experts' names, in order.

    Several processes share the scoring; the first does the rest.

    Raises:
        UpcycleError: fewer seed samples than experts, a loss or a routing vector that is not finite.
    """
    if len(seed_data.fit) < len(names):
        raise UpcycleError(
            f"route: {counted(len(seed_data.fit), 'seed sample')} for {counted(len(names), 'expert')}; raise "
            "route.seed_fraction or route.min_samples_per_expert"
        )
    together = must_spread([moe], base.folder)
    if is_main() or not together:
        moves = settings.expert_learning_rate is not None
        model, losses = load_for_scoring(moe, base.folder, exact=moves), None
        if len(names) > 1:
            scored, limit = [*seed_data.fit, *seed_data.test], settings.tokens_per_batch
            losses = expert_losses(model, scored, limit, base.pad_token_id, not together).double().numpy()
        if is_main():
            _route(base, model, moe, seed_data, losses, names, settings, seed, out_dir)
    wait()
    return ROUTE_REPORT.read(out_dir)


def _route(
    base: Base,
    model: Model,
    moe: Path,
    seed_data: SeedData,
    losses: Losses | None,
    names: Sequence[str],
    settings: RouteSettings,
    seed: int,
    out_dir: Path,
) -> None:
    layers, hidden = len(router_modules(model)), model.config.hidden_size
    random = random_routers(layers, len(names), hidden, settings.init_std, seed)
    if losses is None:
        say("route: one expert: there is nothing to route")
        report = RouteReport(start="random", assignment=settings.assignment, buckets=[], samples=[])
        _save(out_dir / ROUTER.name, sliced(random, granularity(model), 0.0, seed), router_keys(model))
    else:
        start_from = Seed(model, seed_data.fit, [], random, settings, base.pad_token_id, seed)
        report = _start(start_from, seed_data.test, losses, names, out_dir)
        if settings.expert_learning_rate is not None:
            save_model(model, out_dir / MOVED.name, moe)
    ROUTE_REPORT.write(out_dir, report)


def _start(seed: Seed, test: Sequence[Sample], losses: Losses, names: Sequence[str], out_dir: Path) -> RouteReport:
    """Assign, start the router, write it, measure it."""
    fit, settings, limit = seed.samples, seed.settings, seed.settings.tokens_per_batch
    losses, test_losses = losses[: len(fit)], losses[len(fit) :]
    experts = assign(losses, fit, settings.assignment, seed.seed)
    buckets = bucket_table(experts, fit, losses, names)
    domains = [sample.domain for sample in fit]
    difference = bootstrap_gain(losses, domains, seed.seed) if len(set(domains)) > 1 else None
    _show_buckets(buckets, difference)
    pairs = _pairs(experts, losses, names)
    seed = replace(seed, pairs=equal_steps(pairs) if settings.equal_steps else pairs)
    start = make_start(seed)
    cost = _cost(start, [*fit, *test], len(names), settings.start)
    vectors = sliced(start.vectors, granularity(seed.model), settings.slice_noise, seed.seed)
    _save(out_dir / ROUTER.name, vectors, router_keys(seed.model))
    condition = condition_numbers(start.vectors)
    held_out = None
    if test:
        load_routers(seed.model, out_dir / ROUTER.name)
        known = dict(zip((sample.domain for sample in fit), experts.tolist(), strict=True))
        assigned = assign_unseen(test_losses, test, settings.assignment, seed.seed, known)
        batches = make_batches(test, limit, seed.pad_token_id, seed.model.device)
        found = ranking(seed.model, batches, assigned, settings.tokens)
        held_out = HeldOut(**found.model_dump(), assigned=assigned)
        _show_held_out(held_out)
    return RouteReport(
        start=settings.start,
        assignment=settings.assignment,
        buckets=buckets,
        difference=difference,
        samples=[
            SeedSample(where=s.where, domain=s.domain, expert=int(e), losses=row.tolist())
            for s, e, row in zip(fit, experts, losses, strict=True)
        ],
        log=start.log,
        cosine=cosines(start.vectors, seed.random) if start.log else None,
        cost=cost,
        condition=condition,
        held_out=held_out,
    )


def sliced(vectors: Sequence[Float[Tensor, "E H"]], slices: int, noise: float, seed: int) -> list[Float[Tensor, "S H"]]:
    """The vectors of an expert's slices: its own, and what makes them different if they are to be."""
    draw = torch.Generator().manual_seed(seed)
    whole = [layer.repeat_interleave(slices, dim=0) for layer in vectors]
    if slices == 1 or noise == 0:
        return whole
    return [layer + noise * layer.std() * torch.randn(layer.shape, generator=draw) for layer in whole]


def condition_numbers(vectors: Sequence[Float[Tensor, "E H"]]) -> list[float]:
    """Of each layer's router, its mean over experts taken away: how far it is from not telling two experts apart.

    Warns of layers above `DEGENERATE`.
    """
    found = []
    for layer in vectors:
        singular = torch.linalg.svdvals((layer - layer.mean(dim=0)).double())[: len(layer) - 1]
        found.append(float(singular[0] / singular[-1].clamp(min=1e-300)))
    bad = [layer for layer, number in enumerate(found) if number > DEGENERATE]
    if bad:
        warn(
            f"route: the routers of {counted(len(bad), 'layer')} (first: {bad[:4]}) hardly tell some experts apart "
            f"(condition number up to {max(found):.0e}); use a different route.start, or more seed data "
            "(route.min_samples_per_expert)"
        )
    return found


def cosines(vectors: Sequence[Float[Tensor, "E H"]], begun: Sequence[Float[Tensor, "E H"]]) -> list[float]:
    """Of each layer, between a trained router and what it began from, their means over experts taken away.

    Warns of a router that has hardly moved.
    """
    pairs = [[layer - layer.mean(dim=0) for layer in both] for both in zip(vectors, begun, strict=True)]
    found = [torch.cosine_similarity(new.flatten(), old.flatten(), dim=0).item() for new, old in pairs]
    if min(found) > UNMOVED:
        warn(
            f"route: after its training the router is nearly the random one that it began from (cosine "
            f"{min(found):.2f} to {max(found):.2f}); raise route.epochs or route.learning_rate, or give more seed data"
        )
    return found


def _cost(start: Start, scored: Sequence[Sample], num_experts: int, name: str) -> RouteCost:
    """Tokens that went forward and backward through the model, and says so."""
    scoring = num_experts * sum(len(sample.input_ids) for sample in scored)
    forward, backward = counted(start.forward_tokens, "token"), f"{start.backward_tokens:,}"
    say(
        f"route: scoring seed samples under every expert: {counted(scoring, 'token')} forward; router start {name}: "
        f"{forward} forward, {backward} backward"
    )
    return RouteCost(scoring=scoring, forward=start.forward_tokens, backward=start.backward_tokens)


def _pairs(experts: Experts, losses: Losses, names: Sequence[str]) -> list[tuple[int, int]]:
    pairs = list(enumerate(experts.tolist()))
    for expert, chosen in fill_empty(experts, losses).items():
        warn(
            f"route: no seed sample was assigned to expert {expert} ({names[expert]}); its routing vectors learn "
            f"from the {counted(len(chosen), 'sample')} nearest to it (route.assignment=balanced avoids this)"
        )
        pairs += [(sample, expert) for sample in chosen]
    return pairs


def _save(path: Path, vectors: Sequence[Tensor], names: Sequence[str]) -> None:
    for name, vector in zip(names, vectors, strict=True):
        if not torch.isfinite(vector).all():
            raise UpcycleError(f"route: {name} is not finite after pre-optimisation; lower route.learning_rate")
    save_file({n: v.float().contiguous() for n, v in zip(names, vectors, strict=True)}, path)


def _show_buckets(buckets: Sequence[Bucket], difference: Difference | None) -> None:
    domains = sorted({domain for bucket in buckets for domain in bucket.domains})
    rows = [
        (
            f"{b.expert} {b.name}",
            str(b.samples),
            *(str(b.domains.get(domain, 0)) for domain in domains),
            f"{b.mean_loss:.3f}",
            *("-" if value is None else f"{value:.3f}" for value in (b.bucket_loss, b.margin)),
        )
        for b in buckets
    ]
    columns = ("expert", "samples", *domains, "loss on all", "loss on its own", "second best is worse by")
    note = "samples: how many were assigned to the expert, in all and by domain; losses: mean token loss of the answers"
    table("seed samples per expert", columns, rows, note=note)
    if difference is not None:
        _show_difference(difference)
    if max(b.samples for b in buckets) == sum(b.samples for b in buckets):
        warn("route: all seed samples went to one expert; route.assignment=balanced, or seed data held out, avoid this")


def _show_difference(difference: Difference) -> None:
    low, high = difference.interval
    verdict = "experts differ by more than noise" if difference.more_than_noise else "this may be noise"
    change = f"{abs(difference.gain):.4f} {'lower' if difference.gain >= 0 else 'higher'}"
    say(
        f"route: with an expert per domain, chosen on separate samples, the loss is {change} than with the best single "
        f"expert (gain {difference.gain:.4f}, 95% of resamples {low:.4f} to {high:.4f}): {verdict}"
    )


def _show_held_out(found: HeldOut) -> None:
    say(
        f"route: the router ranks the assigned expert first for {found.accuracy:.1%} of "
        f"{counted(found.samples, 'unseen seed sample')} (chance {found.chance:.1%}; always naming the most frequent "
        f"expert would give {found.most_frequent_share:.1%})"
    )
