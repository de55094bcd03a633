"""Run the stages: what is already done, what is outdated, what is resumed.

A stage runs if its folder is missing or was made from other inputs; inputs are compared by the hashes of their content.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from upcycle.console import say
from upcycle.disk import SCRATCH, check_folder, write_text
from upcycle.distributed.world import check_shared, is_main, on_main, wait, world_size
from upcycle.errors import UpcycleError
from upcycle.pipeline import stages
from upcycle.pipeline.costs import measured
from upcycle.pipeline.manifest import (
    changed_inputs,
    clear_up,
    made_in,
    open_partial,
    partial_of,
    read_manifest,
    seal,
    set_aside,
    verify,
)
from upcycle.pipeline.run import Run, again
from upcycle.pipeline.stage import Stage
from upcycle.pipeline.stages import check_stage, stage_names
from upcycle.reading import read_text
from upcycle.recipe import MOST_BYTES, differences, dump_recipe, is_dump, load_recipe
from upcycle.records.files import DELETED, INPUTS, LOCK, MEASURES, POSTTRAIN, PREPARE, RECIPE
from upcycle.records.manifest import Manifest

AGAIN = "run again"


def run_stages(run: Run, names: Sequence[str] | None = None, update: bool = False, donors: Sequence[Path] = ()) -> None:
    """Run the named stages (default: all) in order; what is complete and has the same inputs is left alone.

    Args:
        update: accept a changed recipe, and rebuild stages whose inputs changed or whose files are damaged.
        donors: other run folders; a stage that one of them has complete, from the same inputs, is taken from there.

    Raises:
        UpcycleError: the folder belongs to another recipe, another process works in it, or an earlier stage is
            missing, outdated or damaged.
    """
    if run.recipe.devices.processes not in (None, world_size()):
        devices = run.recipe.devices
        raise UpcycleError(
            f"devices.fsdp is {devices.fsdp} and devices.replicate {devices.replicate}, which takes "
            f"{devices.processes} processes, but there are {world_size()}; start them with torchrun (--nproc-per-node, "
            "--nnodes), or set devices.fsdp=1"
        )
    on_main(lambda: check_folder(run.folder, "the run folder"))
    check_shared(run.folder)
    names = (names,) if isinstance(names, str) else names
    run.forget()
    run.asked = tuple(stage_names() if names is None else names)
    for name in run.asked:
        check_stage(name, "a stage to run")
    _check_batches(run)
    with ExitStack() as held:
        on_main(lambda: held.enter_context(_lock(run.folder)))
        on_main(lambda: _claim(run, update))
        for stage in stages.STAGES:
            if names is None or stage.name in names:
                on_main(partial(_adopt_stage, run, stage, donors))
                _run_stage(run, stage, update)


def _check_batches(run: Run) -> None:
    """Before an hour of other stages. Raises UpcycleError if the processes cannot share the rows of a step."""
    trains = {PREPARE: run.recipe.prepare if run.recipe.tunes else None, POSTTRAIN: run.recipe.posttrain}
    for name, settings in trains.items():
        if name in run.asked and settings and (uneven := settings.uneven(world_size(), f"{name}.")):
            raise UpcycleError(uneven)


def status(run: Run) -> list[tuple[str, str]]:
    """(stage, what a run would do) for each stage, without doing anything."""
    rows, stale = [], False
    for stage in stages.STAGES:
        folder = run.folder / stage.name
        manifest = read_manifest(folder)
        inputs = run.inputs(stage) if manifest else None  # hashing may mean downloading
        if manifest and not stale and inputs == manifest.inputs:
            rows.append((stage.name, "done"))
            continue
        if stale or inputs is None or manifest is None:
            changed = "an earlier stage"
        else:
            changed = changed_inputs(manifest.inputs, inputs)
        stale = True
        todo = f"{AGAIN} ({changed} changed)" if manifest else "run"
        rows.append((stage.name, f"{todo}, resuming what is there" if partial_of(folder).exists() else todo))
    return rows


def _run_stage(run: Run, stage: Stage, update: bool) -> None:
    work = on_main(lambda: _begin(run, stage, update))
    if work is None:
        return

    def make() -> None:
        with measured(run.folder, stage.name, work.resumed) if is_main() else nullcontext():
            with _memory(stage):
                stage.run(run, work.folder)
            if stage.by_all:
                wait()

    if stage.by_all:
        make()
    else:
        on_main(make)

    def finish() -> None:
        seal(work.folder, run.folder / stage.name, work.inputs, run.settings(stage), run.recipe.seed, run.format)
        run.verified.add(stage.name)

    on_main(finish)


@contextmanager
def _memory(stage: Stage) -> Iterator[None]:
    """Say of a device that is out of memory what helps."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        said = str(error).partition(". ")[0]
        raise UpcycleError(f"{stage.name}: the device is out of memory ({said}); {stage.less_memory}") from error


