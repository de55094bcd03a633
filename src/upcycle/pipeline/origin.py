"""Where a run's base comes from, and its licence."""

from pathlib import Path

from huggingface_hub import ModelCard

from upcycle.console import warn
from upcycle.disk import expanded
from upcycle.pipeline.run import Run
from upcycle.reading import brief
from upcycle.records.files import CARD, ORIGIN
from upcycle.records.origin import Licence, Origin


def write_origin(run: Run, out: Path) -> None:
    """What is known of the base while it is here, into the folder of a stage."""
    ORIGIN.write(out, _of_base(run.recipe.base, run.base.folder))


def origin_of(run: Run) -> Origin | None:
    """Of a run's base: as it is now, or else as it was at assembly; None if neither is known."""
    known, folder = ORIGIN.known_of(run.folder), run.find_base()
    now = _of_base(run.recipe.base, folder) if folder else None
    return now if now and (now.licence or not known) else known


def _of_base(name: str, folder: Path) -> Origin:
    from upcycle.weights.folders import BUILTIN_BASE

    return Origin(on_hub=name != BUILTIN_BASE and not expanded(name).is_dir(), licence=licence_of(folder))


def licence_of(base: Path) -> Licence:
    """What the base's own model card says: `license`, `license_name` and `license_link`, as far as it has them."""
    path = CARD.of(base)
    try:
        said = ModelCard.load(path).data if path.is_file() else None
    except Exception as error:  # its metadata are YAML that anyone may have written
        warn(f"{path} is not a readable model card ({brief(str(error))}): the licence of the base is not known")
        return {}
    found = {name: getattr(said, name, None) for name in ("license", "license_name", "license_link")}
    return {
        name: list(map(str, value)) if isinstance(value, list) else str(value) for name, value in found.items() if value
    }
