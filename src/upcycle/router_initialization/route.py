"""Stage 3: score the seed data, assign them, start the router, measure it on seed data it has not seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from upcycle.artifacts import write_json
from upcycle.console import say, table, warn
from upcycle.data.chat import Sample
from upcycle.errors import UpcycleError
from upcycle.models.folders import compute_dtype, load_model, load_routers, pick_device, router_keys, save_model
from upcycle.models.ranking import ranking
from upcycle.models.routers import random_routers
from upcycle.router_initialization.assignment import (
    Experts,
    Losses,
    assign,
    bootstrap_gain,
    bucket_table,
    equal_steps,
    fill_empty,
)
from upcycle.router_initialization.scoring import expert_losses
from upcycle.router_initialization.starts import STARTS, Seed, Start
from upcycle.settings import RouteSettings

ROUTER = "router.safetensors"
MOVED = "moe"
"""Folder of the MoE if its experts moved."""
DEGENERATE = 1e4
"""Condition number of a router from which on it is called degenerate."""


def route(
    moe: Path,
    fit: Sequence[Sample],
    test: Sequence[Sample],
    names: Sequence[str],
    settings: RouteSettings,
    pad_token_id: int,
    seed: int,
    out_dir: Path,
    base: Path | None = None,
) -> dict[str, Any]:
    """Write `router.safetensors` (a (num_experts, hidden) matrix per layer), `report.json`; `moe/` if experts moved.

    Args:
        fit, test: seed samples to start the router from, and to measure it on.
        names: the experts' names, in order.
        base: the dense model of a mixture of adapters.

    Raises:
        UpcycleError: fewer seed samples than experts, a loss or a routing vector that is not finite.
    """
    if len(fit) < len(names):
        raise UpcycleError(
            f"route: {len(fit)} seed samples for {len(names)} experts; raise route.seed_fraction or "
            "route.min_samples_per_expert"
        )
    device = pick_device()
    model = load_model(moe, compute_dtype(device), device, base)
    config = model.config.to_dict()
    random = random_routers(config["num_hidden_layers"], len(names), config["hidden_size"], settings.init_std, seed)
    if len(names) == 1:
        say("route: one expert: there is nothing to route")
        _save(out_dir / ROUTER, random, router_keys(model))
        empty: dict[str, Any] = {"start": "random", "assignment": settings.assignment, "buckets": [], "samples": []}
        write_json(out_dir / "report.json", empty)
        return empty
    scored = [*fit, *test]
    losses = expert_losses(model, scored, len(names), settings.tokens_per_batch, pad_token_id).double().numpy()
    experts = assign(losses[: len(fit)], fit, settings.assignment, seed)
    report = _report(experts, fit, losses[: len(fit)], names, settings, seed)
    _show_buckets(report)
    pairs = _pairs(experts, losses[: len(fit)], names)
    pairs = equal_steps(pairs) if settings.equal_steps else pairs
    start = STARTS[settings.start](Seed(model, fit, pairs, random, settings, pad_token_id, seed))
    report["log"], report["cost"] = start.log, _cost(start, scored, len(names), settings.start)
    report["condition"] = condition_numbers(start.vectors)
    _save(out_dir / ROUTER, start.vectors, router_keys(model))
    if test:
        load_routers(model, out_dir / ROUTER)
        expected = assign(losses[len(fit) :], test, settings.assignment, seed)
        report["held_out"] = ranking(
            model, test, expected.tolist(), settings.tokens, settings.tokens_per_batch, pad_token_id
        )
        report["held_out"]["assigned"] = expected.tolist()
        _show_held_out(report["held_out"])
    if settings.expert_learning_rate is not None:
        save_model(model, out_dir / MOVED, moe)
    write_json(out_dir / "report.json", report)
    return report


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
            f"route: the routers of {len(bad)} layers (first: {bad[:4]}) hardly tell some experts apart (condition "
            f"number up to {max(found):.0e}); take another route.start, or more seed data "
            "(route.min_samples_per_expert)"
        )
    return found


def _report(
    experts: Experts, fit: Sequence[Sample], losses: Losses, names: Sequence[str], settings: RouteSettings, seed: int
) -> dict[str, Any]:
    return {
        "start": settings.start,
        "assignment": settings.assignment,
        "buckets": bucket_table(experts, fit, losses, names),
        "difference": bootstrap_gain(losses, [sample.domain for sample in fit], seed),
        "samples": [
            {"where": s.where, "domain": s.domain, "expert": int(e), "losses": row.tolist()}
            for s, e, row in zip(fit, experts, losses, strict=True)
        ],
    }


def _cost(start: Start, scored: Sequence[Sample], num_experts: int, name: str) -> dict[str, int]:
    """Tokens that went forward and backward through the model, and says so."""
    scoring = num_experts * sum(len(sample.input_ids) for sample in scored)
    cost = {"scoring": scoring, "forward": start.forward_tokens, "backward": start.backward_tokens}
    say(
        f"route: scoring took {scoring:,} tokens forward, the start {name} {start.forward_tokens:,} forward and "
        f"{start.backward_tokens:,} backward"
    )
    return cost


def _pairs(experts: Experts, losses: Losses, names: Sequence[str]) -> list[tuple[int, int]]:
    pairs = list(enumerate(experts.tolist()))
    for expert, chosen in fill_empty(experts, losses).items():
        warn(
            f"route: no seed sample was assigned to expert {expert} ({names[expert]}); its routing vectors learn "
            f"from the {len(chosen)} samples nearest to it (route.assignment=balanced avoids this)"
        )
        pairs += [(sample, expert) for sample in chosen]
    return pairs


def _save(path: Path, vectors: Sequence[Tensor], names: Sequence[str]) -> None:
    for name, vector in zip(names, vectors, strict=True):
        if not torch.isfinite(vector).all():
            raise UpcycleError(f"route: {name} is not finite after pre-optimisation; lower route.learning_rate")
    save_file({n: v.float().contiguous() for n, v in zip(names, vectors, strict=True)}, path)


def _show_buckets(report: dict[str, Any]) -> None:
    buckets, difference = report["buckets"], report["difference"]
    domains = sorted({domain for bucket in buckets for domain in bucket["domains"]})
    rows = [
        (
            f"{b['expert']} {b['name']}",
            str(b["samples"]),
            *(str(b["domains"].get(domain, 0)) for domain in domains),
            f"{b['mean_loss']:.3f}",
            *(f"{b[key]:.3f}" if b["samples"] else "-" for key in ("bucket_loss", "margin")),
        )
        for b in buckets
    ]
    columns = ("expert", "samples", *domains, "loss on all", "loss on its own", "second best is worse by")
    table("seed samples per expert", columns, rows)
    low, high = difference["interval"]
    verdict = "experts differ by more than noise" if difference["more_than_noise"] else "this may be noise"
    say(
        "route: an expert per domain, chosen on other samples, beats the best single expert by "
        f"{difference['gain']:.4f} (95% of resamples: {low:.4f} to {high:.4f}): {verdict}"
    )
    if max(b["samples"] for b in buckets) == sum(b["samples"] for b in buckets):
        warn("route: all seed samples went to one expert; route.assignment=balanced, or seed data held out, avoid this")


def _show_held_out(report: dict[str, Any]) -> None:
    say(
        f"route: on {report['samples']} unseen seed samples the router ranks the assigned expert first in "
        f"{report['accuracy']:.1%} (chance {report['chance']:.1%}, always the most frequent one "
        f"{report['most_frequent_share']:.1%})"
    )
