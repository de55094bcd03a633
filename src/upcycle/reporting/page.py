"""What the HTML reports share: templates, and markup of ours that needs no escaping."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import markupsafe


@dataclass(frozen=True)
class Table:
    """Cells under heads."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[object]]
    best: Sequence[int] = ()
    """Places of the rows that stand out."""


@dataclass(frozen=True)
class Chart:
    """A picture under its title."""

    title: str
    svg: markupsafe.Markup
    caption: str
    """How to read it."""


def render(template: str, **values: object) -> str:
    """A page of `templates/`; texts are escaped."""

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(template).render(**values)


def safe(markup: str) -> markupsafe.Markup:
    """Our own markup, whose texts are escaped already."""
    return markupsafe.Markup(markup)


def made_with(versions: Mapping[str, str]) -> str:
    return f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}."
