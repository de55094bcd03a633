"""What a run made, on the terminal."""

from upcycle.console import table, tell
from upcycle.errors import command_line
from upcycle.experts.kinds import kind_in
from upcycle.pipeline.costs import read_costs
from upcycle.pipeline.run import Run
from upcycle.records.files import LOG, PLAN, RESULT, ROUTE_REPORT, SCORES


def show_summary(run: Run) -> None:
    """What the run made, what it cost, where it lies."""
    rows = []
    for stage, cost in read_costs(run.folder).items():
        record = LOG.known(run.folder / stage)
        trained = (f"{record.tokens:,}", f"{record.steps:,}") if record else ("", "")
        rows.append((stage, f"{cost.seconds:.0f}", f"{cost.memory_gb:.1f}", *trained))
    table("cost per stage", ("stage", "seconds", "peak GB of memory", "training tokens", "steps"), rows)
    result = RESULT.of(run.folder)
    made = kind_in(result).describe(result)
    how = "a plain Hugging Face folder" if made.plain else f"compact: needs {run.recipe.base} and upcycle"
    tell(f"mixture of experts: {result}  ({how})")
    tell(f"                    {made.what}")
    if made.folds:
        tell(f"as a plain MoE:     {command_line('export', run.folder, '--fold', '--to', 'FOLDER')}")
    tell(f"scores:             {SCORES.of(run.folder)}")
    tell(f"experts' lineage:   {PLAN.of(run.folder)}")
    tell(f"seed data, router:  {ROUTE_REPORT.of(run.folder)}")
