"""Recipes by seeds: each cell is a run folder; what several cells share is made once."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from upcycle.console import say
from upcycle.disk import digest
from upcycle.distributed.world import is_main, on_main, wait
from upcycle.errors import UpcycleError
from upcycle.pipeline.costs import read_costs
from upcycle.pipeline.looking import look
from upcycle.pipeline.manifest import changed_inputs
from upcycle.pipeline.resume import changes_of, run_stages
from upcycle.pipeline.run import Run, again, is_run
from upcycle.pipeline.stages import stage_names, training_flops, training_tokens
from upcycle.recipe import differences, load_recipe, parse_recipe
from upcycle.records.comparison import Cell, Dense, Measures
from upcycle.records.files import DELETED, MEASURES, SCORES, run_of
from upcycle.records.record import ByDomain, read_record, write_record
from upcycle.records.scores import MOE, MOE_INIT, ModelScores
from upcycle.studies.provenance import code_version, machine
from upcycle.studies.statistics import Cells
from upcycle.weights.folders import is_here

LONGEST_NAME = 240
"""Bytes of a folder's name, from which on it ends in a hash."""
DATA_FILES = ("data.train", "data.validation", "data.decontaminate_with")
OTHER_FILES = ("base", "prepare.checkpoints", "data.chat_template")
"""Settings whose files a cell knows by their hashes."""
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
        if named and not named[1].strip():
            raise UpcycleError(f"variant '{self.text}' has an empty name")
        return (named[1].strip(), named[2]) if named else (None, self.text)

    def run(self, seed: int, folder: Path, more: Sequence[str] = ()) -> Run:
        """
        Args:
            more: overrides besides its own.
        """
        recipe, *overrides = self.words
        return Run(load_recipe(recipe, [*overrides, *more, f"seed={seed}"]), folder)


def labels(texts: Sequence[str]) -> list[str]:
    """The name of each variant; or what tells it from the others: its words without those that all have."""
    variants = [Variant(text) for text in texts]
    common = set.intersection(*(set(variant.words) for variant in variants))
    return [v.name or " ".join(word for word in v.words if word not in common) or v.text for v in variants]


@dataclass(frozen=True)
class Study:
    """Variants by seeds."""

    texts: Sequence[str]
    """The variants, as written."""
    seeds: Sequence[int]
    out: Path
    """Where a run folder per cell lies."""
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """More settings of a variant."""
    keep_models: bool = True
    """Without, the weights of a seed's runs are deleted once all of them are measured."""
    benchmark: Benchmark | None = None
    results: Path | None = None
    """Where the measures of every cell are kept too, to be taken from there instead of running it again."""

    def run(self, number: int, seed: int) -> Run:
        """The run of a cell."""
        text = self.texts[number]
        return Variant(text).run(seed, run_of(self.out, number, seed), self.overrides.get(text, ()))

    def kept(self, text: str, seed: int) -> Path | None:
        """The file of a cell among the results."""
        return cell_file(self.results, Variant(text).name or text, seed) if self.results else None


def cell_file(results: Path, label: str, seed: int) -> Path:
    """Where the measures of a variant with a seed are kept."""
    name = re.sub(r"[^\w.=-]+", "-", label).strip("-")
    if len(name.encode()) > LONGEST_NAME:
        name = f"{name[:60]}-{digest(label)[:16]}"
    return results / name / f"seed-{seed}.json"


def run_cells(study: Study, check: Callable[[Cells], None] = lambda _: None) -> dict[str, list[Measures]]:
    """Each variant's measures, one for each seed. Resumable.

    A stage that another cell has made from the same inputs is taken from there.

    Args:
        check: called after each seed with what has been measured; may raise.

    Raises:
        UpcycleError: two variants are the same, or have the same name; one has a seed of its own; the folder holds
            other things; or what `check` raises.
    """
    _check(study)
    on_main(lambda: _look(study))
    cells: dict[str, list[Measures]] = {text: [] for text in study.texts}
    donors: list[Path] = []
    for seed in study.seeds:
        runs = [study.run(number, seed) for number in range(len(study.texts))]
        for run, text in zip(runs, study.texts, strict=True):
            cells[text].append(_cell(study, run, text, donors))
        check(cells)
        if not study.keep_models:
            donors = []
            for run in runs:
                if is_main() and run.folder.exists():
                    _delete_weights(run.folder)
            wait()
    return cells


def _check(study: Study) -> None:
    for named in (study.texts, labels(study.texts)):
        if twice := [text for text in named if named.count(text) > 1]:
            raise UpcycleError(f"there are two variants '{twice[0]}'; give each a name of its own, or leave one out")
    if seeded := [text for text in study.texts if any(word.startswith("seed=") for word in Variant(text).words[1:])]:
        raise UpcycleError(f"variant '{seeded[0]}' sets seed, but every variant runs with the same seeds: use --seeds")
    if study.results:
        files: dict[Path, str] = {}
        for label in (Variant(text).name or text for text in study.texts):
            if (other := files.setdefault(cell_file(study.results, label, 0), label)) != label:
                raise UpcycleError(
                    f"the variants '{other}' and '{label}' would have the same files in --results; rename one of them"
                )
    if is_run(study.out):
        raise UpcycleError(f"--out {study.out} is the folder of a run; name a new one")


