"""Commands that write, as rows; a tiny world that they read; what a folder holds afterwards."""

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import yaml

NOT_REPRODUCED = ("costs.json", ".lock")
"""Seconds and gigabytes; nothing at all."""


@dataclass(frozen=True)
class Job:
    """A command that writes; in its words {case} is the case's folder, and {world} what all cases read."""

    name: str
    words: tuple[str, ...]
    before: tuple[str, ...] = ()
    """The command that makes what it starts from."""
    done: str = ""
    """What the same command says, and exits with 2, when it was done already."""


def _run(*settings: str) -> tuple[str, ...]:
    return ("run", "{world}/recipe.yaml", "--run", "{case}/run", *settings)


ADOPT = _run("prepare.checkpoints=[{world}/c1, {world}/c2]", "route.start=upit", "evaluate.models=all")
LORA = _run("prepare.train=lora", "lora.dropout=0.1")
VARIANTS = ("a: {world}/recipe.yaml", "b: {world}/recipe.yaml assemble.shared=base")
JOBS = (
    Job("ffn", _run()),
    Job("full", _run("prepare.train=full", "expand.merge=ties", "posttrain.balance_bias_rate=0.01")),
    Job("lora", LORA),
    Job("bottleneck", _run("prepare.train=bottleneck", "expand.copies_of=base")),
    Job("by domain", _run("prepare.train=lora", "prepare.by_domain=true")),
    Job("adopt", ADOPT),
    Job("moved experts", (*ADOPT, "route.expert_learning_rate=0.001")),
    Job("update", (*ADOPT, "expand.num_experts=4", "--update"), ADOPT),
    Job("compare", ("compare", *VARIANTS, "--seeds", "1", "--out", "{case}/compared", "--no-keep-models")),
    Job("export", ("export", "{case}/run", "--to", "{case}/out"), ADOPT, "is not empty"),
    Job("fold", ("export", "{case}/run", "--fold", "--to", "{case}/out"), LORA, "is not empty"),
    Job("report", ("report", "{case}/run"), ADOPT),
    Job("inspect", ("inspect", "{case}/run", "--figure", "{case}/x.png"), ADOPT),
    Job("benchmark", ("benchmark", "{case}/run", "--task-folder", "{world}/tasks"), ADOPT),
)
RUNS = JOBS[:8]
"""Those that make a run; the first five are also what files are cut of."""
KINDS = JOBS[:5]
SHORT = (JOBS[0], JOBS[2], JOBS[9])


def contents(folder: Path) -> dict[str, bytes]:
    """Every path below a folder to its content, without seconds and gigabytes; nothing of what was set aside."""
    found = {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"/" for p in folder.rglob("*")}
    found = {name: content for name, content in found.items() if ".partial.old-" not in name}
    for name in [name for name in found if Path(name).name in NOT_REPRODUCED]:
        found[name] = " ".join(sorted(yaml.safe_load(found[name]) or ())).encode()
    for name in [name for name in found if Path(name).name == "measures.json"]:
        measures = json.loads(found[name])
        del measures["seconds"]
        found[name] = json.dumps(measures).encode()
    return found


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
    """Missing, left over, other content; empty if there are none."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return ", ".join(f"{name} ({'missing' if name not in found else 'differs or is left over'})" for name in names[:6])


def make_world(folder: Path) -> None:
    """A base, checkpoints, rows, a recipe, tasks; modules that a forked process finds imported."""
    with mock.patch("jaxtyping.install_import_hook"):
        from conftest import make_dense, perturbed, write_rows

    base = make_dense(folder / "base")
    for i in (1, 2):
        perturbed(base, folder / f"c{i}", i)
    training = {"epochs": 1, "checkpoint_every": 0.5, "learning_rate": 1e-3, "warmup_fraction": 0.0}
    training |= {"batch_size": 8, "micro_batch_size": 8}
    values = {
        "base": str(base),
        "data": {"train": str(write_rows(folder / "rows.jsonl", 56)), "max_length": 64},
        "prepare": training,
        "lora": {"rank": 4},
        "expand": {"num_experts": 3},
        "route": {"min_samples_per_expert": 3, "epochs": 1, "start": "random"},
        "posttrain": training,
        "evaluate": {"models": "ends", "exact_match": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "say.jsonl").write_text('{"question": "copy ab", "choices": ["ab", "ba"], "answer": 0}\n' * 2)


def preload(jobs: Sequence[Job]) -> None:
    """Import what commands do, so that a forked one does not."""
    stages = ("expert_preparation.prepare", "model_upcycling.export", "router_initialization.route")
    for name in ("cli", "training.fine_tune", "evaluation.evaluate", *(f"stages.{stage}" for stage in stages)):
        import_module(f"upcycle.{name}")
    for name in ("matplotlib.pyplot", "lm_eval.models.huggingface") if jobs is JOBS else ():
        import_module(name)
    import_module("torch").set_num_threads(1)
    gc.collect()
    gc.freeze()  # else every fork goes through all of it
