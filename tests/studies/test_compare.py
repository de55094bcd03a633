"""Comparisons: what is shared, what is refused, what the table says."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import t, ttest_rel
from transformers import AutoModelForCausalLM

from upcycle.data.samples import lengths
from upcycle.errors import UpcycleError
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run, open_run
from upcycle.pipeline.stages import training_tokens
from upcycle.recipe import load_recipe, parse_recipe
from upcycle.records.comparison import Cell, Comparison, Measures
from upcycle.records.files import COMPARISON, LOG, ROUTE_REPORT
from upcycle.records.record import read_record, write_record
from upcycle.reporting.figures import comparison_figure, sweep_figure
from upcycle.studies.cells import Study, Variant, cell_file, labels, run_cells
from upcycle.studies.compare import TOLERANCE, _planned, _say_fewer, compare, differences, show
from upcycle.studies.statistics import holm, paired, spread, summary
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
    found = compare(Study(texts, range(2), tmp_path / "out"), force=False)
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
    again = compare(Study(texts, range(2), tmp_path / "out"), force=False)  # resumed: nothing is done again
    assert str(again.summary) == str(found.summary)
    assert "prepare ..." not in capsys.readouterr().out


def test_a_sweep_runs_the_whole_grid(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    axes = ["expand.num_experts=2,3", "posttrain.freeze=none,router"]
    found = sweep(str(recipe_file), axes, 1, tmp_path / "out")
    assert [row.settings for row in found.summary] == [
        {"expand.num_experts": m, "posttrain.freeze": freeze} for m in ("2", "3") for freeze in ("none", "router")
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert "sweep, 1 seed: the MoE" in printed
    assert "nan" not in printed  # one seed has no spread
    assert printed.count("route: taken from") == 2  # freezing concerns post-training alone
    sweep_figure(found, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert str(sweep(str(recipe_file), axes, 1, tmp_path / "out").summary) == str(found.summary)
    assert "prepare ..." not in capsys.readouterr().out


def test_models_can_be_deleted_once_they_are_measured(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    texts, out = [str(recipe_file), f"{recipe_file} route.start=random"], tmp_path / "out"
    study = Study(texts, range(1), out, keep_models=False, benchmark=lambda run: {"all": 0.5})
    found = compare(study, force=False)
    assert not list(out.rglob("*.safetensors"))
    assert [row.benchmark.mean for row in found.summary] == [0.5, 0.5]
    assert "prepare: taken from" in " ".join(capsys.readouterr().out.split())  # while they are there they are shared
    assert str(compare(study, force=False)) == str(found)
    assert "prepare" not in capsys.readouterr().out
    changed = [f"{text} route.init_std=0.03" for text in texts]
    with pytest.raises(UpcycleError, match="was made by a different recipe"):
        compare(replace(study, texts=changed), force=False)
    with pytest.raises(UpcycleError, match="continue with --no-keep-models"):
        compare(Study(texts, range(1), out), force=False)
    with pytest.raises(UpcycleError, match="were deleted after scoring"):
        open_run(out / "0-seed0")
    run_stages(study.run(0, 0), update=True)
    open_run(out / "0-seed0")


def test_what_a_killed_comparison_made_is_shared(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    texts, out = [str(recipe_file), f"{recipe_file} route.start=random"], tmp_path / "out"

    def killed(run: Run) -> dict[str, float]:
        if run.folder.name == "1-seed0":
            raise KeyboardInterrupt
        return {"all": 0.5}

    with pytest.raises(KeyboardInterrupt):
        compare(Study(texts, range(1), out, keep_models=False, benchmark=killed), force=False)
    shutil.rmtree(out / "1-seed0")
    capsys.readouterr()
    compare(Study(texts, range(1), out, keep_models=False), force=False)
    assert "prepare: taken from" in " ".join(capsys.readouterr().out.split())


def test_long_variants_do_not_push_the_figures_out(capsys: Any) -> None:
    cells = {f"recipe {'very.long.setting=1 ' * 12}{i}": [cell(0, 1.2345)] for i in range(2)}
    show(compared(cells))
    assert capsys.readouterr().out.count("1.2345") == 2


def test_an_axis_is_parted_at_its_commas() -> None:
    assert axis_values("data.train=[a,b],[c]") == ["data.train=[a,b]", "data.train=[c]"]
    assert axis_values("a.b=[{x: 1}, {x: 2}],c,[[1,2],[3]]") == ["a.b=[{x: 1}, {x: 2}]", "a.b=c", "a.b=[[1,2],[3]]"]
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
    unnamed = ["upit", "upit: quickstart"]  # the first one's label is the second one's name
    for texts in (["a", "b", "a"], ["x: a", "x: b"], ["x: a", "x : b"], unnamed):
        with pytest.raises(UpcycleError, match="there are two variants"):
            run_cells(Study(texts, range(1), tmp_path / "out"))
    with pytest.raises(UpcycleError, match="there are two variants"):
        sweep("a", ["seed=1,1"], 1, tmp_path / "out")
    with pytest.raises(UpcycleError, match="variant ' : a' has an empty name"):
        run_cells(Study([" : a", "b"], range(1), tmp_path / "out"))
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
        compare(Study(texts, range(1), tmp_path / "out"), force=False)
    found = compare(Study(texts, range(1), tmp_path / "out"), force=True)
    assert found.not_comparable[0].startswith("seed 0: different numbers of training tokens")
    assert differences({"a": [cell(0, 1.0)], "b": [cell(0, 1.0, data="e")]}) == [
        "seed 0: the variants saw different data"
    ]
    assert differences({"a": [cell(0, 1.0)], "b": [cell(0, 2.0)]}) == []
    assert differences({"a": [cell(0, 1.0, 1000)], "b": [cell(0, 2.0, 1009)]}) == []  # whole steps
    started = cell(0, 1.0, 1000).model_copy(update={"tokens": {"posttrain": 1000, "route": 9}})
    assert differences({"a": [cell(0, 1.0, 1000)], "b": [started]})[0].startswith("seed 0: different numbers of")


def test_other_numbers_of_held_out_seed_rows_are_said_before_anything_trains(recipe_file: Path, tmp_path: Path) -> None:
    texts = [
        f"dense: {recipe_file} expand.num_experts=1 expand.copies_of=base assemble.num_experts_per_tok=1",
        f"MoE: {recipe_file}",
    ]
    with pytest.raises(UpcycleError) as caught:
        compare(Study(texts, range(1), tmp_path / "out"), force=False)
    held = load_recipe(str(recipe_file)).route.min_samples_per_expert * load_recipe(str(recipe_file)).expand.num_experts
    assert re.search(r"train on different numbers of rows \(dense: \d+, MoE: \d+\)", str(caught.value))
    assert f"set route.min_samples_per_expert to {held} divided by" in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))
    alike = [f"{texts[0]} route.min_samples_per_expert={held}", texts[1]]
    assert _planned(Study(alike, range(1), tmp_path / "out"), "tokens") == []
    more = [f"{texts[0]} route.min_samples_per_expert={held + 1}", f"{texts[1]} posttrain.epochs=3"]
    assert _planned(Study(more, range(1), tmp_path / "out"), "tokens") != []
    assert _planned(Study(more, range(1), tmp_path / "out"), "flops") == []


def test_other_rows_or_checkpoints_make_no_comparison(recipe_file: Path) -> None:
    def kept(*overrides: str) -> Cell:
        recipe = load_recipe(str(recipe_file), overrides).model_dump(mode="json")
        return Cell(**vars(cell(0, 1.0)), recipe=recipe, version="1", machine="one")

    assert differences({"a": [kept()], "b": [kept("data.fraction=0.5", "evaluate.exact_match=true")]}) == []
    assert differences({"a": [kept()], "b": [kept("data.max_validation=10")]}) == [
        "seed 0: the variants are scored on different rows (data.max_validation: None, 10)"
    ]
    assert differences({"a": [kept()], "b": [kept("prepare.checkpoints=[x, y]")]}) == [
        "seed 0: the variants start from different checkpoints (prepare.checkpoints), whose training is not counted"
    ]


def test_tokens_are_those_of_the_steps_that_were_made(recipe_file: Path, tmp_path: Path) -> None:
    """A last epoch that is not whole ends with a whole step."""
    run = Study([f"{recipe_file} prepare.epochs=0.3 prepare.checkpoint_every=0.15"], [0], tmp_path).run(0, 0)
    run_stages(run, ["prepare"])
    record = LOG.read(run.folder / "prepare")
    per_epoch, rows = sum(lengths(run.splits.train)), run.recipe.prepare.batch_size
    steps_per_epoch = math.ceil(record.rows / rows)
    assert record.steps == math.ceil(0.3 * steps_per_epoch) > 0.3 * steps_per_epoch
    assert record.tokens == round(per_epoch * record.steps * rows / record.rows) > 0.3 * per_epoch


def test_differences_that_are_alike_up_to_rounding_are_no_evidence() -> None:
    gaps = [a / 120 - b / 120 for a, b in ((62, 60), (58, 56), (71, 69))]
    assert len(set(gaps)) > 1
    assert math.isnan(paired(gaps)[2])
    assert not math.isnan(paired([*gaps, 3 / 120])[2])


def test_what_cannot_run_or_be_compared_is_said_before_anything_trains(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"messages": [{"role": "user", "content": "copy a"}]}')
    for changed, force, said in (
        ("data.train=nope.jsonl", True, "data file nope.jsonl does not exist"),
        ("base=./nope", True, "model folder ./nope does not exist"),
        (f"data.validation={tmp_path / 'other.jsonl'}", False, "the variants saw different data; such a comparison"),
        ("data.max_length=32", False, r"are scored on different rows \(data.max_length: 64, 32\)"),
        ("'prepare.checkpoints=[x, y]'", False, "start from different checkpoints"),
    ):
        with pytest.raises(UpcycleError, match=said):
            compare(Study([f"a: {recipe_file}", f"b: {recipe_file} {changed}"], [0], tmp_path / "out"), force=force)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UpcycleError, match=r"data file nope\.jsonl does not exist"):
        sweep(str(recipe_file), ["data.fraction=1,0.5", "data.train=nope.jsonl"], 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cell_is_taken_wherever_base_and_data_lie(recipe_file: Path, tmp_path: Path, base: Path, rows: Path) -> None:
    def study(place: str) -> Study:
        home = tmp_path / place
        shutil.copytree(base, home / "base")
        shutil.copy(rows, home / "rows.jsonl")
        given = f"base={home / 'base'} data.train={home / 'rows.jsonl'} posttrain.epochs=0.3"
        return Study(
            [f"ours: {recipe_file} {given}"], [0], home / "out", keep_models=False, results=tmp_path / "results"
        )

    first = run_cells(study("one"))
    assert [*run_cells(study("two")).values()] == [*first.values()]
    assert not (tmp_path / "two" / "out").exists()  # nothing ran
    moved = study("three")
    (tmp_path / "three" / "rows.jsonl").write_text(rows.read_text().replace("copy", "echo"))
    with pytest.raises(UpcycleError, match="was made from different data"):
        run_cells(moved)


def test_a_cell_of_another_base_or_template_is_refused(recipe_file: Path, tmp_path: Path, base: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "base"))
    study = Study(
        [f"ours: {recipe_file} base={own} posttrain.epochs=0.3"],
        [0],
        tmp_path / "out",
        keep_models=False,
        results=tmp_path / "results",
    )
    run_cells(study)
    run_cells(replace(study, out=tmp_path / "again"))
    template = own / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    with pytest.raises(UpcycleError, match=r"seed-0\.json was made from different inputs \(base changed\)"):
        run_cells(replace(study, out=tmp_path / "third"))
    shutil.rmtree(own)  # where it is gone the cell is what is left of it
    run_cells(replace(study, out=tmp_path / "fourth"))


def test_results_have_a_place_of_their_own(tmp_path: Path) -> None:
    places = {cell_file(tmp_path, label, 0) for label in ("密集", "升级", "x" * 300, "x" * 301, "a b")}
    assert len(places) == 5
    assert max(len(place.parent.name.encode()) for place in places) <= 240
    with pytest.raises(UpcycleError, match=r"'a b' and 'a-b' would have the same files in --results; rename one"):
        run_cells(Study(["a b: upit", "a-b: upit"], [0], tmp_path / "out", results=tmp_path))


def test_the_paired_test_sees_what_an_unpaired_one_would_not() -> None:
    """Seeds differ by far more than the variants, but each seed by the same."""
    reference, values = [1.0, 2.0, 3.0, 4.0], [0.9, 1.89, 2.91, 3.9]
    gaps = [a - b for a, b in zip(values, reference, strict=True)]
    difference, (low, high), p = paired(gaps)
    assert difference == pytest.approx(-0.1)
    assert p == pytest.approx(ttest_rel(values, reference).pvalue)
    assert p < 0.001
    half = t.ppf(0.975, 3) * np.std(gaps, ddof=1) / 2
    assert (low, high) == pytest.approx((difference - half, difference + half))
    assert math.isnan(paired([-1.0])[2])
    assert math.isnan(spread([1.0]))
    cells = {"a": [cell(s, x) for s, x in enumerate(reference)], "b": [cell(s, x) for s, x in enumerate(values)]}
    rows = compared(cells).summary
    assert rows[0].loss.std == pytest.approx(1.29, abs=0.01)
    assert rows[1].loss.p == rows[1].loss.p_corrected == p  # one test


def test_any_row_may_be_the_reference_and_p_is_corrected_for_the_number_of_tests() -> None:
    losses = {"a": [1.0, 2.0, 3.0], "b": [0.9, 1.89, 2.91], "c": [1.3, 2.1, 3.4], "d": [9.0, 1.0, 2.0]}
    cells = {name: [cell(s, x) for s, x in enumerate(found)] for name, found in losses.items()}
    rows = summary(cells, list(cells), against=1)
    assert [row.loss.difference is None for row in rows] == [False, True, False, False]
    ps = [rows[i].loss.p for i in (0, 2, 3)]
    assert [rows[i].loss.p_corrected for i in (0, 2, 3)] == holm(ps) != ps
    assert Comparison(variants=cells, summary=rows, not_comparable=[]).reference == "b"


def test_holm_is_what_r_says() -> None:
    """p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")"""
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, math.nan, 0.01]) == pytest.approx([0.04, math.nan, 0.02], nan_ok=True)


