"""Who may import whom: the rooms of the house, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "upcycle"
STAGES = ("expert_preparation", "expert_expansion", "model_upcycling", "router_initialization")
LEAVES = {"errors", "settings", "recipe", "artifacts", "console", "costs"}
STANDARD = {"hashlib", "functools", "collections", "dataclasses", "math"}
MAY_IMPORT = {
    "errors": set(),
    "console": set(),
    "settings": set(),
    "recipe": {"errors", "settings"},
    "artifacts": {"errors", "console"},
    "costs": {"artifacts"},
    "merging": {"merging"},
    "data": {"data", *LEAVES},
    "models": {"models", "merging", "data", *LEAVES},
    "training": {"training", "models", "data", *LEAVES},
    **{stage: {stage, "training", "models", "merging", "data", *LEAVES} for stage in STAGES},
    "evaluation": {"evaluation", "models", "data", *LEAVES},
    "assets": {"data"},
    "run": {"router_initialization", "expert_preparation", "models", "data", *LEAVES},
    "pipeline": {"run", *STAGES, "evaluation", "models", "data", *LEAVES},
    "reporting": {"reporting", "compare", "evaluation", "expert_expansion", "models", *LEAVES},
    "compare": {"pipeline", "run", *LEAVES},
    "benchmarking": {"run", "evaluation", "models", "reporting", *LEAVES},
    "cli": {
        "upcycle",
        "pipeline",
        "run",
        "compare",
        "benchmarking",
        "evaluation",
        "model_upcycling",
        "models",
        "reporting",
        *LEAVES,
    },
    "__init__": {"pipeline", "run", *LEAVES},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def room(path: Path) -> str:
    inner = path.relative_to(SOURCE)
    return inner.parts[0].removesuffix(".py")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    ours = {name.split(".")[1] if "." in name else name for name in imports(path) if name.split(".")[0] == "upcycle"}
    assert ours <= MAY_IMPORT[room(path)]


def test_only_training_imports_trl_and_merging_no_framework_but_torch() -> None:
    for path in FILES:
        libraries = {name.split(".")[0] for name in imports(path)}
        assert "trl" not in libraries or room(path) == "training", path
        if room(path) == "merging":
            assert libraries <= {"torch", "numpy", "cryptography", "jaxtyping", "upcycle", *STANDARD}


def test_weights_are_never_unpickled() -> None:
    for path in FILES:
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "pickle" not in imports(path), path
        assert "trust_remote_code" not in text, path


def test_the_command_line_does_not_import_torch() -> None:
    script = "import sys, upcycle, upcycle.cli; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
