"""The report: it stands alone, says what the run says, and works in a browser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from browser import CHROMIUM, in_browser
from upcycle.cli import app
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import parse_recipe
from upcycle.records.scores import standard_error
from upcycle.reporting.charts import bar_chart, interval_chart, line_chart

PROBE = """<script>{
const slider = document.getElementById("layer");
const before = document.getElementById("samples").textContent;
slider.value = 1;
slider.dispatchEvent(new Event("input"));
const changed = before !== document.getElementById("samples").textContent;
const fits = document.documentElement.scrollWidth <= innerWidth, cells = document.querySelectorAll("#shares td").length;
document.title = [document.getElementById("layer-name").textContent, cells, changed, fits].join("|");
}</script>"""


@pytest.fixture(scope="module")
def page(base: Path, rows: Path, checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = {
        "base": str(base),
        "data": {"train": str(rows), "max_length": 64, "validation_fraction": 0.2},
        "prepare": {"checkpoints": [str(c) for c in checkpoints]},
        "expand": {"num_experts": 4},
        "route": {"min_samples_per_expert": 3, "start": "random"},
        "posttrain": {"epochs": 1, "checkpoint_every": 1, "batch_size": 8, "micro_batch_size": 8},
        "evaluate": {"max_answer_tokens": 9},
    }
    run = Run(parse_recipe(values, "test"), tmp_path_factory.mktemp("report") / "<b>run")
    run_stages(run)
    result = CliRunner().invoke(app, ["report", str(run.folder)])
    assert result.exit_code == 0, result.output
    return run.folder / "report.html"


def test_it_stands_alone_and_escapes_what_it_is_given(page: Path) -> None:
    text = page.read_text()
    HTMLParser().feed(text)
    assert not re.search(r"(src|href)=.(https?:|//)", text)
    assert "default-src 'none'" in text
    assert "<b>run" not in text
    assert "&lt;b&gt;run" in text


def test_it_says_what_the_run_says(page: Path) -> None:
    text, run = page.read_text(), page.parent
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
    assert f"has a held-out loss of {scores['MoE']['loss']['all']:.3f}" in text
    assert "E3 child-3 = " in text
    data = json.loads(re.search(r"const data = (.*);\n", text)[1])
    assert data["experts"][3] == "E3 child-3"
    assert [sample["domain"] for sample in data["samples"]] == ["copy", "reverse"]
    for sample in data["samples"]:
        assert len(sample["experts"]) == 2
        assert all(len(layer) == len(sample["tokens"]) for layer in sample["experts"])
    assert data["shares"]["all"][0] == pytest.approx(scores["MoE"]["expert_share"]["all"][0], abs=1e-4)
    assert "vllm serve FOLDER" in text
    assert "--fold" not in text
    for stage in ("prepare", "posttrain"):
        assert json.loads((run / stage / "manifest.json").read_text())["versions"]["torch"] in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("size", ["1200,800", "390,800"])
def test_it_works_in_a_browser(size: str, page: Path, tmp_path: Path) -> None:
    done = in_browser(page.read_text().replace("</body>", f"{PROBE}</body>"), size, tmp_path)
    title = re.search(r"<title>(.*)</title>", done)[1]
    assert title == "1|12|true|true", (
        title
    )  # the slider moved; 3 rows of 4 experts; other experts; no sideways scrolling


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert "is not a run: it has no recipe.yaml" in str(result.exception)
    (tmp_path / "recipe.yaml").write_text("base: x")
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert "is not finished: it has no posttrain/manifest.json" in str(result.exception)


def test_charts_show_values_errors_and_names() -> None:
    bars = bar_chart([("a <b>", 0.5, 0.1), ("c", 0.25, 0.0)], "{:.0%}", best=0)
    assert "a &lt;b&gt;" in bars
    assert "50% ± 10%" in bars
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([0-9.]+)"', bars)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    gaps = interval_chart([("a", -0.2, -0.3, -0.1), ("b", 0.1, -0.1, 0.3)], "dense")
    (zero,) = re.findall(r'<path d="M([0-9.]+) 20V', gaps)
    places = [float(x) for x in re.findall(r'<circle cx="([0-9.]+)"', gaps)]
    assert places[1] - float(zero) == pytest.approx(0.5 * (float(zero) - places[0]), abs=0.2)
    assert re.findall(r'<circle [^>]*fill="([^"]*)"', gaps) == ["var(--best)", "var(--bar)"]  # zero is within b's
    lines = line_chart([("loss", [3.0, 1.0, 2.0])], "step")
    heights = [float(point.split(",")[1]) for point in re.search(r'points="([^"]*)"', lines)[1].split()]
    assert heights[0] < heights[2] < heights[1]
    assert standard_error(0.5, 100) == pytest.approx(0.05)
