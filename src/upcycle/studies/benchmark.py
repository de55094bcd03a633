"""What `upcycle benchmark` scores: the models of a run, or any model folders."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from upcycle.distributed.world import is_main
from upcycle.errors import UpcycleError
from upcycle.evaluation.benchmark import Contender, Task, benchmark, check_names
from upcycle.evaluation.tasks import read_tasks
from upcycle.pipeline.benchmarks import mark
from upcycle.pipeline.run import Run, is_run, open_run
from upcycle.records.benchmark import BenchmarkScores
from upcycle.records.files import ASSEMBLE, BENCHMARK, EXPAND, POSTTRAIN, PREPARE, RESULT, ROUTE
from upcycle.records.scores import BASE, MOE
from upcycle.weights.folders import find_model


def run_benchmark(
    paths: Sequence[str],
    tasks: Mapping[str, Task],
    experts: bool,
    out: Path,
    limit: int | None = None,
    chat_template: bool = True,
) -> BenchmarkScores:
    """Score runs and model folders; write `benchmark.json`.

    Args:
        tasks: see `choose_tasks`.
        experts: also each expert of a run's MoE before post-training, alone.

    Raises:
        UpcycleError: two models of one name, or what `benchmark` refuses.
    """
    found = benchmark(contenders(paths, experts), tasks, out, limit, chat_template)
    if is_main() and len(paths) == 1 and out == BENCHMARK.of(Path(paths[0])):
        mark(Path(paths[0]))
    return found


def choose_tasks(names: Sequence[str], folder: Path | None, allow_code: bool) -> Mapping[str, Task]:
    """The tasks to ask, by name.

    Args:
        names: task files in `folder`, or without one lm-eval's own tasks.
        allow_code: whether programs that a model wrote may be run.

    Raises:
        UpcycleError: no task, or one that is not there.
    """
    if not names and folder is None:
        raise UpcycleError("no task: give --tasks with names that lm-eval knows, or --task-folder with *.jsonl files")
    if folder is None:
        check_names(names)
        return {name: name for name in names}
    chosen = read_tasks(folder, names, allow_code)
    if not chosen:
        raise UpcycleError(
            f"no task is left of {folder}: they run programs that the model writes; --allow-code permits that"
        )
    return chosen


def contenders(paths: Sequence[str], experts: bool) -> list[Contender]:
    """Of a run: base, checkpoints, the experts alone if wanted, the MoE; of any other path: the model there."""
    found: list[Contender] = []
    needs = (PREPARE, POSTTRAIN, *((EXPAND, ASSEMBLE, ROUTE) if experts else ()))
    for path in paths:
        if is_run(Path(path)):
            prefix = f"{Path(path).name}: " if len(paths) > 1 else ""
            found += _of_run(open_run(Path(path), needs), prefix, experts)
        else:
            found.append(Contender(Path(path).name or Path(path).resolve().name, find_model(path)))
    names = [contender.name for contender in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UpcycleError(f"two models are called {twice[0]}; rename a folder, so that the table can tell them apart")
    return found


def _of_run(run: Run, prefix: str, experts: bool) -> list[Contender]:
    run.check_unchanged("base", "checkpoints")
    base = run.base.folder
    dense = zip(run.checkpoints, run.checkpoint_folders, strict=True)
    alone = enumerate(run.plan.labels) if experts else ()
    found = [
        Contender(BASE, base),
        *(Contender(checkpoint.name, folder, base=base) for checkpoint, folder in dense),
        *(Contender(f"{label} alone", run.routed_moe, i, base) for i, label in alone),
        Contender(MOE, RESULT.of(run.folder), base=base),
    ]
    return [replace(one, name=f"{prefix}{one.name}", chat_template=run.base.chat_template) for one in found]
