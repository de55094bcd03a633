"""The report: it stands alone, says what the run says, and works in a browser."""

import json
import math
import re
import shlex
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from browser import CHROMIUM, READABLE, in_browser
from upcycle.cli import app
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import Recipe, load_recipe, parse_recipe, shipped_recipes
from upcycle.records.files import COMPARISON, LOG, ROUTE_REPORT, SCORES
from upcycle.records.scores import standard_error
from upcycle.reporting.charts import axis, bar_chart, interval_chart, line_chart, point_chart, thinned
from upcycle.reporting.course import course_chart, starts
from upcycle.reporting.dense import comparing_command, dense_overrides

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


def first_screen(text: str) -> str:
    """The words of a page's head."""
    return " ".join(unescape(re.sub("<[^>]*>", " ", text[text.index("<header>") : text.index("<nav")])).split())


def test_the_first_screen_has_the_figures_of_the_records(page: Path) -> None:
    said, scores = first_screen(page.read_text()), SCORES.read_of(page.parent)
    moe, last, base = (scores[name] for name in ("MoE", "checkpoint-3", "base"))
    gap = moe.loss["all"] - last.loss["all"]
    against = f"{abs(gap):.4f} {'lower' if gap < 0 else 'higher'}"
    assert f"The MoE has a held-out loss of {moe.loss['all']:.4f}, {against} than the last checkpoint" in said
    assert f"{against} held-out loss {moe.loss['all']:.4f}, against {last.loss['all']:.4f}" in said
    assert f"{moe.loss['all']:.4f}, against {base.loss['all']:.4f}" in said
    assert f"{moe.exact_match['all']:.1%}, against {last.exact_match['all']:.1%}" in said
    assert "There is one seed, so this cannot be told from noise" in said
    assert "No dense model was tuned for as many training tokens" in said


def test_its_command_compares_with_dense_tuning_for_the_same_tokens(recipe: Recipe, tmp_path: Path) -> None:
    run = Run(recipe, tmp_path / "a run")
    run_stages(run)
    assert CliRunner().invoke(app, ["report", str(run.folder)]).exit_code == 0
    text = (run.folder / "report.html").read_text()
    command = shlex.split(unescape(re.search(r"<pre>(upcycle compare .*)</pre>\n</section>", text)[1]))
    command[command.index("--seeds") + 1], command[command.index("FOLDER")] = "1", str(tmp_path / "both")
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    found = COMPARISON.read(tmp_path / "both")
    assert found.not_comparable == []
    dense, moe = found.summary
    assert CliRunner().invoke(app, ["report", str(tmp_path / "both")]).exit_code == 0
    assert CliRunner().invoke(app, ["report", str(tmp_path / "both" / "1-seed0")]).exit_code == 0
    for page in (tmp_path / "both" / "report.html", tmp_path / "both" / "1-seed0" / "report.html"):
        said = first_screen(page.read_text())
        assert f"“MoE” has a held-out loss of {moe.loss.mean:.4f}, " in said
        gap = moe.loss.difference
        assert f"{abs(gap):.4f} {'lower' if gap < 0 else 'higher'} than dense tuning (“dense”)" in said
        assert f"{moe.loss.mean:.4f}, against {dense.loss.mean:.4f}" in said
        assert f"Both saw {moe.tokens:,} training tokens" in said
        assert f"took {moe.flops / dense.flops:.2f} times the training FLOPs" in said
        assert "dense tuning: training loss</span>" in page.read_text()


