"""The evaluation of a run: base, checkpoints and mixture of experts on the same held-out rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from upcycle.console import say, table
from upcycle.data.batches import make_batches
from upcycle.data.chat import Sample
from upcycle.distributed.world import is_main, share, wait
from upcycle.evaluation.routing import regressions, routing_metrics, specialisation
from upcycle.evaluation.score import score
from upcycle.experts.kinds import load_for_scoring, load_routers, must_spread
from upcycle.records.files import ROUTING, SCORES, scored_model
from upcycle.records.record import ALL, ByDomain, Shares, read_record, write_record
from upcycle.records.scores import (
    AGAINST_BEST,
    STEP_0,
    AgainstDense,
    ModelRouting,
    ModelScores,
    Routing,
    Scored,
    Scores,
    best_checkpoint,
    checkpoint_names,
)
from upcycle.routing.ranking import ranking
from upcycle.settings import EvaluateSettings
from upcycle.weights.base import Base

ROUTING_NOTE = (
    "entropy: 1 if all experts get the same load, 0 if one gets all; max over mean load: of the busiest expert; "
    "specialisation: 0 if every domain is routed alike; dead: experts with hardly any load, summed over layers"
)


@dataclass(frozen=True)
class Candidate:
    """A model to be scored: a folder, and the routing vectors to put into it if they lie apart."""

    name: str
    folder: Path
    router: Path | None = None


@dataclass(frozen=True)
class Assigned:
    """Seed samples that no router was started from, and the expert that each was assigned to."""

    samples: Sequence[Sample]
    experts: list[int]
    tokens: str
    """Which tokens count, `answer` or `all`."""


def evaluate(
    base: Base,
    candidates: Sequence[Candidate],
    samples: Sequence[Sample],
    settings: EvaluateSettings,
    out_dir: Path,
    assigned: Assigned | None = None,
    one_run: bool = True,
) -> Scores:
    """Score every candidate; a model scored before an interruption is not scored again. Several processes share them.

    Writes `scores.json` (losses, exact match, share of tokens per expert) and `routing.json` (what the routers do with
    it, what the MoE lost against the best expert of each domain, and against the dense model that it came from).

    Args:
        one_run: whether the checkpoints are those of one training, so that the last is what the MoE came from.
    """
    places = [scored_model(out_dir, number) for number in range(len(candidates))]
    together = must_spread([candidate.folder for candidate in candidates], base.folder)
    for candidate, place in share([*zip(candidates, places, strict=True)], together):
        if not place.exists():
            place.parent.mkdir(exist_ok=True)
            write_record(place, _score(base, candidate, samples, settings, assigned))
    wait()
    found = {candidate.name: read_record(place, Scored) for candidate, place in zip(candidates, places, strict=True)}
    scores: Scores = {
        name: ModelScores(**{field: getattr(entry, field) for field in ModelScores.model_fields})
        for name, entry in found.items()
    }
    routing: Routing = {name: entry.routing for name, entry in found.items() if entry.routing is not None}
    routing |= against_dense(scores, one_run)
    if is_main():
        SCORES.write(out_dir, scores)
        ROUTING.write(out_dir, routing)
    show_scores(scores)
    show_routing(routing)
    return scores


def _score(
    base: Base,
    candidate: Candidate,
    samples: Sequence[Sample],
    settings: EvaluateSettings,
    assigned: Assigned | None,
) -> Scored:
    model = load_for_scoring(candidate.folder, base.folder)
    if candidate.router:
        load_routers(model, candidate.router)
    scores = score(model, base.tokenizer, samples, settings, candidate.name)
    routing = None
    if scores.expert_share is not None:
        agreement = None
        if assigned:
            batches = make_batches(assigned.samples, settings.tokens_per_batch, base.pad_token_id, model.device)
            agreement = ranking(model, batches, assigned.experts, assigned.tokens)
        shares = scores.expert_share
        routing = ModelRouting(
            by_domain=routing_metrics(shares), specialisation=specialisation(shares, ALL), agreement=agreement
        )
    return Scored(**dict(scores), routing=routing)


def against_dense(scores: Scores, one_run: bool) -> Routing:
    """What the MoE lost against the last checkpoint at step 0, and in the end against the best expert per domain."""
    moes = [name for name, entry in scores.items() if entry.expert_share is not None]
    dense = {name: scores[name].loss for name in checkpoint_names(scores)}
    if not moes or not dense:
        return {}
    last = list(dense)[-1]
    start, came_from = scores[moes[0]].loss[ALL], dense[last][ALL]
    step_0 = AgainstDense(loss=start, dense=last, dense_loss=came_from, difference=start - came_from)
    return {**({STEP_0: step_0} if one_run else {}), AGAINST_BEST: regressions(scores[moes[-1]].loss, dense)}


def show_scores(scores: Scores) -> None:
    """The tables on the terminal: loss, exact match, share of tokens per expert, by domain."""
    best = best_checkpoint(scores)
    losses = {name: entry.loss for name, entry in scores.items()}
    matches = {name: entry.exact_match for name, entry in scores.items() if entry.exact_match}
    _show_metric("held-out loss (mean token loss of the answer; lower is better)", losses, "{:.3f}", best)
    if matches:
        _show_metric("exact match of greedy answers (higher is better)", matches, "{:.1%}", best)
    for name, entry in scores.items():
        if entry.expert_share is not None:
            _show_shares(name, entry.expert_share)


def _show_metric(title: str, measured: Mapping[str, ByDomain], pattern: str, best: str | None) -> None:
    domains = _domains(next(iter(measured.values())))
    rows = [
        (f"{name} (best)" if name == best else name, *(pattern.format(values[d]) for d in domains))
        for name, values in measured.items()
    ]
    table(title, ("model", *domains), rows)


def _show_shares(name: str, shares: Mapping[str, Shares]) -> None:
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


def show_routing(routing: Routing) -> None:
    """Balance and specialisation, mean over layers; losses against the dense models."""
    rows = []
    for name, entry in routing.items():
        if isinstance(entry, ModelRouting):
            whole, agreement = entry.by_domain[ALL], entry.agreement
            means = [fmean(values) for values in (whole.entropy, whole.max_over_mean, entry.specialisation)]
            shown = f"{agreement.accuracy:.1%} ({agreement.chance:.1%})" if agreement else ""
            rows.append((name, *(f"{mean:.3f}" for mean in means), f"{sum(whole.dead)}", shown))
    columns = ("model", "entropy", "max over mean load", "specialisation", "dead", "ranks assigned first (chance)")
    if rows:
        table("routing, mean over layers", columns, rows, note=ROUTING_NOTE)
    step_0, worse = routing.get(STEP_0), routing.get(AGAINST_BEST)
    if isinstance(step_0, AgainstDense):
        difference = f"{step_0.difference:+.3f} against {step_0.dense}"
        say(f"before post-training the MoE's loss is {difference}, which it came from")
    if isinstance(worse, dict):
        listed = ", ".join(f"{domain} {entry.loss_above_it:+.3f}" for domain, entry in sorted(worse.items()))
        say(f"after post-training, by domain against the best single expert: {listed}")


def _domains(values: Mapping[str, object]) -> list[str]:
    return [ALL, *sorted(d for d in values if d != ALL)]