def test_seeds_that_one_variant_lacks_are_left_out_of_its_test() -> None:
    cells = {"a": [cell(s, float(s)) for s in range(5)], "b": [cell(s, s - 0.1 - 0.01 * s) for s in (1, 3, 4)]}
    rows = summary(cells, ["a", "b"])
    assert rows[1].loss.difference == pytest.approx(-0.1 - 0.01 * 8 / 3)
    assert rows[1].loss.mean == pytest.approx((1 + 3 + 4) / 3 + rows[1].loss.difference)


DENSE = (
    "expand.num_experts=1 expand.copies_of=base assemble.shared=base assemble.num_experts_per_tok=1 "
    "route.start=random route.min_samples_per_expert=12 posttrain.epochs=2 posttrain.router_aux_loss_coef=0"
)


def multiplied(folder: Path) -> int:
    """Parameters of a tied model that a token meets, two experts of a MoE among them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    share = 2 / model.config.num_local_experts if getattr(model.config, "num_local_experts", 1) > 1 else 1
    return round(sum(p.numel() * (share if ".experts." in name else 1) for name, p in model.named_parameters()))


@pytest.mark.long
def test_epochs_are_scaled_to_the_flops_of_the_first(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    """6 a parameter that multiplies a token, and token: counted here from the models that were trained."""
    texts = [f"moe: {recipe_file}", f"dense: {recipe_file} {DENSE}"]
    found = compare(Study(texts, range(1), tmp_path / "out"), force=False, match="flops")
    assert "the router's start, at most" in capsys.readouterr().out
    moe, dense = (runs[0] for runs in found.variants.values())
    trained = [(run.flops or {})["posttrain"] + (run.flops or {}).get("prepare", 0) for run in (moe, dense)]
    assert trained[1] == pytest.approx(trained[0], rel=TOLERANCE["flops"])  # whole steps
    assert moe.total_tokens < dense.total_tokens
    for number, run in enumerate((moe, dense)):
        count = multiplied(tmp_path / "out" / f"{number}-seed0" / "posttrain")
        assert (run.flops or {})["posttrain"] == 6 * count * run.tokens["posttrain"]
    count = multiplied(next((tmp_path / "out" / "0-seed0" / "prepare").glob("checkpoint-*")))
    assert (moe.flops or {})["prepare"] == 6 * count * moe.tokens["prepare"]


def test_cells_that_are_kept_are_taken_from_there(recipe_file: Path, tmp_path: Path, capsys: Any) -> None:
    texts = [f"ours: {recipe_file}", f"random: {recipe_file} route.start=random"]
    study = Study(texts, range(1), tmp_path / "out", keep_models=False, results=tmp_path / "results")
    found = compare(study, force=False)
    kept = read_record(tmp_path / "results" / "ours" / "seed-0.json", Cell)
    assert (kept.recipe["seed"], kept.loss) == (0, found.variants[texts[0]][0].loss)
    assert parse_recipe(kept.recipe, "kept") == load_recipe(str(recipe_file))
    assert "threads" in kept.machine
    capsys.readouterr()
    elsewhere = replace(study, out=tmp_path / "elsewhere")
    assert str(compare(elsewhere, force=False).summary) == str(found.summary)
    assert "prepare" not in capsys.readouterr().out
    changed = replace(elsewhere, texts=[f"{texts[0]} route.init_std=0.03", texts[1]])
    with pytest.raises(UpcycleError, match=r"seed-0.json was made by a different .* \(route.init_std: 0.02 -> 0.03\)"):
        compare(changed, force=False)
    write_record(tmp_path / "results" / "ours" / "seed-0.json", kept.model_copy(update={"data": "others"}))
    with pytest.raises(UpcycleError, match=r"seed-0.json was made from different data"):
        compare(replace(study, out=tmp_path / "third"), force=False)


@pytest.mark.long
def test_training_tokens_of_the_routers_start_count(recipe_file: Path, tmp_path: Path) -> None:
    """The paper's pre-optimisation trains on the seed data; a random router on nothing."""
    texts = [f"{recipe_file} route.start={start}" for start in ("random", "upit")]
    with pytest.raises(UpcycleError, match=r"seed 0: different numbers of training tokens"):
        compare(Study(texts, range(1), tmp_path / "out"), force=False)
    tokens = [training_tokens(tmp_path / "out" / f"{number}-seed0") for number in (0, 1)]
    assert tokens[0] == {**tokens[1], "route": 0}
    assert tokens[1]["route"] == ROUTE_REPORT.read_of(tmp_path / "out" / "1-seed0").cost.backward > 0


