"""Recipes by seeds: each cell is a run folder; what several cells share is made once."""

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from upcycle.console import say
from upcycle.disk import digest
from upcycle.errors import UpcycleError
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.pipeline.stages import stage_names, training_tokens
from upcycle.recipe import dump_recipe, load_recipe
from upcycle.records.comparison import Dense, KeptMeasures, Measures
from upcycle.records.files import DELETED, MEASURES, SCORES, run_of
from upcycle.records.record import ByDomain
from upcycle.records.scores import MOE, ModelScores
from upcycle.studies.statistics import Cells

Benchmark = Callable[[Run], ByDomain]
"""Scores of a finished run by benchmark, and their mean under `ALL`."""


@dataclass(frozen=True)
class Variant:
    """A recipe with overrides, as written: `quickstart route.start=ridge`, or with a name before it: `ridge: ...`."""

    text: str

    @property
    def name(self) -> str | None:
        return self._parts()[0]

    @property
    def words(self) -> list[str]:
        """
        Raises:
            UpcycleError: no recipe, or an open quote.
        """
        try:
            words = shlex.split(self._parts()[1])
        except ValueError as error:
            raise UpcycleError(f"variant '{self.text}': {error}") from None
        if not words:
            raise UpcycleError(f"variant '{self.text}' names no recipe")
        return words

    def _parts(self) -> tuple[str | None, str]:
        named = re.fullmatch(r"([^:=]+):\s(.+)", self.text, re.DOTALL)
        return (named[1], named[2]) if named else (None, self.text)

    def run(self, seed: int, folder: Path) -> Run:
        recipe, *overrides = self.words
        return Run(load_recipe(recipe, [*overrides, f"seed={seed}"]), folder)


def labels(texts: Sequence[str]) -> list[str]:
    """The name of each variant; or what tells it from the others: its words without those that all have."""
    variants = [Variant(text) for text in texts]
    common = set.intersection(*(set(variant.words) for variant in variants))
    return [v.name or " ".join(word for word in v.words if word not in common) or v.text for v in variants]


def run_cells(
    texts: Sequence[str],
    seeds: int,
    out: Path,
    keep_models: bool = True,
    benchmark: Benchmark | None = None,
    check: Callable[[Cells], None] = lambda _: None,
) -> dict[str, list[Measures]]:
    """Each variant's measures, one for each seed; a run folder per cell. Resumable.

    A stage that another cell has made from the same inputs is taken from there.

    Args:
        keep_models: without, the weights of a seed's runs are deleted once all of them are measured.
        check: called after each seed with what has been measured; may raise.

    Raises:
        UpcycleError: two variants are the same, or have the same name; or what `check` raises.
    """
    if twice := [text for text in (*texts, *_names(texts)) if [*texts, *_names(texts)].count(text) > 1]:
        raise UpcycleError(f"there are two variants '{twice[0]}'")
    cells: dict[str, list[Measures]] = {text: [] for text in texts}
    donors: list[Path] = []
    for seed in range(seeds):
        runs = [Variant(text).run(seed, run_of(out, number, seed)) for number, text in enumerate(texts)]
        for run, text in zip(runs, texts, strict=True):
            say(f"{text}, seed {seed}: {run.folder}")
            cells[text].append(_known(run, keep_models) or _run(run, donors, benchmark))
        check(cells)
        if not keep_models:
            donors = []
            for run in runs:
                _delete_weights(run.folder)
    return cells


def _run(run: Run, donors: list[Path], benchmark: Benchmark | None) -> Measures:
    """Run and measure; the run becomes a donor of the next ones."""
    run_stages(run, donors=donors)
    donors.append(run.folder)
    measures = measure(run, benchmark(run) if benchmark else None)
    MEASURES.write(run.folder, KeptMeasures(**dict(measures), recipe=digest(dump_recipe(run.recipe))))
    return measures


def _known(run: Run, keep_models: bool) -> Measures | None:
    """What was measured of a run whose models were deleted since; None of any other.

    Raises:
        UpcycleError: its models are to be kept; or it had another recipe or other data.
    """
    if not DELETED.of(run.folder).exists():
        return None
    if keep_models:
        raise UpcycleError(f"the models of {run.folder} were deleted; go on with --no-keep-models, or elsewhere")
    found = MEASURES.read(run.folder)
    if found.recipe != digest(dump_recipe(run.recipe)) or found.data != run.data_hash:
        raise UpcycleError(f"{run.folder} was made by another recipe or from other data; take another --out")
    return Measures(**{name: getattr(found, name) for name in Measures.model_fields})


def _names(texts: Sequence[str]) -> list[str]:
    return [name for text in texts if (name := Variant(text).name)]


def _delete_weights(folder: Path) -> None:
    DELETED.of(folder).touch()
    for stage in stage_names():
        for path in (folder / stage).rglob("*.safetensors"):
            path.unlink()


def measure(run: Run, benchmark: ByDomain | None) -> Measures:
    """The MoE's scores, by domain, and what the run spent; beside them the base's and the checkpoints'.

    Args:
        benchmark: scores by benchmark, and their mean.
    """
    scores = SCORES.read_of(run.folder)
    return Measures(
        seed=run.recipe.seed,
        data=run.data_hash,
        tokens=training_tokens(run.folder),
        loss=scores[MOE].loss,
        exact_match=_short(scores[MOE]),
        benchmark=benchmark,
        dense={
            name: Dense(loss=entry.loss, exact_match=_short(entry))
            for name, entry in scores.items()
            if entry.expert_share is None
        },
    )


def _short(entry: ModelScores) -> ByDomain | None:
    """Exact match; None if there was no short answer."""
    return entry.exact_match or None
