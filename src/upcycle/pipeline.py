"""The stages in order: what each one needs, what is done already, what is resumed.

prepare -> expand -> assemble -> route -> posttrain -> evaluate. A stage runs if its folder is missing or was made
from other inputs; inputs are compared by the hashes of their content.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upcycle.artifacts import (
    INPUTS,
    Manifest,
    changed_inputs,
    open_partial,
    read_manifest,
    seal,
    verify,
    write_text,
)
from upcycle.console import say, table, warn
from upcycle.costs import measured, read_costs
from upcycle.errors import UpcycleError
from upcycle.recipe import differences, dump_recipe, load_recipe
from upcycle.run import MOE, MOE_INIT, Run, Stage


def _prepare(run: Run, out: Path) -> None:
    from upcycle.expert_preparation.checkpoints import adopt, write_checkpoints
    from upcycle.expert_preparation.prepare import tune
    from upcycle.models.check import check_source
    from upcycle.models.folders import base_name
    from upcycle.models.mapping import map_model
    from upcycle.models.safetensors_io import ModelReader

    reader = ModelReader(run.base)
    check_source(map_model(run.base, reader, run.recipe.expand.num_experts), reader)  # before hours of training
    recipe, settings = run.recipe, run.recipe.prepare
    if not recipe.prepares:
        say("prepare: nothing is taken from a checkpoint, so there is nothing to train (expand.copies_of=base)")
        write_checkpoints(out, [])
    elif settings.checkpoints:
        adopt(run.base, run.given_checkpoints, settings.train, out)
    else:
        name, train = base_name(recipe.base), run.splits.train
        tune(run.base, name, run.tokenizer, run.chat_template, train, settings, recipe.lora, recipe.seed, out)


def _expand(run: Run, out: Path) -> None:
    from upcycle.expert_expansion.expand import expand

    recipe, adapters = run.recipe, run.recipe.prepare.adapters
    expand(run.base, run.checkpoints, run.checkpoint_folders, recipe.expand, adapters, recipe.seed, out)


def _assemble(run: Run, out: Path) -> None:
    from upcycle.model_upcycling.assemble import assemble
    from upcycle.model_upcycling.mixture import assemble_mixture
    from upcycle.models.folders import base_name

    recipe = run.recipe
    rest = (run.chat_template, recipe.route.init_std, recipe.seed, out)
    if recipe.prepare.adapters:
        name, bottleneck = base_name(recipe.base), recipe.prepare.train == "bottleneck"
        assemble_mixture(
            run.base, name, run.checkpoint_folders, run.plan, recipe.assemble, recipe.lora, bottleneck, *rest
        )
    else:
        assemble(run.base, run.checkpoint_folders, run.plan, recipe.assemble, *rest)


def _route(run: Run, out: Path) -> None:
    from upcycle.router_initialization.route import route

    names = [expert.name for expert in run.plan.experts]
    splits, recipe = run.splits, run.recipe
    unseen = sorted({sample.domain for sample in splits.train} - {sample.domain for sample in splits.seed_fit})
    if unseen:
        warn(
            f"route: no seed sample is of {', '.join(unseen)}: no routing vector learns from such rows; raise "
            "route.seed_fraction or route.min_samples_per_expert"
        )
    moe, pad = run.folder / "assemble", run.tokenizer.pad_token_id
    route(moe, splits.seed_fit, splits.seed_test, names, recipe.route, pad, recipe.seed, out, run.base)


def _posttrain(run: Run, out: Path) -> None:
    from upcycle.model_upcycling.posttrain import posttrain
    from upcycle.router_initialization.route import ROUTER

    router = run.folder / "route" / ROUTER
    settings, seed = run.recipe.posttrain, run.recipe.seed
    four_bit = run.recipe.lora.four_bit
    posttrain(run.routed_moe, router, run.tokenizer, run.splits.train, settings, seed, out, run.base, four_bit)


def _evaluate(run: Run, out: Path) -> None:
    from upcycle.evaluation.evaluate import evaluate

    settings = run.recipe.evaluate
    evaluate(_candidates(run), run.tokenizer, run.splits.validation, settings, out, _assigned(run))


def _assigned(run: Run) -> Any:
    from upcycle.evaluation.evaluate import Assigned

    report = json.loads((run.folder / "route" / "report.json").read_text())
    if "held_out" not in report:
        return None
    return Assigned(run.splits.seed_test, report["held_out"]["assigned"], run.recipe.route.tokens)


def _candidates(run: Run) -> list[Any]:
    from upcycle.evaluation.evaluate import Candidate
    from upcycle.router_initialization.route import ROUTER

    folders = zip(run.checkpoints, run.checkpoint_folders, strict=True)
    dense = [Candidate(checkpoint.name, folder, base=run.base) for checkpoint, folder in folders]
    if run.recipe.evaluate.models == "ends":
        dense = dense[-1:]
    return [
        Candidate("base", run.base),
        *dense,
        Candidate(MOE_INIT, run.routed_moe, is_moe=True, router=run.folder / "route" / ROUTER, base=run.base),
        Candidate(MOE, run.folder / "posttrain", is_moe=True, base=run.base),
    ]


STAGES = (
    Stage("prepare", (), True, _prepare),
    Stage("expand", ("prepare",), False, _expand),
    Stage("assemble", ("prepare", "expand"), False, _assemble),
    Stage("route", ("assemble",), True, _route),
    Stage("posttrain", ("assemble", "route"), True, _posttrain),
    Stage("evaluate", ("prepare", "assemble", "route", "posttrain"), True, _evaluate),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def run_stages(run: Run, names: Sequence[str] = STAGE_NAMES, update: bool = False, donors: Sequence[Path] = ()) -> None:
    """Run the named stages in order; what is complete and has the same inputs is left alone.

    Args:
        update: accept a changed recipe, and rebuild stages whose inputs changed or whose files are damaged.
        donors: other run folders; a stage that one of them has complete, from the same inputs, is taken from there.

    Raises:
        UpcycleError: the folder belongs to another recipe, another process works in it, or an earlier stage is
            missing, outdated or damaged.
    """
    with _lock(run.folder):
        _claim(run, update)
        for stage in STAGES:
            if stage.name in names:
                _adopt_stage(run, stage, donors)
                _run_stage(run, stage, update)


def status(run: Run) -> list[tuple[str, str]]:
    """(stage, what a run would do) for each stage, without doing anything."""
    rows, stale = [], False
    for stage in STAGES:
        manifest = read_manifest(run.folder / stage.name)
        inputs = run.inputs(stage) if manifest else None  # hashing may mean downloading
        partial = (run.folder / f"{stage.name}.partial").exists()
        if manifest and not stale and inputs == manifest.inputs:
            rows.append((stage.name, "done"))
            continue
        if stale or inputs is None or manifest is None:
            changed = "an earlier stage"
        else:
            changed = changed_inputs(manifest.inputs, inputs)
        stale = True
        todo = f"run again ({changed} changed)" if manifest else "run"
        rows.append((stage.name, f"{todo}, resuming what is there" if partial else todo))
    return rows


def _run_stage(run: Run, stage: Stage, update: bool) -> None:
    inputs = _require_needs(run, stage)
    folder = run.folder / stage.name
    if _is_current(run, stage, inputs, update):
        say(f"{stage.name}: done already, {folder}")
        return
    partial = open_partial(folder, inputs, update)
    resumed = any(path.name != INPUTS for path in partial.iterdir())
    say(f"{stage.name}: resuming ..." if resumed else f"{stage.name} ...")
    with measured(run.folder, stage.name, resumed):
        stage.run(run, partial)
    seal(partial, folder, inputs, run.settings(stage), run.recipe.seed)
    run.verified.add(stage.name)


def _adopt_stage(run: Run, stage: Stage, donors: Sequence[Path]) -> None:
    """Take a missing stage from another run that made it from the same inputs: hard links, no bytes."""
    folder = run.folder / stage.name
    if folder.exists():
        return
    inputs = _require_needs(run, stage) if donors else {}
    for donor in donors:
        manifest = read_manifest(donor / stage.name)
        if manifest is not None and manifest.inputs == inputs:
            say(f"{stage.name}: taken from {donor}, which made it from the same inputs")
            shutil.copytree(donor / stage.name, folder, copy_function=_link_or_copy)
            return


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _require_needs(run: Run, stage: Stage) -> dict[str, str]:
    """The stage's inputs, once every stage that it stands on is complete, up to date and undamaged."""
    for need in (s for s in STAGES if s.name in stage.needs):
        inputs = _require_needs(run, need)
        manifest = read_manifest(run.folder / need.name)
        if manifest is None:
            raise UpcycleError(f"{stage.name} needs {need.name}, which has not been run in {run.folder}")
        if manifest.inputs != inputs:
            changed = changed_inputs(manifest.inputs, inputs)
            raise UpcycleError(f"{stage.name} needs {need.name}, which is outdated ({changed} changed): run it first")
        _verify_once(run, need, manifest)
    found = run.inputs(stage)
    assert found is not None
    return found


