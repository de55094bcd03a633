"""What `upcycle benchmark` scores: the models of a run, or any model folders."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upcycle.console import say
from upcycle.errors import UpcycleError
from upcycle.run import MOE, Run, open_run


def run_benchmark(
    paths: Sequence[str],
    tasks: Sequence[str],
    task_folder: Path | None,
    experts: bool,
    out: Path | None,
    limit: int | None,
    chat_template: bool,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Score runs and model folders; write `benchmark.json` and pictures.

    Args:
        tasks: names of task files in `task_folder`, or without one of lm-eval's own tasks.
        experts: also each expert of a run's MoE before post-training, alone.
        out: by default `benchmark` in the run, if there is one run alone: its report and model card read it there.
        allow_code: whether programs that a model wrote may be run.

    Raises:
        UpcycleError: nothing to score, no task, or what `benchmark` refuses.
    """
    from upcycle.evaluation.benchmark import FOLDER, SHARE, benchmark, check_names, mark
    from upcycle.evaluation.tasks import read_tasks
    from upcycle.reporting.figures import benchmark_figure, routing_figure

    if not tasks and task_folder is None:
        raise UpcycleError("no task: give --tasks with names that lm-eval knows, or --task-folder with *.jsonl files")
    if out is None:
        out = Path(paths[0]) / FOLDER
        if len(paths) > 1 or not (Path(paths[0]) / "recipe.yaml").is_file():
            raise UpcycleError("--out is needed: a folder for the scores (a single run has its own)")
    chosen: dict[str, Any] = {name: name for name in tasks}
    if task_folder:
        chosen = read_tasks(task_folder, tasks, allow_code)
    else:
        check_names(tasks)
    if not chosen:
        raise UpcycleError(f"no task is left of {task_folder}")
    found = benchmark(contenders(paths, experts), chosen, out, limit, chat_template)
    if len(paths) == 1 and out == Path(paths[0]) / FOLDER:
        mark(Path(paths[0]))
    benchmark_figure(found, out / "benchmark.png")
    for model, scores in found.items():
        shares = {task: figures[SHARE] for task, figures in scores.items() if SHARE in figures}
        if shares and " alone" not in model:
            routing_figure(shares, out / f"routing-{re.sub(r'[^A-Za-z0-9]+', '-', model)}.png", "benchmark")
    say(f"written: {', '.join(str(path) for path in sorted(out.glob('*.*')))}")
    return found


def contenders(paths: Sequence[str], experts: bool) -> list[Any]:
    """Of a run: base, checkpoints, the experts alone if wanted, the MoE; of any other path: the model there."""
    from upcycle.evaluation.benchmark import Contender
    from upcycle.models.folders import find_model

    found: list[Any] = []
    for path in paths:
        if (Path(path) / "recipe.yaml").is_file():
            prefix = f"{Path(path).name}: " if len(paths) > 1 else ""
            found += _of_run(open_run(Path(path)), prefix, experts)
        else:
            found.append(Contender(Path(path).name, find_model(path)))
    names = [contender.name for contender in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UpcycleError(f"two models are called {twice[0]}; rename a folder, so that the table can tell them apart")
    return found


def _of_run(run: Run, prefix: str, experts: bool) -> list[Any]:
    from upcycle.evaluation.benchmark import Contender

    dense = zip(run.checkpoints, run.checkpoint_folders, strict=True)
    alone = enumerate(run.plan.experts) if experts else ()
    return [
        Contender(f"{prefix}base", run.base),
        *(Contender(f"{prefix}{checkpoint.name}", folder, base=run.base) for checkpoint, folder in dense),
        *(Contender(f"{prefix}E{i} {e.name} alone", run.routed_moe, i, run.base) for i, e in alone),
        Contender(f"{prefix}{MOE}", run.folder / "posttrain", base=run.base),
    ]
