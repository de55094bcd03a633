"""The evaluation of a run: base, checkpoints and mixture of experts on the same held-out rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from upcycle.artifacts import write_json
from upcycle.console import say, table
from upcycle.data.chat import Sample
from upcycle.evaluation.routing import regressions, routing_metrics, specialisation
from upcycle.evaluation.score import ALL, score
from upcycle.models.folders import compute_dtype, load_model, load_routers, pick_device
from upcycle.models.ranking import ranking
from upcycle.settings import EvaluateSettings

SCORES = "scores.json"
ROUTING = "routing.json"


@dataclass(frozen=True)
class Candidate:
    """A model to be scored: a folder, and the routing vectors to put into it if they lie apart."""

    name: str
    folder: Path
    is_moe: bool = False
    router: Path | None = None
    base: Path | None = None
    """The dense model of adapters."""


@dataclass(frozen=True)
class Assigned:
    """Seed samples that no router was started from, and the expert that each was assigned to."""

    samples: Sequence[Sample]
    experts: list[int]
    tokens: str
    """Which tokens count, `answer` or `all`."""


def evaluate(
    candidates: Sequence[Candidate],
    tokenizer: Any,
    samples: Sequence[Sample],
    settings: EvaluateSettings,
    out_dir: Path,
    assigned: Assigned | None = None,
) -> dict[str, Any]:
    """Score every candidate; a model scored before an interruption is not scored again.

    Writes `scores.json` (losses, exact match, share of tokens per expert) and `routing.json` (what the routers do with
    it, what the MoE lost against the best expert of each domain, and against the dense model that it came from).
    """
    scores = {}
    for number, candidate in enumerate(candidates):
        done = out_dir / "models" / f"{number}.json"
        if not done.exists():
            done.parent.mkdir(exist_ok=True)
            write_json(done, _score(candidate, tokenizer, samples, settings, assigned))
        scores[candidate.name] = json.loads(done.read_text())
    routing = {name: entry.pop("routing") for name, entry in scores.items() if "routing" in entry}
    routing |= against_dense(scores)
    write_json(out_dir / SCORES, scores)
    write_json(out_dir / ROUTING, routing)
    show_scores(scores)
    show_routing(routing)
    return scores


def _score(
    candidate: Candidate,
    tokenizer: Any,
    samples: Sequence[Sample],
    settings: EvaluateSettings,
    assigned: Assigned | None,
) -> dict[str, Any]:
    device = pick_device()
    model = load_model(candidate.folder, compute_dtype(device), device, candidate.base)
    if candidate.router:
        load_routers(model, candidate.router)
    result = score(model, tokenizer, samples, settings, candidate.name, candidate.is_moe)
    if candidate.is_moe:
        shares = result["expert_share"]
        result["routing"] = {"by_domain": routing_metrics(shares), "specialisation": specialisation(shares, ALL)}
        if assigned:
            limit, pad = settings.tokens_per_batch, tokenizer.pad_token_id
            agreement = ranking(model, assigned.samples, assigned.experts, assigned.tokens, limit, pad)
            result["routing"]["agreement"] = agreement
    return result


def against_dense(scores: dict[str, Any]) -> dict[str, Any]:
    """What the MoE lost against the last checkpoint at step 0, and in the end against the best expert per domain."""
    moes = [name for name, entry in scores.items() if "expert_share" in entry]
    dense = {name: entry["loss"] for name, entry in scores.items() if name not in moes and name != "base"}
    if not moes or not dense:
        return {}
    last = list(dense)[-1]
    start, came_from = scores[moes[0]]["loss"][ALL], dense[last][ALL]
    step_0 = {"loss": start, "dense": last, "dense_loss": came_from, "difference": start - came_from}
    return {"step_0": step_0, "against_best_expert": regressions(scores[moes[-1]]["loss"], dense)}


def best_checkpoint(scores: dict[str, Any]) -> str | None:
    """The checkpoint with the lowest held-out loss: chosen after the fact, so it flatters the checkpoints."""
    checkpoints = [n for n, s in scores.items() if "expert_share" not in s and n != "base"]
    return min(checkpoints, key=lambda name: scores[name]["loss"][ALL], default=None)


def show_scores(scores: dict[str, Any]) -> None:
    """The tables on the terminal: loss, exact match, share of tokens per expert, by domain."""
    best = best_checkpoint(scores)
    for metric, title, pattern in (
        ("loss", "held-out loss (mean token loss of the answer; lower is better)", "{:.3f}"),
        ("exact_match", "exact match of greedy answers (higher is better)", "{:.1%}"),
    ):
        measured = {name: s[metric] for name, s in scores.items() if s.get(metric)}
        if measured:
            _show_metric(title, measured, pattern, best)
    for name, entry in scores.items():
        if "expert_share" in entry:
            _show_shares(name, entry["expert_share"])


def _show_metric(title: str, measured: dict[str, Any], pattern: str, best: str | None) -> None:
    domains = _domains(next(iter(measured.values())))
    rows = [
        (f"{name} (best)" if name == best else name, *(pattern.format(values[d]) for d in domains))
        for name, values in measured.items()
    ]
    table(title, ("model", *domains), rows)


def _show_shares(name: str, shares: dict[str, Any]) -> None:
    """Mean over layers; 1 / num_experts each when balanced."""
    num_experts = len(shares[ALL][0])
    rows = []
    for domain in _domains(shares):
        layers = shares[domain]
        means = [sum(layer[e] for layer in layers) / len(layers) for e in range(num_experts)]
        rows.append((domain, *(f"{share:.1%}" for share in means)))
    table(
        f"{name}: share of tokens per expert, mean over layers (balanced: {1 / num_experts:.1%})",
        ("domain", *(f"E{e}" for e in range(num_experts))),
        rows,
    )


def show_routing(routing: dict[str, Any]) -> None:
    """Balance and specialisation, mean over layers; losses against the dense models."""
    rows = []
    for name, entry in routing.items():
        if "by_domain" in entry:
            whole = entry["by_domain"][ALL]
            means = [fmean(values) for values in (whole["entropy"], whole["max_over_mean"], entry["specialisation"])]
            agreement = entry.get("agreement")
            shown = f"{agreement['accuracy']:.1%} ({agreement['chance']:.1%})" if agreement else ""
            rows.append((name, *(f"{mean:.3f}" for mean in means), f"{sum(whole['dead']):.0f}", shown))
    columns = ("model", "entropy", "max over mean load", "specialisation", "dead", "ranks assigned first (chance)")
    if rows:
        table("routing, mean over layers", columns, rows)
    if "step_0" in routing:
        step_0, worse = routing["step_0"], routing["against_best_expert"]
        say(
            f"before post-training the MoE's loss is {step_0['difference']:+.3f} against {step_0['dense']}, which it "
            "came from; after it, by domain against the best single expert: "
            + ", ".join(f"{domain} {entry['loss_above_it']:+.3f}" for domain, entry in sorted(worse.items()))
        )


def _domains(values: dict[str, Any]) -> list[str]:
    return [ALL, *sorted(d for d in values if d != ALL)]
