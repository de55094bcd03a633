"""A recipe as a file for people: some of its settings, each with a comment that is its own docstring."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from upcycle.reading import parse_yaml
from upcycle.recipe import Recipe, parse_recipe

COLUMN = 36
"""Where comments begin."""
SENTENCE = re.compile(r".*?\.(?=\s|$)")


def commented(recipe: Recipe, names: Sequence[str], head: Sequence[str], notes: Mapping[str, str]) -> str:
    """YAML that gives the recipe.

    Args:
        names: the settings to write, `section.field`; all others must be at their defaults.
        head: lines of comment above.
        notes: setting to what is said of it beside its docstring.
    """
    printable = ("".join(c if c.isprintable() else " " for c in line) for line in head)  # names may hold anything
    lines = [f"# {line}" for line in printable]
    for name, field in Recipe.model_fields.items():
        value = getattr(recipe, name)
        own = f"{name}." if isinstance(value, BaseModel) else name
        chosen = [each for each in names if each.startswith(own)]
        if not chosen:
            continue
        if not isinstance(value, BaseModel):
            lines += ["", *_setting("", name, value, meaning(Recipe, name), notes.get(name))]
            continue
        section = type(value)
        lines += ["", _aligned(f"{name}:", _first_sentence(section.__doc__ or field.description or ""))]
        values = value.model_dump()
        for inner in section.model_fields:
            if own + inner in chosen:
                lines += _setting("  ", inner, values[inner], meaning(section, inner), notes.get(own + inner))
    text = "\n".join(lines) + "\n"
    assert parse_recipe(parse_yaml(text, "the new recipe"), "the new recipe") == recipe
    return text


def meaning(section: type[BaseModel], name: str) -> str:
    """The first sentence of a setting's docstring, and its choices."""
    field = section.model_fields[name]
    said = _first_sentence(field.description or "")
    choices = get_args(field.annotation) if str(get_origin(field.annotation)) == "typing.Literal" else ()
    return f"{said} ({', '.join(map(str, choices))})" if choices else said


def _first_sentence(text: str) -> str:
    line = " ".join(text.split())
    found = SENTENCE.match(line)
    return found[0] if found else line


def _setting(indent: str, name: str, value: Any, said: str, note: str | None) -> Iterator[str]:
    comment = f"{said} {note}" if note else said
    if isinstance(value, list) and any(isinstance(part, str) for part in value):  # paths are long
        yield _aligned(f"{indent}{name}:", comment)
        yield from (f"{indent}  - {_spelt(part)}" for part in value)
    else:
        yield _aligned(f"{indent}{name}: {_spelt(value)}", comment)


def _aligned(text: str, comment: str) -> str:
    return f"{text:{COLUMN}} # {comment}"


def _spelt(value: Any) -> str:
    """In one line of YAML."""
    plain = int(value) if isinstance(value, float) and value.is_integer() else value
    lines = yaml.safe_dump(plain, default_flow_style=True, width=1 << 20, allow_unicode=True).splitlines()
    return lines[0]