def test_what_a_study_could_not_mean_is_refused_before_anything_runs(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UpcycleError, match=r"variant 'upit seed=3' sets seed, .* use --seeds"):
        run_cells(Study(["upit", "upit seed=3"], [0], out))
    with pytest.raises(UpcycleError, match=r"route\.start is there twice; .*: route\.start=VALUE,VALUE"):
        sweep("upit", ["route.start=ridge,random", "route.start=kmeans"], 1, out)
    assert axis_values("a.b={x: 1, y: 2},{x: 3}") == ["a.b={x: 1, y: 2}", "a.b={x: 3}"]
    assert not out.exists()
    out.mkdir()
    (out / "recipe.yaml").write_text("")
    with pytest.raises(UpcycleError, match=r"--out .*out is the folder of a run; name a new one"):
        run_cells(Study(["upit", "upit route.start=ridge"], [0], out))


def test_a_folder_of_another_variant_says_what_to_do(recipe_file: Path, tmp_path: Path) -> None:
    run_stages(Study([str(recipe_file)], [0], tmp_path / "out").run(0, 0), ["prepare"])
    said = r"0-seed0 was made by a different variant \(route\.start: .* -> ridge\); name the same variants"
    with pytest.raises(UpcycleError, match=said):
        run_cells(Study([f"{recipe_file} route.start=ridge"], [0], tmp_path / "out"))