def _verify_once(run: Run, stage: Stage, manifest: Manifest) -> None:
    if stage.name not in run.verified:
        verify(run.folder / stage.name, manifest)
        run.verified.add(stage.name)


def _is_current(run: Run, stage: Stage, inputs: dict[str, str], update: bool) -> bool:
    folder = run.folder / stage.name
    try:
        manifest = read_manifest(folder)
        if manifest is not None and manifest.inputs == inputs:
            _verify_once(run, stage, manifest)
    except UpcycleError as error:
        if not update:
            raise
        say(f"{error}: rebuilding")
        return False
    if manifest is None:
        if folder.exists():  # finished stages replace their folder
            raise UpcycleError(f"{folder} is there but was not made by upcycle; move it away, or use another --run")
        return False
    if manifest.inputs == inputs:
        return True
    changed = changed_inputs(manifest.inputs, inputs)
    if not update:
        raise UpcycleError(
            f"{folder} was made from other inputs ({changed} changed); rerun with --update to build it and "
            "what follows again (it replaces the folder), or use another --run"
        )
    say(f"{stage.name}: {changed} changed, building it again")
    return False


def _claim(run: Run, update: bool) -> None:
    """Write recipe.yaml, or compare with the one that made what is there."""
    path = run.folder / "recipe.yaml"
    begun = any(path for name in STAGE_NAMES for path in run.folder.glob(f"{name}*"))
    if path.exists() and begun:
        changes = differences(load_recipe(str(path)), run.recipe)
        if not changes:
            return
        if not update:
            listed = "\n".join(f"  {change}" for change in changes)
            raise UpcycleError(
                f"{run.folder} was made by another recipe:\n{listed}\nUse another --run, or --update to accept "
                "the change and run the stages that it concerns again"
            )
    write_text(path, dump_recipe(run.recipe))


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpcycleError(f"another process is working in {folder}") from None
        yield


def show_summary(run: Run) -> None:
    """What the run made, what it cost, where it lies."""
    rows = []
    for stage, cost in read_costs(run.folder).items():
        log = run.folder / stage / "log.json"
        record = json.loads(log.read_text()) if log.exists() else {}
        trained = (f"{record[k]:,}" if record else "" for k in ("tokens", "steps"))
        rows.append((stage, f"{cost['seconds']:.0f}", f"{cost['memory_gb']:.1f}", *trained))
    table("cost per stage", ("stage", "seconds", "GB resident", "training tokens", "steps"), rows)
    if run.recipe.prepare.adapters:
        say(f"mixture of adapters: {run.folder / 'posttrain'}  (compact: needs {run.recipe.base} and upcycle)")
        say(f"as a plain MoE:     upcycle export {run.folder} --fold --to FOLDER")
    else:
        say(f"mixture of experts: {run.folder / 'posttrain'}  (a plain Hugging Face folder)")
    say(f"scores:             {run.folder / 'evaluate' / 'scores.json'}")
    say(f"experts' lineage:   {run.folder / 'expand' / 'plan.json'}")
    say(f"seed data, router:  {run.folder / 'route' / 'report.json'}")