@dataclass(frozen=True)
class _Work:
    """A stage that is to be made."""

    inputs: dict[str, str]
    folder: Path
    resumed: bool


def _begin(run: Run, stage: Stage, update: bool) -> _Work | None:
    """Open the working folder; None if the stage is there already."""
    inputs = _require_needs(run, stage)
    folder = run.folder / stage.name
    if _is_current(run, stage, inputs, update):
        clear_up(folder)
        set_aside(folder)
        say(f"{stage.name}: already done, {folder}")
        return None
    for note in (DELETED, MEASURES):  # of models that were scored and deleted: these are others
        note.of(run.folder).unlink(missing_ok=True)
    working = open_partial(folder, inputs, update)
    resumed = any(path.name != INPUTS.name for path in working.iterdir())
    say(f"{stage.name}: resuming ..." if resumed else f"{stage.name} ...")
    return _Work(inputs, working, resumed)


def _adopt_stage(run: Run, stage: Stage, donors: Sequence[Path]) -> None:
    """Take a missing stage from another run that made it from the same inputs: hard links, no bytes."""
    folder = run.folder / stage.name
    copied = folder.with_name(f".{folder.name}{SCRATCH}")
    if copied.exists():
        shutil.rmtree(copied)  # of a process that was killed as it took the stage
    if folder.exists():
        return
    inputs = _require_needs(run, stage) if donors else {}
    for donor in donors:
        manifest = read_manifest(donor / stage.name)
        if manifest is not None and manifest.inputs == inputs:
            say(f"{stage.name}: taken from {donor}, which made it from the same inputs")
            shutil.copytree(donor / stage.name, copied, copy_function=_link_or_copy)
            copied.rename(folder)
            return


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _require_needs(run: Run, stage: Stage) -> dict[str, str]:
    """The stage's inputs, once every stage that it stands on is complete, up to date and undamaged."""
    for need in (s for s in stages.STAGES if s.name in stage.needs):
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
            raise UpcycleError(f"{folder} exists but was not made by upcycle; move it away, or use a different --run")
        return False
    if manifest.inputs == inputs:
        return True
    changed = changed_inputs(manifest.inputs, inputs)
    if not update:
        raise UpcycleError(
            f"{folder} was made from different inputs ({changed} changed); rerun with --update to rebuild it and the "
            "stages after it (this replaces the folder), or use a different --run"
        )
    say(f"{stage.name}: {changed} changed, rebuilding")
    return False


def _claim(run: Run, update: bool) -> None:
    """Write recipe.yaml, or compare with the one that made what is there."""
    path, changes = RECIPE.of(run.folder), changes_of(run)
    if not path.exists() and not update:
        outdated = [f"{stage}: {todo}" for stage, todo in status(run) if todo.startswith(AGAIN)]
        if outdated:
            raise UpcycleError(
                f"{run.folder} has no {path.name}, and another recipe made what is there ({'; '.join(outdated)}); "
                "repeat the settings that it was made with, or use a different --run; --update makes it again"
            )
    if changes and not update:
        listed = "\n".join(f"  {change}" for change in changes)
        raise UpcycleError(
            f"{run.folder} was made by a different recipe:\n{listed}\nRepeat the settings that it was made with "
            f"(`{again(run.folder)}` has them), or use a different --run; --update "
            "accepts the change and rebuilds the stages that it affects"
        )
    if changes is None and path.exists() and not is_dump(read_text(path, MOST_BYTES)):
        raise UpcycleError(
            f"{path} is there already, and a run writes its own recipe.yaml, without comments, into its folder; name a "
            "new folder with --run"
        )
    if changes is None or changes:
        write_text(path, dump_recipe(run.recipe))


def changes_of(run: Run) -> list[str] | None:
    """What a run's recipe changes of the one that made what is in its folder; None: nothing was made there."""
    path = RECIPE.of(run.folder)
    begun = any(made_in(folder) for name in stage_names() for folder in run.folder.glob(f"{name}*"))
    return differences(load_recipe(str(path)), run.recipe) if path.exists() and begun else None


def is_worked_on(folder: Path) -> bool:
    """Whether a process of this machine has a run's folder locked, to run stages."""
    try:
        with LOCK.of(folder).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with LOCK.of(folder).open("w") as file:
        for wait_for_looks in (True, False):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait_for_looks:
                    raise UpcycleError(f"another process is working in {folder}") from None
                time.sleep(0.1)  # `is_worked_on` holds it for a moment
        yield
