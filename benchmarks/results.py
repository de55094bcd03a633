"""The tables of docs/results.md, from the cells that are kept under benchmarks/results: `make results`.

A table stands between `<!-- table: TESTBED TABLE -->` and `<!-- end -->`; the models of a run by domain, between
`<!-- models: TESTBED VARIANT -->` and `<!-- end -->`. What has not been run is named as not run.
"""

import re
from pathlib import Path
from statistics import fmean

from evidence import TABLES, cell_folder

from upcycle.disk import write_text
from upcycle.records.comparison import METRICS, Cell, Spread, Summary
from upcycle.records.record import ALL, read_record
from upcycle.records.scores import BASE
from upcycle.reporting.charts import interval_picture, with_error
from upcycle.reporting.comparison import differences_chart, interval, signed
from upcycle.studies.statistics import p_text, summary

STYLE = (
    "<style>svg{--back:#fff;--ink:#1b1f24;--line:#d8dde3;--bar:#2f6fab;--best:#b4541a;background:#fff;"
    "font:14px system-ui,sans-serif}</style>"
)
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
BLOCK = re.compile(r"(<!-- (table|models): (\S+) (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def read_cells(testbed: str, table: str) -> dict[str, list[Cell]]:
    """Of each variant of a table that has been run, by seed: the seeds that all of them have, so that means compare."""
    found = {name: cells for name in TABLES[table] if (cells := cells_of(testbed, name))}
    seeds = [{cell.seed for cell in cells} for cells in found.values()]
    common = set.intersection(*seeds) if seeds else set()
    return {name: [cell for cell in cells if cell.seed in common] for name, cells in found.items()}


def cells_of(testbed: str, name: str) -> list[Cell]:
    """Of a variant, by seed."""
    paths = sorted(cell_folder(testbed, name).glob("seed-*.json"), key=lambda path: int(path.stem[5:]))
    return [read_record(path, Cell) for path in paths]


def models(testbed: str, name: str) -> str:
    """Held-out loss of the models on the way, by domain, over seeds; how often a dense one is the best.

    Figure 2 of the paper, in which no checkpoint is the best in every domain.
    """
    runs = cells_of(testbed, name)
    if not runs:
        return f"Not run: {name}.\n"
    domains = list(runs[0].loss)
    dense = [[entry.loss for entry in (run.dense or {}).values()] for run in runs]
    best = [min(range(len(losses)), key=lambda i: losses[i][d]) for losses in dense for d in domains if d != ALL]
    lines = [_line(["model", *domains, "the best dense model in"]), _line(["---", *["--:"] * (len(domains) + 1)])]
    for place in range(len(dense[0])):
        means = (f"{fmean(losses[place][d] for losses in dense):.3f}" for d in domains)
        won = f"{best.count(place)} of {len(best)}" if place else ""
        lines.append(_line([f"checkpoint {place}" if place else BASE, *means, won]))
    for label, losses in (("MoE at first", [run.initial_loss or {} for run in runs]), ("MoE", [r.loss for r in runs])):
        lines.append(_line([label, *(f"{fmean(loss[d] for loss in losses):.3f}" for d in domains), ""]))
    return "\n".join(lines) + "\n"


def picture(testbed: str, table: str) -> tuple[Path, str]:
    """Where the picture of the differences in loss lies, and what it shows; nothing where no row has an interval."""
    cells = read_cells(testbed, table)
    drawn = differences_chart(summary(cells, list(cells)), "loss", interval_picture) if cells else ""
    return PAGE.parent / "pictures" / f"{testbed}-{table}.svg", drawn.replace(">", f">{STYLE}", 1)


def markdown(testbed: str, table: str) -> str:
    """Mean and standard deviation over seeds, the difference to the first row, and what it cost."""
    cells = read_cells(testbed, table)
    missing = [name for name in TABLES[table] if name not in cells]
    lines = []
    if cells:
        rows = summary(cells, list(cells))
        metrics = [metric for metric in METRICS if getattr(rows[0], metric) is not None]
        heads = ["variant", "seeds"]
        for metric in metrics:
            heads += [metric.replace("_", " "), f"against {rows[0].label} (95% interval; p, p after Holm)"]
        heads += ["last dense", "MoE at first", "tokens", "FLOPs"]
        lines = [_line(heads), _line(["---", *["--:"] * (len(heads) - 1)])]
        lines += [_row(row, runs, metrics) for row, runs in zip(rows, cells.values(), strict=True)]
    path, drawn = picture(testbed, table)
    if drawn:
        lines += ["", f"![differences in loss, with 95% intervals](pictures/{path.name})"]
    if missing:
        lines += [""] * bool(lines) + [f"Not run: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _row(row: Summary, runs: list[Cell], metrics: list[str]) -> str:
    figures = [row.label, str(len(runs))]
    for metric in metrics:
        value, pattern = row.metric(metric), METRICS[metric]
        figures += [with_error(pattern, value.mean, value.std), _difference(value, pattern)]
    dense = [[entry.loss[ALL] for name, entry in (run.dense or {}).items() if name != BASE][-1:] for run in runs]
    initial = [run.initial_loss[ALL] for run in runs if run.initial_loss]
    figures.append(f"{fmean(value for (value,) in dense):.4f}" if all(dense) else "")
    figures.append(f"{fmean(initial):.4f}" if initial else "")
    tokens, flops = fmean(run.total_tokens for run in runs), fmean(run.total_flops for run in runs)
    return _line([*figures, f"{tokens:,.0f}", f"{flops:.3g}"])


def _difference(value: Spread, pattern: str) -> str:
    if value.difference is None:
        return ""
    gap, between = signed(pattern, value.difference), interval(pattern, value)
    return f"{gap} ({between}; {p_text(value.p)}, {p_text(value.p_corrected)})" if between else gap


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(text: str) -> str:
    """The page with every table made anew."""
    makers = {"table": markdown, "models": models}
    return BLOCK.sub(lambda block: f"{block[1]}{makers[block[2]](block[3], block[4])}{block[5]}", text)


def pictures(text: str) -> dict[Path, str]:
    """What the files that a page shows hold."""
    found = dict(picture(testbed, table) for _, kind, testbed, table, _ in BLOCK.findall(text) if kind == "table")
    return {path: drawn for path, drawn in found.items() if drawn}


if __name__ == "__main__":
    made = page(PAGE.read_text(encoding="utf-8"))
    write_text(PAGE, made)
    for path, drawn in pictures(made).items():
        path.parent.mkdir(exist_ok=True)
        write_text(path, drawn)
