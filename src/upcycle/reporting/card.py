"""The model card of an exported model: what it was made from, how, and how good it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle.artifacts import ExpansionPlan, read_manifest
from upcycle.evaluation.benchmark import read_scores, score_table
from upcycle.models.clients import commands
from upcycle.models.folders import LINEAGE
from upcycle.recipe import Recipe, dump_recipe
from upcycle.reporting.inspect import expert_line
from upcycle.reporting.report import standard_error

CARD = "README.md"
PAPER = """@inproceedings{hui2025upcycling,
  title = {Upcycling Instruction Tuning from Dense to Mixture-of-Experts via Parameter Merging},
  author = {Hui and Zhang and Wang and Sun and Wu and Su},
  booktitle = {ACL},
  year = {2025},
  note = {arXiv 2410.01610}
}"""


def write_card(folder: Path, run: Path, recipe: Recipe, base: Path) -> None:
    """Write README.md into an exported model folder.

    Args:
        run: the finished run that it comes from.
        base: the dense model's folder, whose licence is inherited.
    """
    (folder / CARD).write_text(card_text(folder, run, recipe, licence_of(base)))


def licence_of(base: Path) -> str | None:
    """What the base's own model card says; None if it has none."""
    from huggingface_hub import ModelCard

    if not (base / CARD).is_file():
        return None
    licence = ModelCard.load(base / CARD).data.license
    return str(licence) if licence else None


def card_text(folder: Path, run: Path, recipe: Recipe, licence: str | None) -> str:
    """Metadata, lineage, scores with errors, recipe, versions, citation."""
    from huggingface_hub import ModelCardData

    compact = not (folder / "config.json").is_file()
    data = ModelCardData(
        base_model=recipe.base if recipe.base.count("/") == 1 and not Path(recipe.base).exists() else None,
        license=licence,
        library_name=None if compact else "transformers",
        pipeline_tag="text-generation",
        tags=["moe", "mixture-of-experts", "upcycling", "upit"],
    )
    plan = ExpansionPlan.load(folder / LINEAGE)
    kind = _kind(folder, plan, compact)
    lineage = "\n".join(f"- {expert_line(i, expert)}" for i, expert in enumerate(plan.experts))
    manifest = read_manifest(run / "posttrain")
    assert manifest is not None
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    inherited = (
        f"The base's: {licence}." if licence else "Not stated by the base's folder: look it up before you publish."
    )
    return f"""---
{data.to_yaml()}
---

# {folder.name}

{kind}, made of `{recipe.base}`: {_source(recipe)}

## Lineage of the experts

{lineage}

Children: {plan.merge}, drop rate {plan.drop_rate}, seed {plan.seed}. Similarity: {plan.similarity} of task vectors.

## Scores on held-out rows

{_scores(run)}

## Use

{_use(compact)}

## Licence and data

{inherited} Training data: {_listed(recipe.data.train)}.

## Reproduce

Save as `recipe.yaml`, then `upcycle run recipe.yaml --run FOLDER` ({versions}):

```yaml
{dump_recipe(recipe).strip()}
```

## Cite

```bibtex
{PAPER}
```
"""


def _use(compact: bool) -> str:
    if compact:
        return (
            "Fold it into a plain mixture of experts first: `upcycle export FOLDER --fold --to PLAIN` (with its base)."
        )
    return f"Any program that loads it with transformers, or:\n\n```sh\n{commands('FOLDER')}\n```"


def _kind(folder: Path, plan: ExpansionPlan, compact: bool) -> str:
    if compact:
        return f"A mixture of {len(plan.experts)} adapters in compact form (it needs its base and upcycle)"
    config = json.loads((folder / "config.json").read_text())
    return f"A {config['model_type']} mixture of {len(plan.experts)} experts, top-{config['num_experts_per_tok']}"


def _source(recipe: Recipe) -> str:
    if recipe.expand.copies_of != "none":
        return f"all experts begin as copies of the {recipe.expand.copies_of} model."
    if recipe.prepare.checkpoints:
        return "the checkpoints of one fine-tuning run became its experts (UpIT, arXiv 2410.01610)."
    if recipe.prepare.by_domain:
        return f"a training ({recipe.prepare.train}) for each domain of the data gave its experts."
    return (
        f"checkpoints of one instruction tuning ({recipe.prepare.train}) became its experts (UpIT, arXiv 2410.01610)."
    )


def _scores(run: Path) -> str:
    path = run / "evaluate" / "scores.json"
    if not path.is_file():
        return "Not evaluated."
    scores = json.loads(path.read_text())
    benchmarks = read_scores(run)
    lines = ["| model | loss | exact match |", "| --- | --: | --: |"]
    lines += [f"| {name} | {_loss(entry)} | {_exact(entry)} |" for name, entry in scores.items()]
    if benchmarks:
        heads, rows = score_table(benchmarks)
        cells = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
        lines += ["", "## Benchmarks (lm-evaluation-harness, * the best)", ""]
        lines += [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join(lines)


def _loss(entry: Mapping[str, Any]) -> str:
    return f"{entry['loss']['all']:.3f}"


def _exact(entry: Mapping[str, Any]) -> str:
    """With the standard error of a share of that many rows."""
    if not entry.get("exact_match_rows"):
        return ""
    share, rows = entry["exact_match"]["all"], entry["exact_match_rows"]
    return f"{share:.1%} +- {standard_error(share, rows):.1%}"


def _listed(sources: str | list[str]) -> str:
    names = [sources] if isinstance(sources, str) else sources
    return ", ".join(f"`{Path(name).name if Path(name).exists() else name}`" for name in names)
