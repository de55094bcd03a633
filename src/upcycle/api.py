"""The Python interface: a recipe, a run of it, a stage after the other, and what is written of it.

    import upcycle

    run = upcycle.run("upit", base="HuggingFaceTB/SmolLM2-135M-Instruct", data="train.jsonl", out="runs/my-moe")
    run.scores["MoE"].loss["all"], run.result

Stages keep what they made in the run's folder, as the commands do: the two can be mixed, and each goes on where the
other stopped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from upcycle.disk import check_writable, expanded
from upcycle.distributed import world
from upcycle.errors import UpcycleError
from upcycle.hashes import every_file_read
from upcycle.pipeline.manifest import verified
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run, is_run, open_run
from upcycle.pipeline.stages import stage_names, stages_until
from upcycle.recipe import Recipe, parse_recipe, read_values
from upcycle.records.files import ASSEMBLE, EVALUATE, EXPAND, POSTTRAIN, PREPARE, REPORT, ROUTE
from upcycle.records.plan import Checkpoint, ExpansionPlan
from upcycle.records.route import RouteReport
from upcycle.records.scores import Scores

Name = str | Path
Data = Name | Sequence[Name] | Mapping[str, Any]


def make_recipe(recipe: Name | Recipe = "upit", **settings: Any) -> Recipe:
    """A recipe with other settings.

    Args:
        recipe: the name of one in the package, a YAML file, or a recipe.
        settings: `base`, `seed`, or a section with what changes in it: `expand={"num_experts": 4}`. As `data`, files
            alone are those to train on.

    Raises:
        UpcycleError: no such recipe, an unknown setting, a value of the wrong type or range.
    """
    where = "in Python" if isinstance(recipe, Recipe) else str(expanded(recipe))
    values = recipe.model_dump() if isinstance(recipe, Recipe) else read_values(where)
    for name, given in settings.items():
        changed = {"train": given} if name == "data" and not isinstance(given, Mapping) else given
        before = values.get(name) or {}
        merged = {**before, **changed} if isinstance(changed, Mapping) and isinstance(before, dict) else changed
        values[name] = _plain(merged)
    return parse_recipe(values, where)


def run(
    recipe: Name | Recipe = "upit",
    *,
    out: Name,
    base: Name | None = None,
    data: Data | None = None,
    until: str = EVALUATE,
    update: bool = False,
    **settings: Any,
) -> Run:
    """Run a recipe's stages in order; what is complete already is kept.

    Args:
        recipe: see `make_recipe`, with `settings`.
        out: the run's folder.
        base: the dense model, a folder or hub name; None: the recipe's.
        data: files to train on, or the settings of `data`; None: the recipe's.
        until: the last stage to run.
        update: accept a changed recipe, and rebuild what was made from other inputs or is damaged.

    Raises:
        UpcycleError: see `make_recipe` and `run_stages`.
    """
    stages = stages_until(until, "until")
    if not out:
        raise UpcycleError("out is empty, expected the name of a folder")
    given = {name: value for name, value in (("base", base), ("data", data)) if value is not None}
    made = Run(make_recipe(recipe, **given, **settings), out)
    world.start()
    run_stages(made, stages, update)
    return made


def prepare(run: Run | Name) -> list[Checkpoint]:
    """Stage 1: fine-tune the base and keep checkpoints, or take the recipe's; in the order of training."""
    return _made(run, PREPARE).checkpoints


def expand(run: Run | Name) -> ExpansionPlan:
    """Stage 2: which experts there are, and what each is made of."""
    return _made(run, EXPAND).plan


def assemble(run: Run | Name) -> Path:
    """Stage 4, first half: the folder of the MoE before any training of its own."""
    return _made(run, ASSEMBLE).assembled_moe


def route(run: Run | Name) -> RouteReport:
    """Stage 3: which expert got which seed data, and how the router starts."""
    return _made(run, ROUTE).route_report


def posttrain(run: Run | Name) -> Path:
    """Stage 4: the folder of the finished model."""
    return _made(run, POSTTRAIN).result


def evaluate(run: Run | Name) -> Scores:
    """Held-out loss and exact match by model and domain: of base, checkpoints and MoE."""
    return _made(run, EVALUATE).scores


def _made(run: Run | Name, stage: str) -> Run:
    """The run, or the one in a folder, once it has come so far."""
    run = run if isinstance(run, Run) else open_run(run, {})
    run_stages(run, (stage,))
    return run


def report(run: Run | Name, out: Name | None = None) -> Path:
    """Write one HTML file that stands alone, of a finished run (and of the comparison that it is part of), or of a
    comparison's or sweep's folder.

    Args:
        out: the file; None: `report.html` in the folder.

    Raises:
        UpcycleError: the run is not finished, a file of it is damaged, or its base or data have changed.
    """
    folder = run.folder if isinstance(run, Run) else expanded(run)
    page = REPORT.of(folder) if out is None else expanded(out)
    check_writable(page)
    from upcycle.reporting.comparison import find_comparison, write_comparison_report

    if (found := find_comparison(folder)) is not None:
        write_comparison_report(found, folder, page)
        return page
    finished = open_run(folder, dict.fromkeys((POSTTRAIN, EVALUATE, *stage_names())))
    finished.check_unchanged("base", "data")
    from upcycle.evaluation.tokens import one_of_each_domain, routed_tokens
    from upcycle.experts.kinds import kind_in, load_for_scoring
    from upcycle.reporting.report import write_report

    model = load_for_scoring(finished.result, finished.base.folder)
    samples = one_of_each_domain(finished.splits.validation, at_most=12, longest=400)
    texts = routed_tokens(model, finished.base.tokenizer, samples)
    write_report(folder, finished.recipe, kind_in(finished.result).describe(finished.result), texts, page)
    return page


def export(source: Run | Name, to: Name, *, fold: bool = False, dtype: str = "source", base: str | None = None) -> Path:
    """Write the finished model as a folder that stands alone, a run's with its model card. Every file is read again.

    Args:
        source: a finished run, or a model folder of one.
        to: the new folder.
        fold: write a mixture of LoRA experts as a plain MoE.
        dtype: of a plain MoE, or of a folded one: source, float32, bfloat16 or float16.
        base: the dense model of a mixture, if it has moved.

    Raises:
        UpcycleError: the folder is there, the run is not finished, a file is damaged, the base of a mixture has
            changed, or it has no plain MoE.
    """
    from upcycle.experts.kinds import kind_in
    from upcycle.pipeline.origin import origin_of
    from upcycle.reporting.card import write_card
    from upcycle.stages.model_upcycling import export as stage

    folder, target = source.folder if isinstance(source, Run) else expanded(source), expanded(to)
    with every_file_read():  # what leaves has to be what was made
        finished = open_run(folder) if is_run(folder) else None
        verified(folder / EVALUATE if finished else folder)
        dense = finished.find_base(base) if finished else None
        if finished and dense and finished.kind.frozen and base is None:
            finished.check_unchanged("base")

        def card(made: Path) -> None:
            if finished:
                description = kind_in(made).describe(made)
                write_card(
                    made, target.absolute().name, folder, finished.recipe, origin_of(finished, dense), description
                )

        stage.export(finished.result if finished else folder, target, fold, dtype, base, card)
    return target


def _plain(value: Any) -> Any:
    """As YAML would give it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Path):
        return str(value)
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
