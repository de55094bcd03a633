"""Where a run's base comes from, and its licence; what its data are called."""

from pathlib import Path

from huggingface_hub import ModelCard

from upcycle.console import warn
from upcycle.disk import expanded
from upcycle.pipeline.run import Run
from upcycle.reading import brief
from upcycle.records.files import CARD, ORIGIN
from upcycle.records.origin import Licence, Origin


def write_origin(run: Run, out: Path) -> None:
    """What is known of base and data while they are here, into the folder of a stage."""
    ORIGIN.write(out, _of(run, run.base.folder))


def origin_of(run: Run, base: Path | None) -> Origin | None:
    """Of a run: as it was at assembly, with the licence as it is now, or as it is now; None if neither is known.

    Args:
        base: its folder, None if that is gone.
    """
    if (known := ORIGIN.known_of(run.folder)) is None:
        return _of(run, base) if base else None
    licence = licence_of(base) if base else {}
    return known.model_copy(update={"licence": licence}) if licence else known


def _of(run: Run, base: Path) -> Origin:
    from upcycle.weights.folders import BUILTIN_BASE, is_here

    name, data = run.recipe.base, run.recipe.data
    sources = [source.path for source in data.sources(data.train)]
    return Origin(
        on_hub=name != BUILTIN_BASE and not expanded(name).is_dir() and is_here(name),
        licence=licence_of(base),
        data=[Path(path).name if expanded(path).exists() else path for path in sources],
    )


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
