"""The command line as a user meets it."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from upcycle import cli, command, console
from upcycle.disk import write_text
from upcycle.hashes import VERIFY
from upcycle.pipeline.stages import stage_names
from upcycle.recipe import load_recipe, shipped_recipes
from upcycle.records.route import Ranking


@pytest.fixture
def recipe_file(tiny_recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["upcycle", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


def test_help_names_every_stage(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in stage_names())


def test_dry_run_prints_the_recipe_and_does_nothing(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, capsys: Any
) -> None:
    code = call(monkeypatch, "run", recipe_file, "--run", tmp_path / "run", "--dry-run", "expand.num_experts=5")
    assert code == 0
    printed = capsys.readouterr().out
    assert "\nexpand.num_experts=5\n" in printed
    assert "evaluate.tokens_per_batch" not in printed  # at its default
    assert [line.split()[0] for line in printed.splitlines()[-6:]] == list(stage_names())
    assert "1 file, the first rows can be read" in printed
    assert not (tmp_path / "run").exists()
    assert call(monkeypatch, "run", recipe_file, "--run", tmp_path / "run", "--dry-run", "-v") == 0
    assert "  tokens_per_batch: 8192" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base={folder}", "{folder} is not a model folder: it has no config.json"),
        ("data.train={folder}/gone.jsonl", "data file {folder}/gone.jsonl does not exist"),
        ("data.train=[{folder}/good.jsonl, {folder}/bad.jsonl]", "{folder}/bad.jsonl:1: "),
        ("data.train={folder}/*.jsonl", "{folder}/bad.jsonl:1: "),
        ("data.validation={folder}/empty.csv", "{folder}/empty.csv: no rows; expected chats"),
        ("prepare.checkpoints={folder}", "prepare.checkpoints: {folder} holds 0 folders named checkpoint-<step>"),
        (
            "posttrain.trainer={{max_grad_nrm: 1}}",
            "posttrain.trainer.max_grad_nrm: TRL's SFTConfig has no such setting",
        ),
        ("prepare.trainer={{max_grad_norm: abc}}", "prepare.trainer.max_grad_norm: expected a number (found 'abc')"),
        (
            "data.domain=math",
            "override 'data.domain=math': unknown setting; it is a source's: data.train={{path: ..., ",
        ),
        ("data.train=", "override 'data.train=': expected a file, folder, pattern or hub dataset"),
    ],
)
def test_a_dry_run_looks_at_base_and_data(
    override: str, message: str, monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "good.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty.csv").write_text("prompt,completion\n")
    words = ("run", recipe_file, "--run", tmp_path / "run", "--dry-run", override.format(folder=tmp_path))
    assert call(monkeypatch, *words) == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(folder=tmp_path)}")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    words = ("base=owner/none-such", "data.train=owner/rows", "--dry-run")
    assert call(monkeypatch, "run", "upit", "--run", tmp_path / "run", *words) == 0
    said = capsys.readouterr().out
    assert "base: owner/none-such, on the hub: not looked at" in said
    assert "data: owner/rows, on the hub: not looked at" in said


def test_inspect_draws_where_it_is_told_to_alone(
    monkeypatch: pytest.MonkeyPatch, base: Path, checkpoints: list[Path], tmp_path: Path, capsys: Any
) -> None:
    given = f"prepare.checkpoints=[{','.join(map(str, checkpoints))}]"
    words = (f"base={base}", "data.train=builtin:train", given, "expand.num_experts=4", "--until", "expand")
    assert call(monkeypatch, "run", "upit", "--run", tmp_path / "run", *words) == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert call(monkeypatch, "inspect", tmp_path / "run") == 0
    assert list((tmp_path / "here").iterdir()) == []
    capsys.readouterr()
    for ending in ("x.png", "x.png (replaced)"):
        assert call(monkeypatch, "inspect", tmp_path / "run", "--figure", "x.png") == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"heat map and dendrogram: {ending}"


def test_a_run_stops_where_it_is_told_to(
    monkeypatch: pytest.MonkeyPatch, base: Path, checkpoints: list[Path], tmp_path: Path, capsys: Any
) -> None:
    run, given = tmp_path / "run", f"prepare.checkpoints=[{','.join(map(str, checkpoints))}]"
    words = ("upit", "--run", run, f"base={base}", "data.train=builtin:train", given, "expand.num_experts=4")
    assert call(monkeypatch, "run", *words, "--until", "prepared") == 2
    assert "--until is 'prepared', expected one of prepare, expand, assemble" in capsys.readouterr().err
    assert call(monkeypatch, "run", *words, "--until", "expand") == 0
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["expand", "prepare"]
    monkeypatch.setenv(VERIFY, "0")
    assert call(monkeypatch, "expand", *words, "--verify") == 0
    assert os.environ[VERIFY] == "1"


def test_a_users_mistake_is_one_line_without_traceback(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, capsys: Any
) -> None:
    assert call(monkeypatch, "run", recipe_file, "--run", tmp_path / "run", "base=/no/such/model") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model folder /no/such/model does not exist")
    assert "Traceback" not in error


def test_a_base_that_is_not_supported_says_what_is(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, base: Path, capsys: Any
) -> None:
    import shutil

    for changes, message in (
        (
            {"model_type": "gemma2"},
            "'gemma2' has no exact mixture-of-experts twin here: no MoE architecture caps the scores of attention",
        ),
        ({"mlp_bias": True}, "as mixtral, mlp_bias=True would be lost (exact with mlp_bias=False)"),
    ):
        other = tmp_path / "other"
        shutil.copytree(base, other, dirs_exist_ok=True)
        config = json.loads((base / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, **changes}))
        assert call(monkeypatch, "run", recipe_file, "--run", tmp_path / "run", f"base={other}", "--update") == 2
        assert message in capsys.readouterr().err


def test_check_prints_json_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is the package's: 4 layers, hidden 128, an FFN of 512 in three weights."""
    assert call(monkeypatch, "check", "builtin:tiny", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    ffn = 4 * 3 * 128 * 512
    assert found["parameters"] - found["dense_parameters"] == 7 * ffn + 4 * 8 * 128  # and the routers
    assert found["parameters"] - found["active_parameters"] == 6 * ffn
    assert (found["dense"], found["moe"], found["programs"]["vllm"]) == ("llama", "mixtral", "yes")
    assert found["logit_difference"] <= 1e-5


def test_the_columns_of_check_are_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "check", "builtin:tiny") == 0
    said = capsys.readouterr().out
    assert "k: experts that each token uses; G: slices that every expert is cut into; active: M parameters" in said
    assert "read: Upcycle and transformers read the same tensors from the folder" in said