def test_a_start_that_trains_has_the_comparison_forced(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = Run(parse_recipe(tiny_recipe | {"route": tiny_recipe["route"] | {"start": "upit"}}, "test"), tmp_path)
    run_stages(run, ["prepare", "expand", "assemble", "route"])
    assert ROUTE_REPORT.read_of(run.folder).cost.backward > 0
    assert comparing_command(run.folder, run.recipe).endswith("--seeds 5 --out FOLDER --force")


def test_dense_tuning_for_every_shipped_recipe() -> None:
    for name in shipped_recipes():
        recipe = load_recipe(name)
        dense = load_recipe(name, dense_overrides(recipe))
        assert (dense.expand.num_experts, dense.assemble.granularity, dense.tunes) == (1, 1, False), name
        assert dense.posttrain.epochs == recipe.posttrain.epochs + recipe.prepare.epochs * recipe.tunes, name
        assert dense.data == recipe.data
    ours = load_recipe("quickstart", dense_overrides(load_recipe("quickstart")))
    shipped = load_recipe("quickstart-dense")
    assert (ours.posttrain, ours.assemble) == (shipped.posttrain, shipped.assemble)
    assert ours.route.min_samples_per_expert == shipped.route.min_samples_per_expert


def test_its_course_is_over_the_tokens_of_both_stages(recipe: Recipe, tmp_path: Path) -> None:
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    before, after = (LOG.read(run.folder / stage) for stage in ("prepare", "posttrain"))
    upcycled = starts(run.folder)["posttrain"]
    assert upcycled >= before.tokens  # and what the router's start took
    chart = course_chart(run.folder)
    lines = [[float(p.split(",")[0]) for p in line.split()] for line in re.findall(r'points="([^"]*)"', chart.svg)]
    assert [len(line) for line in lines] == [len(before.log), len(after.log), len(SCORES.read_of(run.folder))]
    total = upcycled + after.tokens
    (mark,) = (float(x) for x in re.findall(r'<line x1="([0-9.]+)%"[^>]*stroke-dasharray', chart.svg))
    place = 13 + 84 * upcycled / total
    assert mark == pytest.approx(place, abs=0.01)
    assert lines[0][-1] == pytest.approx(13 + 84 * before.tokens / total, abs=0.01)
    assert lines[1][0] == pytest.approx(place + 84 * after.tokens / len(after.log) / total, abs=0.01)
    assert lines[2][0] == 13  # the base
    assert len(before.log) == 9
    assert lines[2][1] == pytest.approx(13 + 84 * 4 / 9 * before.tokens / total, abs=0.01)  # checkpoint-4
    assert lines[2][-2:] == pytest.approx([place, 97], abs=0.01)  # the MoE, before and after
    assert chart.svg.count("<circle") == len(lines[2])
    assert course_chart(tmp_path) is None


def test_it_says_what_the_run_says(page: Path) -> None:
    text, run = page.read_text(), page.parent
    scores = json.loads((run / "evaluate" / "scores.json").read_text())
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
    done = in_browser(page.read_text().replace("</body>", f"{PROBE}{READABLE}</body>"), size, tmp_path)
    title = re.search(r"<title>(.*)</title>", done)[1]
    assert title.startswith("1|12|true|true|"), title  # the slider moved; 3 rows of 4 experts; others; nothing sideways
    assert re.fullmatch(r".*\|[1-9]\d+\|true\|true", title), title


def test_a_run_that_is_not_finished_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert "is not a run: it has no recipe.yaml" in str(result.exception)
    (tmp_path / "recipe.yaml").write_text("base: x")
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert "is not finished: stage posttrain is not complete; continue with `upcycle run" in str(result.exception)


def test_charts_show_values_errors_and_names() -> None:
    bars = bar_chart([("a <b>", 0.5, 0.1), ("c", 0.25, 0.0)], "{:.0%}", best=0)
    assert "a &lt;b&gt;" in bars
    assert "50% ± 10%" in bars
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([0-9.]+)%"', bars)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)
    gaps = interval_chart([("a", -0.2, -0.3, -0.1), ("b", 0.1, -0.1, 0.3)], "dense")
    zero, _ = re.findall(r'<line x1="([0-9.]+)%" y1="0.0" x2="\1%" y2="20.0"', gaps)
    places = [float(x) for x in re.findall(r'<circle cx="([0-9.]+)%"', gaps)]
    assert places[1] - float(zero) == pytest.approx(0.5 * (float(zero) - places[0]), abs=0.2)
    assert re.findall(r'<circle [^>]*fill="([^"]*)"', gaps) == ["var(--best)", "var(--bar)"]  # zero is within b's
    lines = line_chart([("loss", [3.0, 1.0, 2.0])], "step")
    assert line_chart([("loss", [3.0, math.inf, 1.0, math.nan, 2.0])], "step").count("polyline") == 1
    heights = [float(point.split(",")[1]) for point in re.search(r'points="([^"]*)"', lines)[1].split()]
    assert heights[0] < heights[2] < heights[1]
    assert standard_error(0.5, 100) == pytest.approx(0.05)


def test_axes_have_round_numbers() -> None:
    assert axis(0, 350_748) == ([0, 100_000, 200_000, 300_000], False)
    assert axis(1.02, 1.41) == ([1.1, 1.2, 1.3, 1.4], False)
    assert axis(0.19, 9.3) == ([0.2, 0.5, 1, 2, 5], True)
    assert axis(2.0, 2.0)[0] == [2.0]
    assert axis(-0.013, 0.021) == ([-0.01, 0, 0.01, 0.02], False)


def test_logarithmic_axes_and_long_lines() -> None:
    chart = point_chart([("loss", [(0, 8.0, 0), (1, 4.0, 0), (2, 0.5, 0)])], [], dotted=["loss"])
    down = [float(y) for y in re.findall(r'cy="([0-9.]+)"', chart)]
    assert (down[2] - down[1]) / (down[1] - down[0]) == pytest.approx(3, rel=0.01)  # halved once, then three times
    line = [(float(x), 2.0 * x, 0.0) for x in range(1000)]
    short = thinned(line)
    assert len(short) <= 90
    assert short[0] == pytest.approx((5.5, 11.0, 0.0))  # of twelve
    assert thinned(line[:5]) == line[:5]
