"""What the documentation names is there: symbols, files, commands, settings; tables have a row for each choice."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import get_args

import pytest
import typer

from upcycle.cli import app
from upcycle.experts.kinds import KINDS
from upcycle.merging.kernels import KERNELS
from upcycle.merging.low_rank import MERGES
from upcycle.recipe import Recipe, shipped_recipes
from upcycle.records.comparison import METRICS, Measures, Summary
from upcycle.records.plan import ExpansionPlan
from upcycle.records.route import RouteReport
from upcycle.settings import ExpandSettings, PrepareSettings, RouteSettings
from upcycle.stages.router_initialization.assignment import ASSIGNMENTS
from upcycle.stages.router_initialization.starts import STARTS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "upcycle"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
DOCS = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
SPANS = re.compile(r"`([^`\n]+)`")
COMMANDS = sorted(
    {
        re.sub(r"\s+#.*", "", line).strip()
        for path in DOCS
        for block in re.findall(r"(?:^    .*\n)+|```(?:ba)?sh\n.*?```", path.read_text(), re.M | re.S)
        for line in block.splitlines()
        if line.strip().startswith("upcycle ") and "..." not in line
    }
)
LINKS = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)(?:#[^)\s]*)?\)")


def spans(path: Path) -> list[str]:
    return SPANS.findall(path.read_text())


def rooms() -> set[str]:
    return {path.stem for path in PACKAGE.iterdir() if not path.stem.startswith("__")} - set(Recipe.model_fields)


def resolves(name: str) -> bool:
    """Whether `room.module.symbol` is something in the package."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(["upcycle", *parts[:length]]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_every_symbol_that_a_document_names_exists(path: Path) -> None:
    dotted = [span for span in spans(path) if re.fullmatch(r"\w+(\.\w+)+", span) and span.split(".")[0] in rooms()]
    assert [name for name in dotted if not name.endswith(".py") and not resolves(name)] == []


def test_the_paper_s_table_names_symbols() -> None:
    assert sum(span.startswith("stages.") for span in spans(ROOT / "docs" / "paper.md")) >= 9


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_every_file_that_a_document_names_exists(path: Path) -> None:
    named = [span.split("::")[0] for span in spans(path) if re.fullmatch(r"[\w./-]+\.py(::\w+)?", span)]
    places = [p for folder in ("src", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    there = [f"/{place.relative_to(ROOT)}" for place in places]
    assert [name for name in named if not any(place.endswith(f"/{name}") for place in there)] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda p: p.name)
def test_every_link_of_a_document_leads_to_a_file(path: Path) -> None:
    assert [link for link in LINKS.findall(path.read_text()) if not (path.parent / link).exists()] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


def test_usage_names_every_verb_and_every_recipe() -> None:
    text = (ROOT / "docs" / "usage.md").read_text()
    verbs = set(re.findall(r"\w+", " ".join(re.findall(r"^    upcycle (\S+)", text, re.M))))
    assert set(typer.main.get_command(app).commands) == verbs
    assert [name for name in shipped_recipes() if f"`{name}`" not in text] == []


def test_the_tree_of_contributing_is_the_package() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("    src/upcycle/\n")[1].split("## ")[0]
    listed = set(re.findall(r"\b(\w+)/", tree))
    packages = {path.parent.name for path in PACKAGE.rglob("__init__.py")} - {"upcycle"}
    assert packages <= listed


@pytest.mark.parametrize("text", COMMANDS)
def test_every_command_of_the_documentation_parses(text: str) -> None:
    root = typer.main.get_command(app)
    for line in alternatives(text):
        _, name, *words = shlex.split(line)
        command = root.commands[name]
        command.make_context(name, words, resilient_parsing=False)
        for override in (word for given in words for word in shlex.split(given)):
            assert_setting(override)


def alternatives(text: str) -> list[str]:
    """A line with every choice: `a|b` one after the other, what is in brackets left in."""
    plain = re.sub(r"\[(--[^\]]*)\]", r"\1", text)
    first, *rest = plain.split()[1:]
    return [" ".join(["upcycle", verb, *rest]) for verb in first.split("|")]


def assert_setting(word: str) -> None:
    """Of `section.field=value`: there is such a setting."""
    name, equals, _ = word.partition("=")
    if not equals or word.startswith("-"):
        return
    fields = Recipe.model_fields
    for part in name.split("."):
        assert part in fields, word
        fields = getattr(fields[part].annotation, "model_fields", {})


def test_there_are_commands_to_parse() -> None:
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize(
    ("section", "field", "table"),
    [
        (PrepareSettings, "train", KINDS),
        (ExpandSettings, "merge", KERNELS),
        (ExpandSettings, "adapters", MERGES),
        (RouteSettings, "start", STARTS),
        (RouteSettings, "assignment", ASSIGNMENTS),
        (ExpansionPlan, "merge", KERNELS),
        (RouteReport, "start", STARTS),
        (RouteReport, "assignment", ASSIGNMENTS),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_the_choices_of_a_setting_are_the_rows_of_its_table(section: type, field: str, table: dict) -> None:
    assert set(get_args(section.model_fields[field].annotation)) == set(table)


def test_a_record_repeats_the_choices_of_its_setting() -> None:
    for field in ("similarity", "perturb"):
        choices = [set(get_args(model.model_fields[field].annotation)) for model in (ExpansionPlan, ExpandSettings)]
        assert choices[0] == choices[1]


def test_every_metric_is_a_field_of_what_is_measured() -> None:
    assert METRICS.keys() <= Measures.model_fields.keys() & Summary.model_fields.keys()


def test_tables_of_results_are_those_of_the_cells(warm: Path) -> None:
    """`make results` changes nothing."""
    script = (
        "import results; text = results.PAGE.read_text(encoding='utf-8'); assert results.page(text) == text; "
        "assert all(path.read_text(encoding='utf-8') == drawn for path, drawn in results.pictures(text).items())"
    )
    subprocess.run([warm, "-c", script], cwd=ROOT / "benchmarks", check=True)


def test_tables_of_families_are_those_of_the_code(warm: Path) -> None:
    """`make families` changes nothing, and all three tables are there."""
    script = (
        "import families; text = families.PAGE.read_text(encoding='utf-8'); assert families.page(text) == text; "
        "assert {name for _, name, _ in families.BLOCK.findall(text)} == set(families.tables())"
    )
    subprocess.run([warm, "-c", script], cwd=ROOT / "benchmarks", check=True)


def test_tables_of_benchmarks_are_those_of_the_figures_kept(warm: Path) -> None:
    """`--keep` of both scripts has written both figures and table."""
    script = (
        "import assembly_vs_mergekit, verb_start; text = verb_start.PAGE.read_text(encoding='utf-8'); "
        "assert all(job.page(text) == text and job.BLOCK.search(text) for job in (assembly_vs_mergekit, verb_start))"
    )
    subprocess.run([warm, "-c", script], cwd=ROOT / "benchmarks", check=True)


def test_every_benchmark_imports(warm: Path) -> None:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    assert len(names) >= 8
    script = f"import {', '.join(names)}"
    subprocess.run([warm, "-c", script], cwd=ROOT / "benchmarks", check=True)


def test_nothing_lies_at_the_top_that_the_project_does_not_need() -> None:
    """Packages that were downloaded, pictures, logs: what work leaves behind."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name for name in listed.stdout.splitlines() if "/" not in name}
    known = {".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt"}
    kit = {".pre-commit-config.yaml", "CITATION.cff", "SECURITY.md", "mkdocs.yml", "requirements.lock"}
    assert top == {*known, *kit, "pyproject.toml"}