@pytest.mark.parametrize(
    ("model_type", "offer"),
    [
        ("gemma2", "caps the scores of attention .*; LoRA experts work on it: prepare.train=lora"),
        ("glm4", "normalise queries and keys too.*; LoRA experts work on it: prepare.train=lora"),
        ("nemotron", "its norms have biases.*; LoRA experts work on it: prepare.train=lora"),
        ("persimmon", "nor do LoRA experts work on it, .* an mlp of dense_h_to_4h"),
    ],
)
def test_a_model_without_a_plain_moe_is_checked_for_what_else_works(
    model_type: str, offer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: Path, capsys: Any
) -> None:
    from conftest import make_dense

    dense = make_dense(tmp_path / "dense", model_type=model_type, head_dim=8)
    assert call(monkeypatch, "check", dense) == 2
    assert re.search(offer, capsys.readouterr().err)
    assert call(monkeypatch, "data", rows, "--base", dense) == 0  # whatever can be made of the base


def test_checkpoints_of_another_architecture_are_named(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, checkpoints: list[Path], capsys: Any
) -> None:
    from conftest import make_dense

    other = make_dense(tmp_path / "wide", intermediate_size=64)
    given = f"prepare.checkpoints=[{checkpoints[0]}, {other}]"
    assert call(monkeypatch, "run", recipe_file, "--run", tmp_path / "run", given) == 2
    assert f"{other}: intermediate_size is 64, but the base" in capsys.readouterr().err
    config = json.loads((other / "config.json").read_text())
    for model_type in (None, "no such", 1):
        (other / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        assert call(monkeypatch, "run", recipe_file, "--run", tmp_path / "run", given, "--update") == 2
        assert f"{other}: model_type is {model_type!r}, but the base" in capsys.readouterr().err


@pytest.mark.parametrize(("signal", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_says_how_to_go_on_also_while_the_program_is_imported(signal: str, status: int) -> None:
    """Where an exception would be lost, too: in a destructor."""
    script = (
        "import os, signal, sys, upcycle.__main__ as m\n"
        "class Stop:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.NAME)\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'upcycle.cli': sys.meta_path.remove(self)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "m.main()"
    )
    words = [sys.executable, "-c", script.replace("NAME", signal), "run", "r.yaml", "data.train=[a, b]"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = "stopped; continue with: upcycle run r.yaml 'data.train=[a, b]'\n"
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "{run}", "--out", "/nowhere/r.html"), "error: /nowhere/r.html cannot be written"),
        (
            ("run", "{recipe}", "--run", "/dev/null/x"),
            "error: the run folder /dev/null/x cannot be made: /dev/null is a file",
        ),
        (("run", "{recipe}", "--run", "{recipe}"), "{recipe} is a file; name a folder"),
    ],
    ids=["report", "under a file", "a file"],
)
def test_an_error_of_the_system_is_one_line(
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    recipe_file: Path,
    tmp_path: Path,
    capsys: Any,
) -> None:
    if "--out" in words:
        monkeypatch.setattr("upcycle.api.report", lambda *_: write_text(Path("/nowhere/r.html"), ""))
    assert call(monkeypatch, *(word.format(run=tmp_path, recipe=recipe_file) for word in words)) == 2
    said = capsys.readouterr().err
    assert message.format(recipe=recipe_file) in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("benchmark", "{file}", "--task-folder", "/nowhere"), "--out is needed"),
        (("benchmark", "/nowhere", "--out", "{folder}"), "no task: give --tasks"),
        (("export", "/nowhere", "--to", "{folder}"), "{folder} is not empty; give --to a new folder"),
        (("export", "/nowhere", "--to", "{file}"), "{file} is a file; give --to a new folder"),
        (("export", "/nowhere", "--to", "{folder}/new", "--push", "name"), "--push is 'name', expected OWNER/NAME"),
        (("report", "/nowhere", "--out", "{folder}/no/r.html"), "{folder}/no/r.html cannot be written"),
        (("report", "/nowhere", "--out", "{folder}"), "{folder} cannot be written: it is a folder; name a file"),
        (("inspect", "/nowhere", "--figure", "{folder}/x.jsonl"), "--figure is {folder}/x.jsonl, expected a name that"),
        (("inspect", "/nowhere", "--figure", "{folder}/no/x.png"), "{folder}/no/x.png cannot be written"),
    ],
)
def test_where_results_go_is_checked_before_anything_is_read(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, recipe_file: Path, capsys: Any
) -> None:
    places = {"file": recipe_file, "folder": recipe_file.parent}
    assert call(monkeypatch, *(word.format(**places) for word in words)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(**places)}")


