"""What a run would begin with: base, checkpoints and data, looked at without training or downloading (`--dry-run`)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from upcycle.errors import UpcycleError, counted
from upcycle.pipeline.run import Run

if TYPE_CHECKING:  # settings alone; the annotations are whole names, which the checks of the tests can follow
    import upcycle.settings

LATER = "not looked at, as the run downloads it first"


def look(run: Run) -> Iterator[str]:
    """A line for the base, the checkpoints if they are given, and each source of data.

    Raises:
        UpcycleError: what the first stage would say: nothing can be made of the base, checkpoints or files are missing,
            the first row of a file cannot be read, or TRL has no such setting.
    """
    from upcycle.weights.folders import is_here

    recipe = run.recipe
    if recipe.prepare.trainer or recipe.posttrain.trainer or recipe.posttrain.report_to != "none":
        from upcycle.pipeline.stages import check_training

        check_training(recipe)
    if is_here(recipe.base):
        yield f"base: {run.base.folder}, {run.base.config['model_type']}"
        _ = run.base.tokenizer  # refused where it has no chat template
    else:
        yield f"base: {recipe.base}, on the hub: {LATER}"
    if recipe.prepares and recipe.prepare.checkpoints:
        from upcycle.stages.expert_preparation.checkpoints import checkpoint_folders

        yield f"checkpoints: {counted(len(checkpoint_folders(recipe.prepare.checkpoints)), 'folder')}"
    data = recipe.data
    for source in (*data.sources(data.train), *data.sources(data.validation or [])):
        yield f"data: {source.path}, {_first_rows(source, data.max_bad)}"
    from upcycle.data.sources import files_of

    for name in data.decontaminate_with:
        files_of(name)


def _first_rows(source: "upcycle.settings.Source", max_bad: float) -> str:
    """Read the first row of each file; of a folder of `save_to_disk`, which is one table, of the first."""
    from upcycle.data.sources import BUILTIN, files_of

    files = files_of(source.path)
    if not files:
        return "in the package" if source.path.startswith(BUILTIN) else f"on the hub: {LATER}"
    for place in [source.path] if files[0].suffix == ".arrow" else map(str, files):
        _first_row(source.model_copy(update={"path": place}), max_bad)
    return f"{counted(len(files), 'file')}, the first rows can be read"


def _first_row(source: "upcycle.settings.Source", max_bad: float) -> None:
    """Raises UpcycleError if it cannot be used, unless some may be left out and a later one can."""
    from upcycle.data.sources import Tally, usable_rows

    tally = Tally(source.path)
    row = next(usable_rows(source, tally), None)
    if tally.first and (row is None or not max_bad):
        raise UpcycleError(next(iter(tally.first.values())))
    if row is None:
        raise UpcycleError(f"{source.path}: no rows; expected chats, such as a 'messages' list each")
