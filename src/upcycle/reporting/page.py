"""What the HTML reports share: templates, and markup of ours that needs no escaping."""

from pathlib import Path
from typing import Any

Table = dict[str, Any]
"""`title`, `heads`, `rows` of cells, and `best`, the places of the rows that stand out."""


def render(template: str, **values: Any) -> str:
    """A page of `templates/`; texts are escaped."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template(template).render(**values)


def safe(markup: str) -> Any:
    """Our own markup, whose texts are escaped already."""
    import markupsafe

    return markupsafe.Markup(markup)


def table(title: str, heads: list[str], rows: list[list[str]], best: list[int] | None = None) -> Table:
    return {"title": title, "heads": heads, "rows": rows, "best": best or []}


def made_with(versions: dict[str, str]) -> str:
    return f"Made with {', '.join(f'{name} {version}' for name, version in versions.items())}."