@pytest.mark.parametrize(
    "words", [("inspect", "a\udcff"), ("run", "upit", "--run", "\udcff"), ("run", "upit", "--run", "x", "base=\udcff")]
)
def test_a_word_that_is_not_utf_8_is_refused(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert call(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {words[-1]!r} is not UTF-8")
    assert said.count("\n") == 1


def test_a_checkpoint_in_a_folder_that_is_not_utf_8_is_refused(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, capsys: Any
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    for name in ("checkpoint-1", "checkpoint-2"):
        (odd / name).mkdir(parents=True)
    monkeypatch.chdir(odd)
    for given in ("[checkpoint-1, checkpoint-2]", "."):
        assert call(monkeypatch, "prepare", recipe_file, "--run", tmp_path / "run", f"prepare.checkpoints={given}") == 2
        said = capsys.readouterr().err
        assert "\\udcff" in said
        assert "is not UTF-8; rename" in said


def test_a_result_that_cannot_be_recorded_is_one_line(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, capsys: Any
) -> None:
    def diverged(*_: Any) -> None:
        Ranking(samples=1, accuracy=math.nan, accuracy_by_layer=[], most_frequent_share=0.5, chance=0.5)

    monkeypatch.setattr(cli, "run_stages", diverged)
    assert call(monkeypatch, "run", recipe_file, "--run", tmp_path / "run") == 2
    assert capsys.readouterr().err == (
        "error: Ranking cannot be recorded: accuracy: expected 1 or less (found nan); "
        "is a weight or a loss not finite?\n"
    )


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("inline_container")])
def test_a_full_disk_says_how_to_go_on(
    error: Exception, monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "run_stages", full)
    monkeypatch.setattr("upcycle.studies.compare.compare", full)
    monkeypatch.setattr(command, "ALMOST_FULL_BYTES", 1 << 60)
    for words in (("run", recipe_file, "--run"), ("compare", "a", "b", "--out")):
        assert call(monkeypatch, *words, tmp_path / "run") == 2
        assert f"no space left on the disk of {tmp_path / 'run'} (" in capsys.readouterr().err


def test_assembly_that_will_not_fit_is_refused_beforehand(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, checkpoints: list[Path], capsys: Any
) -> None:
    import shutil
    from types import SimpleNamespace

    from upcycle.weights import folders

    usage = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=10), copyfile=shutil.copyfile)
    monkeypatch.setattr(folders, "shutil", usage)
    given = f"prepare.checkpoints=[{checkpoints[0]}, {checkpoints[1]}]"
    assert call(monkeypatch, "run", recipe_file, "--run", tmp_path / "run", given) == 2
    assert "free; make room" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("model.safetensors"))


