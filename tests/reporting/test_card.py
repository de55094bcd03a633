"""The model card: metadata that the hub reads, lineage, scores, the exact recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from upcycle.cli import app
from upcycle.disk import write_json
from upcycle.pipeline.benchmarks import read_scores
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import load_recipe, parse_recipe
from upcycle.records.files import BENCHMARK_SCORES
from upcycle.reporting.card import _cell, licence_of


@pytest.fixture(scope="module")
def finished(base: Path, rows: Path, checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = {"epochs": 1, "checkpoint_every": 1, "batch_size": 8, "micro_batch_size": 8}
    values: dict[str, Any] = {
        "base": str(base),
        "data": {"train": str(rows), "max_length": 64},
        "prepare": {"checkpoints": [str(c) for c in checkpoints]},
        "expand": {"num_experts": 4},
        "route": {"min_samples_per_expert": 3, "start": "random"},
        "posttrain": training,
        "evaluate": {"max_answer_tokens": 9, "models": "ends"},
    }
    run = Run(parse_recipe(values, "test"), tmp_path_factory.mktemp("card") / "run")
    run_stages(run)
    return run.folder


def test_an_exported_run_has_a_card_that_the_hub_reads(finished: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(finished), "--to", str(tmp_path / "my-moe")])
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "my-moe" / "README.md")
    assert card.data.library_name == "transformers"
    assert "moe" in card.data.tags
    assert "# my-moe" in card.text
    assert "A mixtral mixture of 4 experts, top-2" in card.text
    assert "- E3 child-3 = " in card.text
    assert "\nvllm serve FOLDER " in card.text
    assert "Not stated by the base's folder" in card.text
    scores = json.loads((finished / "evaluate" / "scores.json").read_text())
    assert f"| MoE | {scores['MoE']['loss']['all']:.3f} |" in card.text
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(card.text.split("```yaml")[1].split("```")[0])
    assert load_recipe(str(recipe)) == load_recipe(str(finished / "recipe.yaml"))


def test_card_and_report_have_the_benchmarks_of_the_run(finished: Path, tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": f"copy {word}", "answer": word} for word in ("ab", "cd")]
    (tmp_path / "say.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = CliRunner().invoke(app, ["benchmark", str(finished), "--task-folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (finished / "benchmark" / "routing-MoE.png").read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, ["export", str(finished), "--to", str(tmp_path / "moe")]).exit_code == 0
    figure = BENCHMARK_SCORES.read_of(finished)["MoE"]["say"].main[0]
    assert f"| MoE | {figure:.1%} | {figure:.1%} +- " in (tmp_path / "moe" / "README.md").read_text()
    assert CliRunner().invoke(app, ["report", str(finished)]).exit_code == 0
    page = (finished / "report.html").read_text()
    assert f"<td>MoE</td><td>{figure:.1%}</td><td>{figure:.1%} ± " in page
    assert '"say (benchmark)": [[' in page
    write_json(finished / "benchmark" / "of.json", {"posttrain": "another"})
    assert read_scores(finished) == {}
    assert "is of a different model than the run has now" in " ".join(capsys.readouterr().out.split())


def test_the_licence_is_the_bases(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a model")
    assert licence_of(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [apache\n---\n# a model")
    assert licence_of(tmp_path) is None


def test_a_name_does_not_break_a_table() -> None:
    assert _cell("a|b <script>") == "a\\|b &lt;script>"


def test_nothing_is_uploaded_without_a_yes(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[str] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: calls.append("create"))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda *_, **__: calls.append("upload"))
    for answer, expected in (("n\n", []), ("y\n", ["create", "upload"])):
        to = str(tmp_path / answer.strip())
        result = CliRunner().invoke(app, ["export", str(finished), "--to", to, "--push", "me/moe"], input=answer)
        assert result.exit_code == 0, result.output
        assert calls == expected
