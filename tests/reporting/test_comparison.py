"""The report of a comparison or a sweep, from the file that it wrote."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from browser import CHROMIUM, READABLE, in_browser
from upcycle.cli import app
from upcycle.records.comparison import Comparison, Dense, Measures, Sweep
from upcycle.records.files import COMPARISON, PLAN, SCORES, SWEEP, run_of
from upcycle.records.plan import ExpansionPlan, Expert
from upcycle.records.scores import MOE, ModelScores
from upcycle.reporting.comparison import find_comparison, summarise, verdict_of_run
from upcycle.reporting.verdict import on_the_way
from upcycle.studies.cells import labels
from upcycle.studies.statistics import summary


def cells(*losses: float, tokens: int = 1000) -> list[Measures]:
    return [
        Measures(
            seed=seed,
            data="0123456789abcdef",
            tokens={"prepare": tokens, "route": 0, "posttrain": tokens},
            loss={"all": loss, "math": loss + 0.1, **({"logic": loss - 0.1} if seed else {})},
            dense={"base": Dense(loss={"all": 3.0}), "checkpoint-9": Dense(loss={"all": 1.5})},
        )
        for seed, loss in enumerate(losses)
    ]


def kept(*losses: float, by_domain: bool = False) -> list[Measures]:
    """As `--results` keeps them."""
    more = {"by_domain": by_domain or None, "seconds": {"route": 51.0}}
    return [measures.model_copy(update=more) for measures in cells(*losses)]


def written(folder: Path) -> str:
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    return (folder / "report.html").read_text()


def comparison(variants: dict[str, list[Measures]], problems: list[str], folder: Path) -> str:
    rows = summary(variants, labels(list(variants)))
    COMPARISON.write(folder, Comparison(variants=variants, summary=rows, not_comparable=problems))
    return written(folder)


def test_cells_that_were_kept_have_their_seconds_and_no_memory(tmp_path: Path) -> None:
    text = comparison({"sft": kept(1.0, 1.2), "upit": kept(0.9, 1.1)}, [], tmp_path)
    assert text.count("<td>51</td><td></td>") == 2
    assert "<td>0.00</td>" not in text


def test_no_domain_is_called_the_last_checkpoint() -> None:
    assert [card.heading for card in on_the_way(kept(1.0))] == [
        "Against the base",
        "Against the last checkpoint (checkpoint-9)",
    ]
    assert [card.heading for card in on_the_way(kept(1.0, by_domain=True))] == ["Against the base"]


def test_it_says_which_is_better_and_whether_that_is_noise(tmp_path: Path) -> None:
    variants = {"sft": cells(1.0, 1.2, 1.4), "<ours>: upit x=1": cells(0.8, 1.01, 1.19), "b: upit": cells(1.1, 1, 2)}
    text = comparison(variants, [], tmp_path)
    assert (
        "The lowest held-out loss, 1.0000 ± 0.1952, is that of “&lt;ours&gt;”: -0.2000 against sft "
        "(p &lt; 0.001, paired" in text
    )
    assert "after Holm for 2 such tests: more than noise), 3 seeds" in text
    assert "NOT COMPARABLE" not in text
    assert "<td>sft</td><td>1.0000</td><td>1.2000</td><td>1.4000</td>" in text  # by seed
    assert "<td>sft</td><td>1.2000 ± 0.2000</td><td>1.3000 ± 0.2000</td><td>1.2000 ± 0.1414</td>" in text  # by domain
    assert "<td>sft</td><td>3.0000</td><td>1.5000</td><td>1.2000 ± 0.2000</td>" in text  # base, best checkpoint, MoE
    assert "<td>sft</td><td>1,000</td><td>1,000</td>" in text
    assert "training tokens, route" not in text  # where no run trains, there is no column
    assert "&#39;&lt;ours&gt;: upit x=1&#39;" in text
    assert "0123456789ab." in text


def plan_of(num_experts: int) -> ExpansionPlan:
    gram = ((0.0,) * num_experts,) * num_experts
    experts = (Expert(name="base", kind="base"),) * num_experts
    settings = {"merge": "dare", "drop_rate": 0.2, "seed": 0, "similarity": "cosine"}
    return ExpansionPlan(experts=experts, gram=gram, **settings)


def with_plans(folder: Path, *num_experts: int) -> None:
    """Run folders with as many experts."""
    for number, count in enumerate(num_experts):
        place = run_of(folder, number, 0) / PLAN.stage
        place.mkdir(parents=True)
        PLAN.write(place, plan_of(count))


def test_the_first_screen_is_about_the_best_moe_against_dense_tuning(tmp_path: Path) -> None:
    variants = {"a: x": cells(1.3, 1.4, 2.6), "b: y": cells(1.1, 1.25, 1.3), "sft: z": cells(1.0, 1.1, 1.2)}
    with_plans(tmp_path, 8, 4, 1)
    text = comparison(variants, [], tmp_path)
    head = text[text.index("<header>") : text.index("<nav")]
    row = summary(variants, labels(list(variants)), against=2)[1].loss
    assert f"“b” has a held-out loss of 1.2167 ± 0.1041, {row.difference:.4f} higher than dense tuning (“sft”)" in head
    assert "the best of 2 variants beside the dense one" in head
    ends = " to ".join(f"{end:+.4f}" for end in row.interval)
    ps = f"p {row.p:.3f}, {row.p_corrected:.3f} after Holm"
    assert f"Over 3 seeds, paired, that is more than noise: 95% interval {ends}, {ps}" in head
    assert "--seeds 5 shows smaller ones" in head
    assert '<p class="gap worse">0.1167 higher' in head
    assert "1.2167 ± 0.1041, against 3.0000" in head  # the base
    assert "1.2167 ± 0.1041, against 1.5000" in head  # the last checkpoint
    assert "Both saw 2,000 training tokens." in head


def test_against_a_dense_reference_it_says_what_the_record_says(tmp_path: Path) -> None:
    variants = {"sft: z": cells(1.0, 1.1, 1.2), "b: y": cells(0.9, 1.05, 1.2)}
    with_plans(tmp_path, 1, 4)
    rows = summary(variants, labels(list(variants)))
    changed = rows[1].model_copy(update={"loss": rows[1].loss.model_copy(update={"p": 0.123, "p_corrected": 0.456})})
    COMPARISON.write(tmp_path, Comparison(variants=variants, summary=[rows[0], changed], not_comparable=[]))
    text = written(tmp_path)
    assert "that is not more than noise: 95% interval -0.1742 to +0.0742, p 0.123, 0.456 after Holm" in text
    assert '<p class="gap ">0.0500 lower' in text


def test_a_cell_that_was_made_anew_has_not_the_comparison_s_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = {"sft: z": cells(1.0, 1.1), "b: y": cells(0.9, 1.05)}
    with_plans(tmp_path, 1, 4)
    found = Comparison(variants=variants, summary=summary(variants, labels(list(variants))), not_comparable=[])
    cell = run_of(tmp_path, 1, 0)
    place = cell / SCORES.stage
    place.mkdir()
    SCORES.write(place, {MOE: ModelScores(loss=variants["b: y"][0].loss)})
    verdict = verdict_of_run(cell, found)
    assert verdict is not None
    assert "This run alone, with seed 0: 0.9000." in verdict.noise
    SCORES.write(place, {MOE: ModelScores(loss={"all": 2.3, "math": 2.4})})
    assert verdict_of_run(cell, found) is None
    assert "was made anew since it was compared" in " ".join(capsys.readouterr().out.split())


def test_what_was_forced_is_marked(tmp_path: Path) -> None:
    text = comparison(
        {"a": cells(1.0), "b": cells(0.5, tokens=9)}, ["seed 0: other numbers of training tokens"], tmp_path
    )
    assert "<strong>NOT COMPARABLE</strong>: seed 0: other numbers of training tokens" in text
    assert "One seed says nothing about noise" in text
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)


def test_variants_that_diverged_are_named_and_not_drawn(tmp_path: Path) -> None:
    text = comparison({"a": cells(1.0, float("nan")), "b": cells(0.5, 0.6), "c": cells(0.7, 0.7)}, [], tmp_path)
    assert "The lowest held-out loss, 0.5500 ± 0.0707, is that of “b”" in text
    assert "No paired test could be made" in text
    assert text.count("<rect ") == 2
    text = comparison({"a": cells(float("nan")), "b": cells(float("nan"))}, [], tmp_path)
    assert "No variant has a finite held-out loss" in text


def test_a_sweep_has_a_line_for_each_setting(tmp_path: Path) -> None:
    axes = ["expand.num_experts=4,8,16", "route.start=upit,random"]
    points = [(m, start) for m in ("4", "8", "16") for start in ("upit", "random")]
    variants = {f"r e={m} s={start}": cells(1 / int(m), 1.1 / int(m)) for m, start in points}
    names = ["expand.num_experts", "route.start"]
    rows = summary(variants, labels(list(variants)), [dict(zip(names, point, strict=True)) for point in points])
    SWEEP.write(tmp_path, Sweep(recipe="r", grid=axes, axes=names, variants=variants, summary=rows))
    text = written(tmp_path)
    lines = [line.split() for line in re.findall(r'<polyline points="([^"]*)"', text)]
    assert [len(line) for line in lines] == [3, 3]
    across = [float(point.split(",")[0]) for point in lines[0]]
    assert (across[2] - across[1]) / (across[1] - across[0]) == pytest.approx(2, rel=0.01)  # 4, 8, 16 to scale
    assert "route.start=random</span>" in text
    assert "upcycle sweep \\\n  r \\\n  expand.num_experts=4,8,16" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("size", ["1200,800", "390,800"])
def test_it_works_in_a_browser(size: str, tmp_path: Path) -> None:
    text = comparison({"sft": cells(1.0, 1.2), f"upit {'long.setting=1 ' * 20}": cells(0.9, 1.0)}, [], tmp_path)
    done = in_browser(text.replace("</body>", f"{READABLE}</body>"), size, tmp_path)
    assert re.search(r"<title>.*\|true\|true</title>", done), done[-500:]


def test_a_run_shows_the_comparison_that_it_is_part_of(tmp_path: Path) -> None:
    comparison({"a": cells(1.0, 1.1), "b": cells(0.5, 0.4)}, [], tmp_path)
    (tmp_path / "1-seed0").mkdir()
    found = find_comparison((tmp_path / "1-seed0").parent)
    assert found is not None
    assert summarise(found).lead.startswith("The lowest held-out loss, 0.4500")
    assert find_comparison(tmp_path.parent) is None


def test_what_was_scaled_to_equal_flops_is_not_said_to_have_equal_tokens(tmp_path: Path) -> None:
    variants = {"dense: sft": cells(1.0, 1.1), "moe: upit": cells(0.9, 0.95, tokens=300)}
    with_plans(tmp_path, 1, 4)
    rows = summary(variants, labels(list(variants)), against=1)
    found = Comparison(variants=variants, summary=rows, not_comparable=[], match="flops")
    COMPARISON.write(tmp_path, found)
    text = written(tmp_path)
    assert summarise(found).heading == "At equal training FLOPs"
    assert "“moe” saw 600 training tokens, “dense” 2,000." in text
    assert "--seeds 2 --out FOLDER --against moe --match flops</pre>" in text