def test_families_are_listed_for_people_and_programs(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "families") == 0
    printed = capsys.readouterr().out
    assert call(monkeypatch, "families", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    row = {"dense": "smollm3", "models": ["SmolLM3"], "moe": "granitemoe_swa"}
    assert any(row.items() <= entry.items() for entry in listed["families"])
    row = {"dense": "exaone4", "instead": "prepare.train=lora"}
    assert any(row.items() <= entry.items() for entry in listed["without_moe"])
    assert {"moe": "beam", "vllm": "no: does not know the architecture"}.items() <= listed["programs"][-1].items()
    for words in ("smollm3", "granitemoe_swa", "SmolLM3", "prepare.train=lora"):
        assert words in printed


def test_recipes_and_settings_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "recipes") == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(shipped_recipes())
    assert {"quickstart", "sft", "upit", "upit-paper"} < set(listed)
    assert call(monkeypatch, "recipes", "upit") == 0
    assert capsys.readouterr().out == shipped_recipes()["upit"]
    assert call(monkeypatch, "settings") == 0
    assert "route.alpha: float, default 0.5" in capsys.readouterr().out


def test_quiet_hides_progress_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_progress_shown", True)
    console.say("half done")
    console.hide_progress()
    console.say("nearly done")
    console.warn("odd")
    console.tell("written")
    assert capsys.readouterr().out.splitlines() == ["half done", "warning: odd", "written"]


@pytest.mark.parametrize("words", [["-q", "recipes", "upit"], ["recipes", "upit", "--quiet"]])
def test_quiet_stands_before_or_after_the_verb(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "upcycle", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, "base:" in done.stdout) == (0, True)


