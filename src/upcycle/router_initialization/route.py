"""Stage 3: score the seed data, assign them, start the router, measure it on seed data it has not seen."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from upcycle.artifacts import write_json
from upcycle.console import say, table, warn
from upcycle.data.batches import make_batches
from upcycle.data.chat import Sample
from upcycle.errors import UpcycleError
from upcycle.models.families import family_of_moe
from upcycle.models.folders import compute_dtype, load_model, load_routers, pick_device
from upcycle.models.forward import answer_losses
from upcycle.models.layouts import router_tensors
from upcycle.models.routers import RouterRecorder, random_routers
from upcycle.recipe import RouteSettings
from upcycle.router_initialization.assignment import Experts, Losses, assign, fill_empty
from upcycle.router_initialization.preoptimise import preoptimise, token_mask
from upcycle.router_initialization.scoring import expert_losses

ROUTER = "router.safetensors"


def route(
    moe: Path,
    fit: Sequence[Sample],
    test: Sequence[Sample],
    names: Sequence[str],
    settings: RouteSettings,
    pad_token_id: int,
    seed: int,
    out_dir: Path,
) -> dict[str, Any]:
    """Write `router.safetensors` (a (num_experts, hidden) matrix per layer) and `report.json`.

    Args:
        fit, test: seed samples to start the router from, and to measure it on.
        names: the experts' names, in order.

    Raises:
        UpcycleError: fewer seed samples than experts, a loss or a routing vector that is not finite.
    """
    if len(fit) < len(names):
        raise UpcycleError(
            f"route: {len(fit)} seed samples for {len(names)} experts; raise route.seed_fraction or "
            "route.min_samples_per_expert"
        )
    device = pick_device()
    model = load_model(moe, compute_dtype(device), device)
    config = model.config.to_dict()
    start = random_routers(config["num_hidden_layers"], len(names), config["hidden_size"], settings.init_std, seed)
    scored = [*fit, *test]
    losses = expert_losses(model, scored, len(names), settings.tokens_per_batch, pad_token_id).double().numpy()
    experts = assign(losses[: len(fit)], fit, settings.assignment)
    report: dict[str, Any] = {
        "start": settings.start,
        "assignment": settings.assignment,
        "buckets": bucket_table(experts, fit, losses[: len(fit)], names),
        "samples": [
            {"where": s.where, "domain": s.domain, "expert": int(e), "losses": row.tolist()}
            for s, e, row in zip(fit, experts, losses, strict=False)
        ],
    }
    _show_buckets(report["buckets"])
    vectors = start
    if settings.start == "upit":
        pairs = _pairs(experts, losses[: len(fit)], names)
        vectors, report["log"] = preoptimise(model, fit, pairs, start, settings, pad_token_id, seed)
    _save(out_dir / ROUTER, vectors, router_tensors(family_of_moe(config).moe_layout, config))
    if test:
        load_routers(model, out_dir / ROUTER)
        expected = assign(losses[len(fit) :], test, settings.assignment)
        report["held_out"] = measure(model, test, expected, settings, pad_token_id)
        _show_held_out(report["held_out"], len(names))
    write_json(out_dir / "report.json", report)
    return report


def bucket_table(
    experts: Experts, samples: Sequence[Sample], losses: Losses, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Per expert: size of its bucket, by domain; its mean loss on all seed data and on its own bucket."""
    rows = []
    for expert, name in enumerate(names):
        own = np.flatnonzero(experts == expert)
        rows.append(
            {
                "expert": expert,
                "name": name,
                "samples": len(own),
                "domains": dict(sorted(Counter(samples[int(i)].domain for i in own).items())),
                "mean_loss": float(losses[:, expert].mean()),
                "bucket_loss": float(losses[own, expert].mean()) if len(own) else None,
            }
        )
    return rows


@torch.no_grad()
def measure(
    model: Any, samples: Sequence[Sample], expected: Experts, settings: RouteSettings, pad_token_id: int
) -> dict[str, Any]:
    """How often the router ranks the assigned expert of unseen seed samples first, per layer and overall.

    A sample's rank is by its mean router probability over `settings.tokens`; overall, over the layers too.
    """
    probabilities = []
    order: list[int] = []
    with RouterRecorder(model) as recorder:
        for batch in make_batches(samples, settings.tokens_per_batch, pad_token_id, model.device):
            recorder.clear()
            mask = token_mask(batch, answer_losses(model, batch)[1], settings.tokens)
            probabilities.append(torch.stack([_mean_probability(layer, mask) for layer in recorder.logits], dim=1))
            order += batch.indices
    ranked = torch.cat(probabilities).cpu()  # (samples, layers, experts)
    truth = torch.from_numpy(expected)[order]
    return {
        "samples": len(samples),
        "accuracy": float((ranked.mean(dim=1).argmax(dim=1) == truth).float().mean()),
        "accuracy_by_layer": (ranked.argmax(dim=2) == truth[:, None]).float().mean(dim=0).tolist(),
        "most_frequent_share": float(np.bincount(expected).max() / len(expected)),
    }


def _mean_probability(logits: Float[Tensor, "T E"], mask: Tensor) -> Float[Tensor, "B E"]:
    probabilities = torch.softmax(logits.float(), dim=-1).view(*mask.shape, -1)
    return (probabilities * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)


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


def _show_buckets(buckets: Sequence[dict[str, Any]]) -> None:
    domains = sorted({domain for bucket in buckets for domain in bucket["domains"]})
    rows = [
        (
            f"{b['expert']} {b['name']}",
            str(b["samples"]),
            *(str(b["domains"].get(domain, 0)) for domain in domains),
            f"{b['mean_loss']:.3f}",
            f"{b['bucket_loss']:.3f}" if b["samples"] else "-",
        )
        for b in buckets
    ]
    table("seed samples per expert", ("expert", "samples", *domains, "loss on all", "loss on its own"), rows)


def _show_held_out(report: dict[str, Any], num_experts: int) -> None:
    say(
        f"route: on {report['samples']} unseen seed samples the router ranks the assigned expert first in "
        f"{report['accuracy']:.1%} (chance {1 / num_experts:.1%}, always the most frequent one "
        f"{report['most_frequent_share']:.1%})"
    )
