"""The model card of an exported model: what it was made from, how, and how good it is."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from upcycle.architectures.clients import commands
from upcycle.disk import write_text
from upcycle.pipeline.benchmarks import read_scores
from upcycle.reading import read_json
from upcycle.recipe import Recipe, dump_recipe
from upcycle.records.benchmark import score_table
from upcycle.records.description import Description
from upcycle.records.files import CARD, LINEAGE, MANIFEST, RESULT, SCORES
from upcycle.records.origin import Licence, Origin
from upcycle.records.record import ALL
from upcycle.records.scores import ModelScores, standard_error
from upcycle.settings import DataSettings

PAPER = """@inproceedings{hui2025upcycling,
  title = {Upcycling Instruction Tuning from Dense to Mixture-of-Experts via Parameter Merging},
  author = {Hui and Zhang and Wang and Sun and Wu and Su},
  booktitle = {ACL},
  year = {2025},
  note = {arXiv 2410.01610}
}"""


# six parameters: nothing is looked up here
def write_card(folder: Path, name: str, run: Path, recipe: Recipe, origin: Origin | None, made: Description) -> None:
    """Write the card into an exported model folder.

    Args:
        name: what the folder will be called.
        run: the finished run that it comes from.
        origin: what is known of the base, whose licence is inherited; None if it is gone.
        made: what the folder holds.
    """
    write_text(CARD.of(folder), card_text(folder, name, run, recipe, origin, made))


def _spelt(licence: Licence) -> str:
    """In one line."""
    parts = [", ".join(value) if isinstance(value, list) else value for value in licence.values()]
    return f"{parts[0]} ({', '.join(parts[1:])})" if parts[1:] else parts[0]


def card_text(folder: Path, name: str, run: Path, recipe: Recipe, origin: Origin | None, made: Description) -> str:
    """Metadata, lineage, scores with errors, recipe, versions, citation."""
    licence: dict[str, Any] = dict(origin.licence) if origin else {}
    data = ModelCardData(
        base_model=recipe.base if origin and origin.on_hub else None,
        **licence,
        library_name="transformers" if made.plain else None,
        pipeline_tag="image-text-to-text" if recipe.assemble.keep_vision else "text-generation",
        tags=["moe", "mixture-of-experts", "upcycling", "upit"],
    )
    plan = LINEAGE.read(folder)
    lineage = "\n".join(f"- {_cell(line)}" for line in plan.lines)
    versions = ", ".join(f"{name} {version}" for name, version in MANIFEST.read(RESULT.of(run)).versions.items())
    unknown = "Not stated by the base's folder" if origin else "The base was not found when this was written"
    inherited = f"The base's: {_spelt(licence)}." if licence else f"{unknown}: look it up before you publish."
    return f"""---
{data.to_yaml()}
---

# {name}

{made.what}, made from `{recipe.base}`: {_source(recipe)}

## Lineage of the experts

{lineage}

Children: {plan.merge}, drop rate {plan.drop_rate}, seed {plan.seed}. Similarity: {plan.similarity} of {plan.measured}.

## Scores on held-out rows

{_scores(run)}{_stored(folder, run)}

## Use

{_use(made)}

## Licence and data

{inherited} Training data: {_listed(recipe.data, origin)}.

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


def _use(made: Description) -> str:
    if made.plain:
        warned = "".join(f"\n- {line}" for line in made.warnings)
        lines = f"Any program that loads it with transformers, or:\n\n```sh\n{commands('FOLDER')}\n```"
        return f"{lines}\n{warned}" if warned else lines
    if made.folds:
        return (
            "Fold it into a plain mixture of experts first: `upcycle export FOLDER --fold --to PLAIN` (with its base)."
        )
    return "It loads only with upcycle, on its base: no plain model computes the same."


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
    scores = SCORES.known_of(run)
    if scores is None:
        return "Not evaluated."
    lines = ["| model | loss | exact match |", "| --- | --: | --: |"]
    lines += [f"| {_cell(name)} | {entry.loss[ALL]:.3f} | {_exact(entry)} |" for name, entry in scores.items()]
    if benchmarks := read_scores(run):
        heads, rows = score_table(benchmarks)
        cells = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
        lines += ["", "## Benchmarks (lm-evaluation-harness, * the best)", ""]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in cells]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A name as a cell of a table in Markdown: no bar ends it, no tag is one."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _exact(entry: ModelScores) -> str:
    """With the standard error of a share of that many rows."""
    if not (entry.exact_match and entry.exact_match_rows):
        return ""
    share = entry.exact_match[ALL]
    return f"{share:.1%} +- {standard_error(share, entry.exact_match_rows):.1%}"


def _listed(data: DataSettings, origin: Origin | None) -> str:
    names = origin.data if origin else [Path(source.path).name for source in data.sources(data.train)]
    return ", ".join(f"`{name}`" for name in names)


def _stored(folder: Path, run: Path) -> str:
    """That an export in another dtype was not scored itself."""
    own, scored = (_dtype(path) for path in (folder, RESULT.of(run)))
    return f"\n\nThe weights are stored in {own}; the scores are of the model in {scored}." if own != scored else ""


def _dtype(folder: Path) -> str | None:
    path = folder / "config.json"
    return str(read_json(path).get("dtype")) if path.is_file() else None
