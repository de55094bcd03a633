"""The benchmark scores that lie in a run, and which model they are of."""

from collections.abc import Sequence
from pathlib import Path

from upcycle.console import warn
from upcycle.errors import UpcycleError, command_line
from upcycle.pipeline.manifest import read_manifest
from upcycle.pipeline.run import is_run
from upcycle.records.benchmark import BenchmarkScores, ScoredModel
from upcycle.records.files import BENCHMARK, BENCHMARK_OF, BENCHMARK_SCORES, RESULT


def mark(run: Path) -> None:
    """Note which model of a run its scores are of."""
    BENCHMARK_OF.write(BENCHMARK.of(run), ScoredModel(posttrain=_posttrained(run)))


def own_folder(paths: Sequence[str]) -> Path:
    """Where the scores of a single run go; its report and model card read them there.

    Raises:
        UpcycleError: there are several models, or one that is no run.
    """
    if len(paths) > 1 or not is_run(Path(paths[0])):
        raise UpcycleError("--out is needed: a folder for the scores (a single run has its own)")
    return BENCHMARK.of(Path(paths[0]))


def read_scores(run: Path) -> BenchmarkScores:
    """What `upcycle benchmark RUN` found last of a run: model to task to figures; nothing if it has not been asked.

    Scores of a model that was trained anew since are named, and not used.
    """
    scores, of = BENCHMARK_SCORES.known_of(run), BENCHMARK_OF.known_of(run)
    if scores is None or of is None:
        return {}
    if of.posttrain != _posttrained(run):
        path = BENCHMARK_SCORES.of(run)
        again = command_line("benchmark", run)
        warn(f"{path} is of a different model than the run has now and is ignored; `{again}` scores it")
        return {}
    return scores


def _posttrained(run: Path) -> str:
    manifest = read_manifest(RESULT.of(run))
    return manifest.content if manifest else ""
