"""Pages that are made when the site is built: the reference from the code, the rest from files of the repository.

MkDocs calls `on_files`. Nothing here imports torch, so the site is built in an environment without it.
"""

import inspect
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "src"))

import click  # noqa: E402
import typer  # noqa: E402
from pydantic import BaseModel  # noqa: E402

import upcycle  # noqa: E402
from upcycle.cli import app  # noqa: E402
from upcycle.recipe import Recipe, shipped_recipes  # noqa: E402
from upcycle.settings import Settings, Source  # noqa: E402

TOP = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
"""Page to the file that it repeats."""
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links from docs/ to a file of the repository's top go to the page that repeats it."""
    here = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", here, found[1]))
        page_of = {file: name for name, file in TOP.items()}
        return posixpath.relpath(page_of[path], here or ".") + (found[2] or "") if path in page_of else found[0]

    return LINK.sub(link, markdown)


def pages() -> dict[str, str]:
    made = {name: from_top((ROOT / file).read_text(encoding="utf-8")) for name, file in TOP.items()}
    return made | {
        "notebook.md": notebook_page((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8")),
        "reference/settings.md": settings_page(),
        "reference/cli.md": cli_page(),
        "reference/recipes.md": recipes_page(),
        "reference/python.md": python_page(upcycle),
    }


def from_top(text: str) -> str:
    """The text with links that hold within the site; what is not in it is named without a link."""
    moved = {file: name for name, file in TOP.items()}

    def link(found: re.Match[str]) -> str:
        label, path, anchor = found[1], found[2], found[3] or ""
        if path in moved:
            return f"[{label}]({moved[path]}{anchor})"
        if path.startswith("docs/") and path.endswith(".md"):
            return f"[{label}]({path.removeprefix('docs/')}{anchor})"
        return label

    return re.sub(r"\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)", link, text)


def notebook_page(text: str) -> str:
    """The notebook's text and code, without output: it is kept without."""
    heading, *cells = json.loads(text)["cells"]
    title, _, rest = "".join(heading["source"]).partition("\n")
    lines = [title, "", "[Download the notebook](notebook.ipynb).", rest]
    for cell in cells:
        source = "".join(cell["source"])
        lines += ["", f"```python\n{source}\n```" if cell["cell_type"] == "code" else source]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Every setting by section, as `upcycle settings` has them."""
    lines = [
        "# Settings",
        "",
        "Made from the code. `upcycle settings` prints the same for your version.",
        "A setting goes into a recipe, or on the command line as `section.field=value`.",
        "",
        *section_list("Top level", "", Recipe),
    ]
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            lines += section_list(f"`{name}`", f"{name}.", field.annotation)
    lines += section_list("A source of `data.train`", "", Source)
    return "\n".join(lines) + "\n"


def section_list(title: str, prefix: str, section: type[BaseModel]) -> Iterator[str]:
    yield from (f"## {title}", "", inspect.cleandoc(section.__doc__ or ""), "")
    for name, field in section.model_fields.items():
        if field.description:
            default = "required" if field.is_required() else f"default `{yaml_value(field.default)}`"
            yield from entry(f"{prefix}{name}", f"{type_name(field.annotation)}; {default}", field.description)


def entry(name: str, kind: str, meaning: str) -> Iterator[str]:
    """One term of a definition list, which reads well at any width."""
    yield from (f"`{name}` <small>{kind}</small>" if kind else f"`{name}`", f":   {one_line(meaning)}", "")


def type_name(annotation: Any) -> str:
    """`a, b or c` for choices, `list of ...`, and the plain names of the rest."""
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    if str(get_origin(annotation)) == "typing.Literal":
        return " | ".join(f"`{argument}`" for argument in arguments)
    if get_origin(annotation) is list:
        return f"list of {type_name(arguments[0])}"
    if get_origin(annotation) is dict:
        return "object"
    if arguments:
        optional = len(arguments) < len(get_args(annotation))
        return " or ".join([*map(type_name, arguments), *(["null"] if optional else [])])
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true | false"}
    return names.get(annotation.__name__, "object")


def yaml_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value).replace("'", "")


def one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text)


def cli_page() -> str:
    """Every verb with its arguments and options, by the panels of `upcycle --help`."""
    root = typer.main.get_command(app)
    commands = root.commands
    lines = ["# Command line", "", "Made from the code. `upcycle VERB --help` prints the same for your version.", ""]
    for rows in options_of(root).values():
        lines += rows
    panels = dict.fromkeys(panel_of(command) for command in commands.values())
    of_run = options_of(commands["run"])
    for panel in panels:
        lines += [f"## {panel}", ""]
        for name, command in commands.items():
            if panel_of(command) == panel:
                lines += verb_lines(name, command, of_run)
    return "\n".join(lines) + "\n"


def panel_of(command: click.Command) -> str:
    return str(getattr(command, "rich_help_panel", None) or "Commands")


def verb_lines(name: str, command: click.Command, of_run: dict[str, list[str]]) -> Iterator[str]:
    words = " ".join(usage_of(parameter) for parameter in command.params if is_argument(parameter))
    yield from (f"### `upcycle {name}`", "", inspect.cleandoc(command.help or ""), "")
    yield from ("```text", " ".join(f"upcycle {name} {words} [OPTIONS]".split()), "```", "")
    mine = options_of(command)
    if name != "run" and mine and mine.items() <= of_run.items():
        without = [f"`{option}`" for option in of_run if option not in mine]
        yield from (f"Arguments and options are those of `upcycle run`, without {', '.join(without)}.", "")
        return
    for rows in mine.values():
        yield from rows


def options_of(command: click.Command) -> dict[str, list[str]]:
    """The entries of a verb's arguments and options by their names."""
    shown = (p for p in command.params if p.name != "help" and not getattr(p, "hidden", False))
    return {names_of(parameter): list(parameter_entry(parameter)) for parameter in shown}


def is_argument(parameter: click.Parameter) -> bool:
    return parameter.param_type_name == "argument"


def usage_of(parameter: click.Parameter) -> str:
    shown = parameter.metavar or (parameter.name or "").upper()
    return shown if parameter.required or shown.startswith("[") else f"[{shown}]"


def names_of(parameter: click.Parameter) -> str:
    return usage_of(parameter) if is_argument(parameter) else ", ".join([*parameter.opts, *parameter.secondary_opts])


def parameter_entry(parameter: click.Parameter) -> Iterator[str]:
    default = "required" if parameter.required else shown_default(parameter.default)
    return entry(names_of(parameter), default, getattr(parameter, "help", None) or "")


def shown_default(value: Any) -> str:
    empty = value in (None, "", [], ()) or callable(value) or "UNSET" in repr(value)
    return "" if empty else f"default `{str(value).lower() if isinstance(value, bool) else value}`"


def recipes_page() -> str:
    lines = [
        "# Recipes",
        "",
        "The recipes in the package, by name: `upcycle run NAME ...`; `upcycle recipes NAME` prints one.",
        "",
    ]
    for name, text in sorted(shipped_recipes().items()):
        lines += [f"## `{name}`", "", "```yaml", text.strip(), "```", ""]
    return "\n".join(lines) + "\n"


def python_page(package: ModuleType) -> str:
    """The names that `import upcycle` offers, with signatures."""
    lines = [
        "# Python",
        "",
        "Made from the code. These names are the whole public API; what lies deeper may change between versions.",
        "",
        "```python",
        "from pathlib import Path",
        "",
        "from upcycle import Run, load_recipe, run_stages",
        "",
        'recipe = load_recipe("quickstart", ["expand.num_experts=4", "data.fraction=0.1"])',
        'run_stages(Run(recipe, Path("runs/small")))',
        "```",
        "",
    ]
    for name in sorted(package.__all__, key=lambda name: (name.startswith("_"), name.lower())):
        found = getattr(package, name)
        lines += [f"## `{name}`", "", *described(name, found), ""]
    return "\n".join(lines) + "\n"


def described(name: str, found: Any) -> Iterator[str]:
    if isinstance(found, str):
        yield f"The version: `{found}`."
        return
    yield from ("```python", f"{name}{signature(found)}", "```", "", sections(inspect.getdoc(found) or ""), "")
    if inspect.isclass(found) and not issubclass(found, BaseException):
        for attribute, value in vars(found).items():
            text = inspect.getdoc(getattr(value, "func", value)) or ""
            is_property = isinstance(value, property) or type(value).__name__ == "cached_property"
            if attribute.startswith("_") or not text or not (inspect.isfunction(value) or is_property):
                continue
            yield f"- `{attribute}{'' if is_property else signature(value)}`: {one_line(text)}"


def signature(found: Any) -> str:
    if inspect.isclass(found) and issubclass(found, BaseModel):
        return "(...)"
    try:
        text = str(inspect.signature(found))
    except ValueError:
        return ""
    text = re.sub(r"\b(upcycle|collections|pathlib|typing)\.(\w+\.)*", "", text)
    return text.replace("(self, ", "(").replace("(self)", "()")


def sections(text: str) -> str:
    """A docstring's `Raises:` and `Args:` as lists."""
    text = re.sub(r"^(Raises|Args|Returns):$", r"**\1**\n", text, flags=re.M)
    return re.sub(r"^    (\w+): ", r"- `\1`: ", text, flags=re.M)
