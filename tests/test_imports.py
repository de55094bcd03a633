"""Who may import whom: the rooms of the house, read from the source."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import load_recipe

SOURCE = Path(__file__).parents[1] / "src" / "upcycle"
STAGES = {f"stages.{name}" for name in ("expert_preparation", "expert_expansion", "router_initialization")} | {
    "stages.model_upcycling"
}
LEAVES = {"errors", "console", "disk", "hashes", "reading", "settings", "recipe", "types", "records", "stopping"}
"""They need nothing of the rooms below."""
STANDARD = {"hashlib", "functools", "collections", "dataclasses", "math"}
MAY_IMPORT = {
    "errors": set(),
    "stopping": set(),
    "console": set(),
    "types": set(),
    "settings": {"errors"},
    "disk": {"errors"},
    "hashes": {"disk", "errors"},
    "reading": {"errors"},
    "idle": set(),
    "recipe": {"errors", "idle", "reading", "settings"},
    "records": {"records", "disk", "hashes", "reading", "errors"},
    "merging": {"merging"},
    "distributed": {"distributed", "errors"},
    "weights": {"weights", *LEAVES},
    "routing": {"routing", *LEAVES},
    "architectures": {"architectures", "weights", *LEAVES},
    "experts": {"experts", "architectures", "weights", "merging", "routing", "distributed", *LEAVES},
    "data": {"data", "routing", "weights", *LEAVES},
    "training": {"training", "experts", "routing", "data", "distributed", *LEAVES},
    **{
        stage: {stage, "experts", "training", "routing", "weights", "merging", "data", "distributed", *LEAVES}
        for stage in STAGES
    },
    "evaluation": {"evaluation", "experts", "routing", "data", "weights", "distributed", *LEAVES},
    "pipeline": {
        *("pipeline", "evaluation", "experts", "architectures", "weights", "data", "distributed"),
        *("training.trainer_settings", "training.forecast", "training.packing", *STAGES, *LEAVES),
    },
    "studies": {"studies", "pipeline", "evaluation", "weights", "distributed", *LEAVES},
    "reporting": {"reporting", "pipeline", "studies.statistics", "architectures.clients", *LEAVES},
    "assets": {"data"},
    "api": {
        *("pipeline", "reporting", "evaluation", "experts", "distributed"),
        *("stages.model_upcycling", *LEAVES),
    },
    "command": {"distributed", *LEAVES},
    "cli": {
        "command",
        "api",
        "studies",
        "reporting",
        "evaluation",
        "pipeline",
        "experts",
        "architectures",
        "distributed",
        "data",
        "stages.model_upcycling",
        "__init__",
        *LEAVES,
    },
    "__main__": {"cli", "stopping", "distributed"},
    "__init__": {"api", "pipeline", *LEAVES},
}
WITHOUT_TORCH = sorted(
    f"upcycle.{'.'.join(path.relative_to(SOURCE).with_suffix('').parts)}"
    for room in ("reporting", "records", "pipeline")
    for path in (SOURCE / room).glob("[a-z]*.py")
    if path.name != "summary.py"
)


def imports(path: Path) -> set[str]:
    """Modules that a file imports, also within functions; of `upcycle` itself as `upcycle.__init__`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module == "upcycle"
            inner = [f"upcycle.{alias.name}" for alias in node.names if (SOURCE / f"{alias.name}.py").is_file()]
            found.update((inner or ["upcycle.__init__"]) if whole else [node.module])
            # `from upcycle.pipeline import stages` names a module of the room
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def room(module: str) -> str:
    """`stages.x` for one of the stages, otherwise the first part behind `upcycle`."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "stages" and len(parts) > 1 else parts[0]


def module_of(path: Path) -> str:
    return ".".join(("upcycle", *path.relative_to(SOURCE).with_suffix("").parts))


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    ours = {name for name in imports(path) if name.split(".")[0] == "upcycle"}
    allowed = MAY_IMPORT.get(room(module_of(path)), set())
    assert [name for name in ours if room(name) not in allowed and name.removeprefix("upcycle.") not in allowed] == []


def test_every_rule_is_about_a_room_that_there_is() -> None:
    assert {room(module_of(path)) for path in FILES} - {"stages"} == set(MAY_IMPORT) | {"stages.__init__"}


def test_only_training_imports_trl_and_merging_no_framework_but_torch() -> None:
    for path in FILES:
        libraries = {name.split(".")[0] for name in imports(path)}
        assert "trl" not in libraries or room(module_of(path)) == "training", path
        if room(module_of(path)) == "merging":
            assert libraries <= {"torch", "numpy", "cryptography", "jaxtyping", "upcycle", *STANDARD}


def test_one_room_names_torchs_processes() -> None:
    for path in FILES:
        if room(module_of(path)) != "distributed":
            assert "torch.distributed" not in path.read_text(), path
            assert "transformers.distributed" not in path.read_text(), path


def test_weights_are_never_unpickled() -> None:
    for path in FILES:
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "pickle" not in imports(path), path


def test_no_remote_code_is_ever_trusted() -> None:
    """Without the argument, transformers asks on the terminal, and a `y` runs what the folder holds."""
    loaders = ("AutoTokenizer", "AutoModelForCausalLM", "HFLM", "AutoConfig")
    calls = [
        (path, node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and any(name in ast.unparse(node.func) for name in loaders)
    ]
    assert len(calls) >= 3
    for path, call in calls:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert given.get("trust_remote_code") == "False", (path, ast.unparse(call))


def test_the_kind_of_expert_is_asked_in_one_room() -> None:
    """Outside of `experts` and the settings' own validation nobody looks at what an expert is."""
    questions = (
        "is_adapter",
        "mixture_of",
        "prepare.adapters",
        "shares_base",
        "starts_as_base",
        "peft_type",
        "peft_config",
        ".train ==",
    )
    for path in FILES:
        if room(module_of(path)) not in ("experts", "settings", "recipe"):
            assert [word for word in questions if word in path.read_text()] == [], path


