"""The model card: metadata that the hub reads, lineage, scores, the exact recipe."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData
from typer.testing import CliRunner

import upcycle
from upcycle.cli import app
from upcycle.command import _at_home
from upcycle.disk import write_json
from upcycle.errors import UpcycleError
from upcycle.experts.ffn import describe
from upcycle.pipeline.benchmarks import read_scores
from upcycle.pipeline.origin import licence_of, origin_of
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import load_recipe, parse_recipe
from upcycle.records.description import Description
from upcycle.records.files import BENCHMARK_SCORES
from upcycle.reporting.card import _cell, _spelt, _use, card_text


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


def test_a_card_warns_of_programs_that_compute_something_else() -> None:
    made = Description("A MoE", plain=True, warnings=("llama.cpp ignores the sliding window",))
    assert _use(made).endswith("```\n\n- llama.cpp ignores the sliding window")
    assert _use(replace(made, warnings=())).endswith("```")


def test_a_card_says_the_same_wherever_it_is_written(
    base: Path, rows: Path, checkpoints: list[Path], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is named from the folder of the run's origin, looks like a hub name, and is gone in the end."""
    dense = Path(shutil.copytree(base, tmp_path / "models" / "tiny"))
    (dense / "README.md").write_text("---\nlicense: llama3\n---\n# tiny")
    monkeypatch.chdir(tmp_path)
    recipe = Run(load_recipe(str(finished / "recipe.yaml")), finished).recipe.model_copy(update={"base": "models/tiny"})
    run_stages(Run(recipe, tmp_path / "run"))
    texts = []
    for number, where in enumerate((tmp_path, tmp_path / "elsewhere", tmp_path)):
        where.mkdir(exist_ok=True)
        monkeypatch.chdir(where)
        to = upcycle.export(tmp_path / "run", tmp_path / f"out{number}" / "moe")
        texts.append((to / "README.md").read_text())
        assert not (to / "base.json").exists()
        if number == 1:
            shutil.rmtree(dense)
    assert "license: llama3" in texts[0]
    assert "Training data: `" in texts[0] and str(tmp_path) not in texts[0].split("## Reproduce")[0]  # noqa: PT018
    halved = upcycle.export(tmp_path / "run", tmp_path / "half", dtype="bfloat16")
    said = "The weights are stored in bfloat16; the scores are of the model in float32."
    assert [said in text for text in (texts[0], (halved / "README.md").read_text())] == [False, True]
    assert "base_model" not in texts[0]
    assert texts[1:] == texts[:1] * 2
    (tmp_path / "run" / "assemble" / "base.json").unlink()
    older = card_text(to, "moe", tmp_path / "run", recipe, origin_of(Run(recipe, tmp_path / "run"), None), describe(to))
    assert "The base was not found when this was written: look it up before you publish." in older
    assert "base_model" not in older


def test_an_export_needs_no_base(finished: Path, tmp_path: Path, base: Path) -> None:
    """But for its licence: the run's base is gone, or named by a path of another folder."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(base), "gone/base"))
    upcycle.export(run, tmp_path / "moe")
    assert "Not stated by the base's folder" in (tmp_path / "moe" / "README.md").read_text()


def test_an_export_replaces_no_folder_that_cannot_be(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would fail after everything is written."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(
        UpcycleError, match="link is a link, which cannot be replaced; give --to a new folder within it"
    ):
        upcycle.export(finished, tmp_path / "link")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UpcycleError, match="is the current folder"):
        upcycle.export(finished, ".")
    with pytest.raises(UpcycleError, match="dtype is 'bf16', expected one of source, float32, bfloat16, float16"):
        upcycle.export(finished, tmp_path / "moe", dtype="bf16")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "empty")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UpcycleError, match="empty is a mount"):
        upcycle.export(finished, "empty")


def test_the_home_folder_may_be_spelt(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    assert upcycle.export("~/run", "~/moe") == tmp_path / "moe"
    assert upcycle.report("~/run", "~/page.html") == tmp_path / "page.html"
    assert upcycle.Run(tmp_path / "run" / "recipe.yaml", "~/x").folder == tmp_path / "x"
    assert _at_home("--run=~/x y") == f"--run={tmp_path}/x y"
    assert _at_home("~/x") == f"{tmp_path}/x"
    for word in ("a=~/x", "~nobody-here: upit", "--run=x~", "x"):
        assert _at_home(word) == word


def test_the_licence_is_the_bases(tmp_path: Path) -> None:
    def written(front: str) -> dict[str, Any]:
        (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# a model")
        return licence_of(tmp_path)

    assert licence_of(tmp_path) == {}
    assert written("license: apache-2.0") == {"license": "apache-2.0"}
    assert written("license: [apache-2.0, mit]") == {"license": ["apache-2.0", "mit"]}
    own = {"license": "other", "license_name": "qwen-research", "license_link": "https://a.b/LICENSE"}
    assert written("\n".join(f"{name}: {value}" for name, value in own.items())) == own
    assert _spelt(own) == "other (qwen-research, https://a.b/LICENSE)"
    assert ModelCardData(**own).to_dict() == own
    assert written("license: [apache") == {}


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