def _look(study: Study) -> None:
    """Before hours of other variants: raises UpcycleError for what the first stage of one would say."""
    for number, text in enumerate(study.texts):
        run, kept = study.run(number, study.seeds[0]), study.kept(text, study.seeds[0])
        if not (kept and kept.is_file()) and not DELETED.of(run.folder).exists():
            list(look(run))


def _check_folder(run: Run) -> None:
    """Raises UpcycleError if the cell's folder holds another variant."""
    if changes := changes_of(run):
        raise UpcycleError(
            f"{run.folder} was made by a different variant ({'; '.join(changes)}); name the same variants in the same "
            "order, use a different --out, or remove the folder"
        )


def _cell(study: Study, run: Run, text: str, donors: list[Path]) -> Measures:
    """What is known of a cell, or what running it gives; it becomes a donor of the next ones."""
    say(f"{Variant(text).name or text}, seed {run.recipe.seed}: {run.folder}")
    kept = study.kept(text, run.recipe.seed)
    if found := on_main(lambda: _known(run, study.keep_models, kept)):
        return found
    on_main(lambda: _check_folder(run))
    try:
        run_stages(run, donors=donors)
    except UpcycleError as error:
        if "--update" not in str(error):
            raise
        raise UpcycleError(f"{error} (here: `{again(run.folder, '--update')}`, then this command again)") from None
    donors.append(run.folder)

    def measured() -> Cell:
        found = measure(run, study.benchmark(run) if study.benchmark else None)
        MEASURES.write(run.folder, found)
        return _keep(found, kept)

    return on_main(measured)


def _keep(found: Cell, kept: Path | None) -> Cell:
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_record(kept, found)
    return found


def _known(run: Run, keep_models: bool, kept: Path | None) -> Cell | None:
    """What was measured and kept, or of a run whose models were deleted since; None of any other.

    Raises:
        UpcycleError: its models are to be kept; or it had another recipe or other data.
    """
    if kept and kept.is_file():
        return _of_this_run(read_record(kept, Cell), run, kept)
    if not DELETED.of(run.folder).exists():
        return None
    if keep_models:
        raise UpcycleError(
            f"the models of {run.folder} were deleted; continue with --no-keep-models, or use a different --out"
        )
    return _keep(_of_this_run(MEASURES.read(run.folder), run, run.folder), kept)


def _of_this_run(found: Cell, run: Run, where: Path) -> Cell:
    """
    Raises:
        UpcycleError: the cell is another recipe's (settings that are newer than it have their defaults), or of other
            data.
    """
    inputs = _inputs_if_here(run) if found.inputs else None
    by_content = (*DATA_FILES, *(OTHER_FILES if inputs else ()))  # wherever they lie
    changes = differences(parse_recipe(found.recipe, str(where)), run.recipe)
    if changes := [change for change in changes if change.partition(":")[0] not in by_content]:
        raise UpcycleError(
            f"{where} was made by a different recipe ({'; '.join(changes)}); move it away, or give the variant a "
            "different name"
        )
    if found.data != run.data_hash:
        raise UpcycleError(
            f"{where} was made from different data; move it away, or use a different --out and --results"
        )
    if found.inputs and inputs and found.inputs != inputs:
        raise UpcycleError(
            f"{where} was made from different inputs ({changed_inputs(found.inputs, inputs)} changed); move it away, "
            "or use a different --out and --results"
        )
    return found.model_copy(update={"by_domain": run.recipe.prepare.by_domain or None})


def _inputs_if_here(run: Run) -> dict[str, str] | None:
    """None where the base or a checkpoint is gone, or would have to be downloaded: the cell is what is left of it."""
    try:
        return _inputs(run) if is_here(run.recipe.base) else None
    except UpcycleError:
        return None


def _inputs(run: Run) -> dict[str, str]:
    """What decides a cell besides its recipe and rows."""
    given = run.given_hashes if run.recipe.prepare.checkpoints else {}
    return {"base": run.base_hash, "chat_template": digest(run.base.chat_template), **given}


def _delete_weights(folder: Path) -> None:
    DELETED.of(folder).touch()
    for stage in stage_names():
        for path in (folder / stage).rglob("*.safetensors"):
            path.unlink()


def measure(run: Run, benchmark: ByDomain | None) -> Cell:
    """The MoE's scores, by domain, and what the run spent; beside them the base's and the checkpoints'.

    Args:
        benchmark: scores by benchmark, and their mean.
    """
    scores = SCORES.read_of(run.folder)
    return Cell(
        seed=run.recipe.seed,
        data=run.data_hash,
        tokens=training_tokens(run.folder),
        flops=training_flops(run),
        loss=scores[MOE].loss,
        exact_match=_short(scores[MOE]),
        benchmark=benchmark,
        dense={
            name: Dense(loss=entry.loss, exact_match=_short(entry))
            for name, entry in scores.items()
            if entry.expert_share is None
        },
        initial_loss=scores[MOE_INIT].loss,
        by_domain=run.recipe.prepare.by_domain or None,
        recipe=run.recipe.model_dump(mode="json"),
        version=code_version(),
        machine=machine(),
        inputs=_inputs(run),
        seconds={stage: cost.seconds for stage, cost in read_costs(run.folder).items()},
    )


def _short(entry: ModelScores) -> ByDomain | None:
    """Exact match; None if there was no short answer."""
    return entry.exact_match or None