def test_the_command_line_does_not_import_torch() -> None:
    script = "import sys, upcycle, upcycle.cli; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_reports_records_and_the_pipeline_are_read_without_torch() -> None:
    names = ", ".join(WITHOUT_TORCH)
    script = f"import sys\nsys.modules['torch'] = None\nimport {names}"  # importing torch would raise
    subprocess.run([sys.executable, "-c", script], check=True)


HEAVY = ("torch", "transformers", "transformers.modeling_utils", "scipy", "peft", "datasets", "trl", "lm_eval")
PLAIN = ["torch", "transformers"]
MODELS = [*PLAIN, "transformers.modeling_utils", "scipy"]
"""What comparing with transformers' models takes."""
VERBS = (
    ("recipes", []),
    ("families", []),
    ("run RECIPE --run new --dry-run", PLAIN),
    ("expand RECIPE --run planning", PLAIN),
    ("export assembled/assemble --to exported", PLAIN),
    ("assemble RECIPE --run planning", MODELS),
    ("prepare RECIPE --run new", MODELS),
    ("check BASE", MODELS),
)
"""One after the other in one process; which of the heavy modules each leaves there."""
RUN_VERBS = """
import json, sys
from upcycle.cli import app
for words, may in json.loads(sys.argv[2]):
    app(words.split(), standalone_mode=False)
    there = [name for name in json.loads(sys.argv[1]) if name in sys.modules]
    assert there == may, (words, there)
"""


def test_a_verb_imports_no_more_than_it_needs(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    """One that plans or copies waits neither for transformers' models nor for PEFT, TRL and datasets."""
    given = f"prepare.checkpoints=[{','.join(map(str, checkpoints))}]"
    overrides = [f"base={base}", "data.train=builtin:train", given, "expand.num_experts=4"]
    for folder, stages in (("planning", ("prepare",)), ("assembled", ("prepare", "expand", "assemble"))):
        run_stages(Run(load_recipe("upit", overrides), tmp_path / folder), stages)
    recipe = " ".join(["upit", *overrides])
    verbs = [(verb.replace("RECIPE", recipe).replace("BASE", str(base)), may) for verb, may in VERBS]
    command = [sys.executable, "-c", RUN_VERBS, json.dumps(HEAVY), json.dumps(verbs)]
    subprocess.run(command, check=True, cwd=tmp_path)