@pytest.mark.parametrize(("words", "traced"), [(["recipes", "gone"], False), (["recipes", "gone", "-v"], True)])
def test_only_verbose_shows_a_traceback(words: list[str], traced: bool) -> None:
    done = subprocess.run([sys.executable, "-m", "upcycle", *words], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("error: the package has no recipe 'gone'")
    assert ("Traceback" in done.stderr, len(done.stderr.splitlines()) > 1) == (traced, traced)


def test_every_verb_has_a_panel() -> None:
    panels = {cli.RUN, cli.ONE_STAGE, cli.LOOK, cli.COMPARE, cli.SHARE}
    assert {verb.rich_help_panel for verb in cli.app.registered_commands} == panels


def test_a_run_folder_that_is_a_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "file").write_text("")
    for run in ("file", "file/run"):
        assert call(monkeypatch, "run", recipe_file, "--run", tmp_path / run) == 2
        assert f"{tmp_path}/file is a file; name a folder" in capsys.readouterr().err


def test_check_forecasts_slices_too(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    typed = ["--granularity", "4", "--num-experts-per-tok", "1", "--devices", "8xH100"]
    assert call(monkeypatch, "check", "builtin:tiny", *typed) == 0
    assert "on each card" in capsys.readouterr().out


def test_check_says_what_no_recipe_would_take(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "check", "builtin:tiny", "--num-experts-per-tok", "1") == 2
    assert "--num-experts-per-tok is 1: the weight of the only expert" in capsys.readouterr().err


def test_names_may_have_any_characters(
    monkeypatch: pytest.MonkeyPatch, rows: Path, base: Path, tmp_path: Path, capsys: Any
) -> None:
    """Emoji, rarer Chinese, what YAML or Python escape."""
    odd = '\U0001f600 \U00020bb7\u2028\x85 "it\'s" \\ # : {a}'
    data, model = tmp_path / f"{odd}.jsonl", tmp_path / odd
    shutil.copy(rows, data)
    shutil.copytree(base, model)
    assert call(monkeypatch, "data", data, "--base", model) == 0
    assert call(monkeypatch, "init", "--base", model, "--data", data, "--out", tmp_path / "r.yaml") == 0
    recipe = load_recipe(tmp_path / "r.yaml")
    assert (recipe.base, recipe.data.train) == (str(model), str(data))


def test_names_are_taken_as_they_are_typed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "check", "~nobody-here/model") == 2
    assert "~nobody-here/model: no home folder is known for that user" in capsys.readouterr().err
    assert call(monkeypatch, "data", "builtin:train", "--base", "2024 #1") == 2  # in YAML a number and a comment
    assert "2024 #1" in capsys.readouterr().err


def test_check_refuses_more_experts_than_a_recipe_may_have(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "check", "builtin:tiny", "--num-experts", "600", "--granularity", "8") == 2
    assert capsys.readouterr().err == "error: --granularity 8 times --num-experts 600 is more than 4096 experts\n"


@pytest.mark.parametrize("words", [("--run", ""), ("--out=",)])
def test_a_place_without_a_name_is_not_the_current_folder(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, recipe_file: Path, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert call(monkeypatch, "run", recipe_file, *words) == 2
    assert "is empty, expected a name (is a variable of the shell not set?)" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_may_not_be_written_to_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr("upcycle.disk.os.access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    words = ("--base", "builtin:tiny", "--data", "builtin:train", "--out", tmp_path / "recipe.yaml")
    assert call(monkeypatch, "init", *words) == 2
    said = f"error: {tmp_path}/recipe.yaml cannot be written: the folder {tmp_path} may not be written to\n"
    assert capsys.readouterr().err == said


def test_an_empty_recipe_is_called_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "r.yaml").write_text("# nothing\n")
    assert call(monkeypatch, "run", tmp_path / "r.yaml", "--run", tmp_path / "run") == 2
    assert capsys.readouterr().err == f"error: recipe {tmp_path}/r.yaml is empty, expected sections with settings\n"