def test_a_cell_whose_data_changed_says_what_to_type(
    recipe_file: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(rows.read_text())
    study = Study([f"{recipe_file} data.train={data}"], [0], tmp_path / "out")
    run_stages(study.run(0, 0), ["prepare"])
    data.write_text("".join(reversed(rows.read_text().splitlines(keepends=True)[:-1])))
    typed = r"upcycle run \S+out/0-seed0/recipe\.yaml --run \S+out/0-seed0 --update`, then this command again"
    with pytest.raises(UpcycleError, match=typed):
        run_cells(study)


def test_a_comparison_of_fewer_seeds_says_so(tmp_path: Path, capsys: Any) -> None:
    COMPARISON.write(tmp_path, compared({"a": [cell(0, 1.0), cell(1, 1.0)], "b": [cell(0, 2.0), cell(1, 2.0)]}))
    _say_fewer(tmp_path, compared({"a": [cell(0, 1.0)], "b": [cell(0, 2.0)]}))
    said = " ".join(capsys.readouterr().out.split())
    assert "comparison.json had 2 seeds, and has 1 seed now; --seeds 2 makes it again" in said


def test_a_name_is_no_mathematics(tmp_path: Path) -> None:
    comparison_figure(compared({"cost $x^{$: upit": [cell(0, 1.0)], r"$\frac: b": [cell(0, 2.0)]}), tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
