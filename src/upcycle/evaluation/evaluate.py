"""The evaluation of a run: base, checkpoints and mixture of experts on the same held-out rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle.artifacts import write_json
from upcycle.console import table
from upcycle.data.chat import Sample
from upcycle.evaluation.score import ALL, score
from upcycle.models.folders import compute_dtype, load_model, load_routers, pick_device
from upcycle.recipe import EvaluateSettings

SCORES = "scores.json"


@dataclass(frozen=True)
class Candidate:
    """A model to be scored: a folder, and the routing vectors to put into it if they lie apart."""

    name: str
    folder: Path
    is_moe: bool = False
    router: Path | None = None


def evaluate(
    candidates: Sequence[Candidate],
    tokenizer: Any,
    samples: Sequence[Sample],
    settings: EvaluateSettings,
    out_dir: Path,
) -> dict[str, Any]:
    """Score every candidate and write `scores.json`; a model scored before an interruption is not scored again."""
    scores = {}
    for number, candidate in enumerate(candidates):
        done = out_dir / "models" / f"{number}.json"
        if not done.exists():
            done.parent.mkdir(exist_ok=True)
            write_json(done, _score(candidate, tokenizer, samples, settings))
        scores[candidate.name] = json.loads(done.read_text())
    write_json(out_dir / SCORES, scores)
    show_scores(scores)
    return scores


def _score(
    candidate: Candidate, tokenizer: Any, samples: Sequence[Sample], settings: EvaluateSettings
) -> dict[str, Any]:
    device = pick_device()
    model = load_model(candidate.folder, compute_dtype(device), device)
    if candidate.router:
        load_routers(model, candidate.router)
    return score(model, tokenizer, samples, settings, candidate.name, candidate.is_moe)


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


def _domains(values: dict[str, Any]) -> list[str]:
    return [ALL, *sorted(d for d in values if d != ALL)]
