"""Comparisons: what is shared, what is refused, what the table says."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from upcycle.errors import UpcycleError
from upcycle.pipeline.run import Run, open_run
from upcycle.pipeline.stages import training_tokens
from upcycle.records.comparison import Comparison, Measures
from upcycle.records.files import COMPARISON, ROUTE_REPORT
from upcycle.reporting.figures import comparison_figure, sweep_figure
from upcycle.studies.cells import Variant, labels, run_cells
from upcycle.studies.compare import compare, differences, show
from upcycle.studies.statistics import paired, spread, summary
from upcycle.studies.sweep import axis_values, sweep


@pytest.fixture
def recipe_file(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny_recipe, "evaluate": {"models": "ends", "exact_match": False}}))
    return path


def cell(seed: int, loss: float, tokens: int = 10, data: str = "d", **more: Any) -> Measures:
    return Measures(seed=seed, data=data, tokens={"posttrain": tokens}, loss={"all": loss}, **more)


def compared(cells: dict[str, list[Measures]]) -> Comparison:
    return Comparison(variants=cells, summary=summary(cells, labels(list(cells))), not_comparable=[])


def test_variants_share_what_has_the_same_inputs(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    texts = [
        str(recipe_file),
        f"{recipe_file} route.start=random",
        f"{recipe_file} expand.copies_of=last route.start=random",
    ]
    found = compare(texts, 2, tmp_path / "out", force=False)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("prepare: taken from") == 4  # of three variants with two seeds, two are trained
    assert said.count("assemble: taken from") == 2
    assert said.count("route: taken from") == 0
    assert COMPARISON.read(tmp_path / "out").variants.keys() == set(texts)
    assert [len(runs) for runs in found.variants.values()] == [2, 2, 2]
    rows = found.summary
    assert rows[0].loss.difference is None
    losses = [[run.loss["all"] for run in runs] for runs in found.variants.values()]
    assert rows[1].loss.mean == pytest.approx(sum(losses[1]) / 2)
    assert rows[1].loss.difference == pytest.approx(sum(losses[1]) / 2 - sum(losses[0]) / 2)
    assert len({row.tokens for row in rows}) == 1
    comparison_figure(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    again = compare(texts, 2, tmp_path / "out", force=False)  # resumed: nothing is done again
    assert str(again.summary) == str(found.summary)
    assert "prepare ..." not in capsys.readouterr().out


def test_a_sweep_runs_the_whole_grid(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    axes = ["expand.num_experts=2,3", "posttrain.freeze=none,router"]
    found = sweep(str(recipe_file), axes, 1, tmp_path / "out")
    assert [row.settings for row in found.summary] == [
        {"expand.num_experts": m, "posttrain.freeze": freeze} for m in ("2", "3") for freeze in ("none", "router")
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert "sweep, 1 seeds" in printed
    assert printed.count("route: taken from") == 2  # freezing concerns post-training alone
    sweep_figure(found, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert str(sweep(str(recipe_file), axes, 1, tmp_path / "out").summary) == str(found.summary)
    assert "prepare ..." not in capsys.readouterr().out


def test_models_can_be_deleted_once_they_are_measured(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    texts, out = [str(recipe_file), f"{recipe_file} route.start=random"], tmp_path / "out"
    options: dict[str, Any] = {"force": False, "keep_models": False, "benchmark": lambda run: {"all": 0.5}}
    found = compare(texts, 1, out, **options)
    assert not list(out.rglob("*.safetensors"))
    assert [row.benchmark.mean for row in found.summary] == [0.5, 0.5]
    assert "prepare: taken from" in " ".join(capsys.readouterr().out.split())  # while they are there they are shared
    assert str(compare(texts, 1, out, **options)) == str(found)
    assert "prepare" not in capsys.readouterr().out
    changed = [f"{text} route.init_std=0.03" for text in texts]
    with pytest.raises(UpcycleError, match="was made by another recipe"):
        compare(changed, 1, out, **options)
    with pytest.raises(UpcycleError, match="go on with --no-keep-models"):
        compare(texts, 1, out, force=False)
    with pytest.raises(UpcycleError, match="were deleted once they were measured"):
        open_run(out / "0-seed0")


def test_what_a_killed_comparison_made_is_shared(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    texts, out = [str(recipe_file), f"{recipe_file} route.start=random"], tmp_path / "out"

    def killed(run: Run) -> dict[str, float]:
        if run.folder.name == "1-seed0":
            raise KeyboardInterrupt
        return {"all": 0.5}

    with pytest.raises(KeyboardInterrupt):
        compare(texts, 1, out, force=False, keep_models=False, benchmark=killed)
    shutil.rmtree(out / "1-seed0")
    capsys.readouterr()
    compare(texts, 1, out, force=False, keep_models=False)
    assert "prepare: taken from" in " ".join(capsys.readouterr().out.split())


def test_long_variants_do_not_push_the_figures_out(capsys: Any) -> None:
    cells = {f"recipe {'very.long.setting=1 ' * 12}{i}": [cell(0, 1.2345)] for i in range(2)}
    show(compared(cells))
    assert capsys.readouterr().out.count("1.2345") == 2


def test_an_axis_is_parted_at_its_commas() -> None:
    assert axis_values("data.train=[a,b],[c]") == ["data.train=[a,b]", "data.train=[c]"]
    with pytest.raises(UpcycleError, match=r"'seed' is not of the form section.field=value,value"):
        axis_values("seed")


def test_a_label_is_what_the_others_do_not_say() -> None:
    assert labels(["a x=1 y=2", "a x=1 y=3", "a y=2"]) == ["x=1 y=2", "x=1 y=3", "y=2"]
    assert labels(["a", "a y=3"]) == ["a", "y=3"]
    assert labels(["no router: a x=1", "a x=2", 'b: a "x=c: d"']) == ["no router", "x=2", "b"]
    assert Variant("ours: upit\n route.start=ridge").words == ["upit", "route.start=ridge"]
    for text, message in (("", "names no recipe"), ("a: b 'c", "No closing quotation")):
        with pytest.raises(UpcycleError, match=message):
            labels([text])


def test_twins_are_refused_before_anything_runs(tmp_path: Path) -> None:
    for texts in (["a", "b", "a"], ["x: a", "x: b"]):
        with pytest.raises(UpcycleError, match="there are two variants"):
            run_cells(texts, 1, tmp_path / "out")
    with pytest.raises(UpcycleError, match="there are two variants"):
        sweep("a", ["seed=1,1"], 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_metric_counts_if_all_have_it_and_a_run_that_diverged_is_shown(tmp_path: Path, capsys: Any) -> None:
    first = [cell(0, 1.0, exact_match={"all": 0.5}), cell(1, math.nan, exact_match={"all": 0.5})]
    found = compared({"a": first, "b data.train=[/x,/y]": [cell(0, 2.0), cell(1, 2.5)]})
    assert found.metrics == ["loss"]
    assert math.isnan(found.summary[0].loss.mean)
    assert found.summary[1].loss.mean == 2.25
    show(found)
    assert "data.train=[/x,/y]" in capsys.readouterr().out
    COMPARISON.write(tmp_path, found)
    assert str(COMPARISON.read(tmp_path)) == str(found)  # nan included


def test_other_tokens_or_data_are_refused_unless_forced(recipe_file: Path, tmp_path: Path) -> None:
    texts = [str(recipe_file), f"{recipe_file} posttrain.epochs=2 posttrain.checkpoint_every=1"]
    with pytest.raises(UpcycleError, match=r"seed 0: different numbers of training tokens .*--force"):
        compare(texts, 1, tmp_path / "out", force=False)
    found = compare(texts, 1, tmp_path / "out", force=True)
    assert found.not_comparable[0].startswith("seed 0: different numbers of training tokens")
    assert differences({"a": [cell(0, 1.0)], "b": [cell(0, 1.0, data="e")]}) == [
        "seed 0: the variants saw different data"
    ]
    assert differences({"a": [cell(0, 1.0)], "b": [cell(0, 2.0)]}) == []


def test_the_paired_test_sees_what_an_unpaired_one_would_not() -> None:
    """Seeds differ by far more than the variants, but each seed by the same."""
    reference, values = [1.0, 2.0, 3.0, 4.0], [0.9, 1.89, 2.91, 3.9]
    found = paired(values, reference)
    assert found[0] == pytest.approx(-0.1)
    assert found[1] < 0.001
    assert math.isnan(paired([1.0], [2.0])[1])
    assert math.isnan(spread([1.0]))
    cells = {"a": [cell(s, x) for s, x in enumerate(reference)], "b": [cell(s, x) for s, x in enumerate(values)]}
    rows = compared(cells).summary
    assert rows[0].loss.std == pytest.approx(1.29, abs=0.01)
    assert rows[1].loss.p == found[1]


def test_training_tokens_of_the_routers_start_count(recipe_file: Path, tmp_path: Path) -> None:
    """The paper's pre-optimisation trains on the seed data; a random router on nothing."""
    texts = [f"{recipe_file} route.start={start}" for start in ("random", "upit")]
    with pytest.raises(UpcycleError, match=r"seed 0: different numbers of training tokens"):
        compare(texts, 1, tmp_path / "out", force=False)
    tokens = [training_tokens(tmp_path / "out" / f"{number}-seed0") for number in (0, 1)]
    assert tokens[0] == {**tokens[1], "route": 0}
    assert tokens[1]["route"] == ROUTE_REPORT.read_of(tmp_path / "out" / "1-seed0").cost.backward > 0
