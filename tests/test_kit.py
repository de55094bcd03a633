"""What a release and a contributor need: versions that agree, a site that builds, a tutorial that runs."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import upcycle

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def plain(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def mkdocs_python() -> str | None:
    """This Python, which has MkDocs after `make setup`, or that of `make docs`."""
    own = ROOT / ".venv-docs" / "bin" / "python"
    if find_spec("mkdocs") and find_spec("material"):
        return sys.executable
    return str(own) if own.exists() else None


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert upcycle.__version__ == citation["version"] == newest[1]


def test_the_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["license"]


def test_hooks_have_the_versions_of_the_tests() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pinned = [name.split("==") for hook in hooks for name in hook.get("additional_dependencies", [])]
    assert {name for name, _ in pinned} == {"ruff"}
    assert [version for name, version in pinned if version != PINS[name]] == []


def test_every_pin_meets_its_requirement() -> None:
    named = {plain(re.split(r"[<>=\[]", line)[0]) for line in PROJECT["dependencies"]}
    assert named <= {plain(name) for name in PINS}


def test_the_lock_has_every_requirement_with_hashes_and_the_versions_of_the_tests() -> None:
    blocks = re.findall(
        r"^([\w.-]+)(?:\[\w,]+)?==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", LOCK, re.M
    )
    locked = {plain(name): version for name, version, _ in blocks}
    assert len(locked) == len(re.findall(r"==", LOCK.split("pip install --no-deps .")[1]))
    named = {plain(re.split(r"[<>=\[]", line)[0]) for line in PROJECT["dependencies"]}
    assert named - {"torch"} <= locked.keys()
    pins = {plain(name): version for name, version in PINS.items()}
    assert {name: version for name, version in locked.items() if pins.get(name, version) != version} == {}


def test_torch_is_pinned_alike_everywhere() -> None:
    texts = [
        (ROOT / name).read_text()
        for name in ("Makefile", ".github/workflows/ci.yml", "constraints.txt", "requirements.lock")
    ]
    assert {version for text in texts for version in re.findall(r"torch==([\w.]+)", text)} == {PINS["torch"]}


def test_the_workflow_runs_what_it_should() -> None:
    commands = "\n".join(step.get("run", "") for job in WORKFLOW["jobs"].values() for step in job["steps"])
    for command in ("pre-commit run", "pytest", "tests/test_notebook.py", "make docs", "make release-check"):
        assert command in commands
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"][0] == lowest


def test_issue_templates_are_forms() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
    assert len(forms) >= 3
    for form in forms:
        assert {"name", "description", "body"} <= yaml.safe_load(form.read_text()).keys(), form


@pytest.mark.skipif(mkdocs_python() is None, reason="MkDocs is not installed (make setup, or make docs)")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [str(mkdocs_python()), "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for page, text in {"settings": "route.logit_std", "cli": "--match", "python": "run_stages"}.items():
        assert text in (tmp_path / "reference" / page / "index.html").read_text()


@pytest.mark.long
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Its files and its commands, in the order of the page; blocks of `bash` need other programs."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    places = [("PATH", str(Path(sys.executable).parent)), ("PYTHONPATH", str(ROOT / "src"))]
    environment = os.environ | {name: f"{first}{os.pathsep}{os.environ.get(name, '')}" for name, first in places}
    said = ""
    for kind, name, text in re.findall(r"^```(\w+)(?: title=\"([\w.]+)\")?\n(.*?)^```", page, re.M | re.S):
        if name:
            (tmp_path / name).write_text(text)
        elif kind == "sh":
            words = ["bash", "-e", "-c", text]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            said += done.stdout
    assert "15:05" in said
    assert (tmp_path / "dates-moe" / "model.safetensors").exists()
