"""`upcycle init`: the recipe that it writes is the method with what was given, says what it means, and runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import make_dense, perturbed
from upcycle import cli
from upcycle.errors import UpcycleError
from upcycle.pipeline import starting
from upcycle.pipeline.fit import Devices, Way, parse_devices, ways
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.pipeline.starting import Wanted, ask, methods, start
from upcycle.recipe import Recipe, load_recipe, shipped_recipes
from worlds import some_long

FEW = "route.min_samples_per_expert"


def given(base: Path | str, rows: Path | str) -> list[str]:
    return [f"base={base}", f"data.train={rows}"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new recipe.yaml"


@pytest.mark.parametrize("method", some_long(methods(), {"sft", "btx", "upit", "upit-lora"}))
def test_a_recipe_is_the_method_with_what_was_given(method: str, out: Path) -> None:
    start(Wanted("builtin:tiny", ["builtin:train"], "builtin:validation", method), out)
    values = [*given("builtin:tiny", "builtin:train"), "data.validation=builtin:validation"]
    if method in ("self-moe", "btx"):
        values.append("expand.num_experts=6")  # the domains of these data
        assert "(one for each domain of the data)" in out.read_text()
    assert load_recipe(str(out)) == load_recipe(method, values)


def test_the_methods_leave_model_and_data_to_the_user() -> None:
    assert {"upit", "upit-lora", "upit-fine", "vanilla-sft", "btx"} <= set(methods()) < set(shipped_recipes())


def test_every_setting_has_the_beginning_of_its_docstring(base: Path, rows: Path, out: Path) -> None:
    start(Wanted(str(base), [str(rows)]), out)
    described, section = 0, ""
    for line in out.read_text().splitlines():
        found = re.match(r"( *)(\w+):(.*?) +# (.*)", line)
        if not found:
            continue
        indent, name, value, said = found.groups()
        if not indent and not value.strip():
            section = name
            continue
        fields = Recipe.model_fields[section].annotation.model_fields if indent else Recipe.model_fields
        whole = " ".join(fields[name].description.split())
        assert whole.startswith(re.sub(r" \([^()]*\)$", "", said)), line
        described += 1
    values = yaml.safe_load(out.read_text())
    assert described == sum(len(value) if isinstance(value, dict) else 1 for value in values.values()) >= 18


def test_a_recipe_runs_and_the_commands_that_it_ends_with_name_it(
    base: Path, rows: Path, out: Path, tmp_path: Path, capsys: Any
) -> None:
    start(Wanted(str(base), [str(rows)]), out)
    said = capsys.readouterr().out
    assert said.rstrip().endswith(f"    upcycle run '{out}' --run 'runs/new recipe'")
    assert "--dry-run" in said
    assert "llama -> mixtral, 8 experts, top-2" in said
    assert "copy" in said
    recipe = load_recipe(str(out))
    assert recipe.route.min_samples_per_expert < 20  # 96 rows are too few for that,
    assert recipe.prepare.warmup_fraction == recipe.posttrain.warmup_fraction == 0  # and for that
    run_stages(Run(recipe, tmp_path / "run"))
    assert {"base", "MoE"} <= set(Run(recipe, tmp_path / "run").scores)


def test_the_command_asks_nobody_off_a_terminal_and_says_which_flags_are_missing(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for words, code, said in (
        (["--out", str(out)], 2, "error: --base is missing: give a model folder or hub name; --data is missing"),
        (["--base", "builtin:tiny", "--data", "builtin:train", "--devices", "8xH101", "--out", str(out)], 2, "8xH101"),
        (["--base", "builtin:tiny", "--data", "builtin:train", "--out", str(out)], 0, ""),
        (["--out", str(out)], 2, "exists and is not replaced"),
    ):
        monkeypatch.setattr("sys.argv", ["upcycle", "init", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert (stopped.value.code or 0) == code
        assert said in capsys.readouterr().err


def test_several_files_and_long_names_are_a_list(base: Path, rows: Path, out: Path, tmp_path: Path) -> None:
    other = tmp_path / "odd: #1.jsonl"
    other.write_text(rows.read_text().replace("copy", "also"))
    start(Wanted(str(base), [str(rows), str(other)]), out)
    assert load_recipe(str(out)).data.train == [str(rows), str(other)]


def test_a_file_is_not_replaced(base: Path, rows: Path, out: Path) -> None:
    out.write_text("mine")
    with pytest.raises(UpcycleError, match="exists and is not replaced; give --out another file"):
        start(Wanted(str(base), [str(rows)]), out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"method": "quickstart"}, "--method is 'quickstart', expected one of btx, drop, .*upit, upit-fine"),
        ({"data": ["nowhere.jsonl"]}, r"data file nowhere.jsonl does not exist"),
        ({"base": "/nowhere"}, "model folder /nowhere does not exist"),
        ({"checkpoints": "/nowhere"}, "--checkpoints: /nowhere is not a folder"),
        ({"checkpoints": "/nowhere/checkpoint-*"}, "--checkpoints: no folder matches the pattern /nowhere/"),
        ({"checkpoints": "{given}/checkpoint-*", "method": "vanilla"}, "vanilla makes its experts of copies of the"),
        ({"checkpoints": "{given}/checkpoint-1*"}, "1 checkpoint of 1"),
        ({"checkpoints": "{given}/checkpoint-*", "method": "upit-lora"}, "is not an adapter"),
        ({"data": ["{few}"]}, "3 training rows, too few for 8 experts"),
        ({"data": ["{one}"], "method": "btx"}, "--method btx trains once for each domain, but all rows have the same"),
    ],
)
def test_what_cannot_be_is_refused_before_a_file_is_written(
    wanted: dict[str, Any], message: str, base: Path, rows: Path, checkpoints: list[Path], out: Path, tmp_path: Path
) -> None:
    (few := tmp_path / "few.jsonl").write_text("\n".join(rows.read_text().splitlines()[:4]))
    one = tmp_path / "one.jsonl"
    one.write_text("\n".join(line for line in rows.read_text().splitlines() if "reverse" in line))
    (links := tmp_path / "given").mkdir()
    for folder in checkpoints:
        (links / folder.name).symlink_to(folder)
    places = {"base": base, "given": links, "few": few, "one": one}
    filled = {
        name: [part.format(**places) for part in value] if name == "data" else value.format(**places)
        for name, value in wanted.items()
    }
    with pytest.raises(UpcycleError, match=message):
        start(Wanted(**{"base": str(base), "data": [str(rows)], **filled}), out)
    assert not out.exists()


def test_checkpoints_are_taken_in_the_order_of_their_steps(base: Path, rows: Path, out: Path, tmp_path: Path) -> None:
    folders = [perturbed(base, tmp_path / f"model-{step}", step) for step in (90, 100, 1000)]
    start(Wanted(str(base), [str(rows)], checkpoints=str(tmp_path / "model-*")), out)
    assert load_recipe(str(out)).prepare.checkpoints == [str(folder) for folder in folders]
    assert "learning_rate" not in out.read_text().split("expand:")[0]


def test_adapters_make_the_method_that_of_adapters(
    base: Path, rows: Path, out: Path, tmp_path: Path, capsys: Any
) -> None:
    start(Wanted(str(base), [str(rows)], method="upit-lora"), out)
    run = Run(load_recipe(str(out), ["prepare.epochs=1", "prepare.checkpoint_every=0.5"]), tmp_path / "run")
    run_stages(run, ("prepare",))
    assert "a mixture of adapters on llama, which folds to mixtral" in capsys.readouterr().out
    second = tmp_path / "second.yaml"
    start(Wanted(str(base), [str(rows)], checkpoints=str(run.folder / "prepare")), second)
    recipe = load_recipe(str(second))
    assert recipe.prepare.checkpoints == str(run.folder / "prepare")
    assert recipe.prepare.train == "lora"


def test_a_model_without_a_plain_moe_gets_lora_experts(rows: Path, out: Path, tmp_path: Path, capsys: Any) -> None:
    dense = make_dense(tmp_path / "dense", model_type="gemma2", head_dim=8)
    with pytest.raises(UpcycleError, match=r"caps the scores of attention.*; give --method upit-lora"):
        start(Wanted(str(dense), [str(rows)], method="upit"), out)
    start(Wanted(str(dense), [str(rows)]), out)
    assert load_recipe(str(out)).prepare.train == "lora"
    assert "so the method is upit-lora" in capsys.readouterr().out
    neither = make_dense(tmp_path / "neither", model_type="persimmon", head_dim=8)
    with pytest.raises(UpcycleError, match="nor do LoRA experts work on it"):
        start(Wanted(str(neither), [str(rows)]), tmp_path / "other.yaml")


def test_what_makes_it_fit_is_chosen(rows: Path, out: Path, tmp_path: Path, capsys: Any) -> None:
    """Deep and narrow: what it computes takes more than its weights."""
    dense = make_dense(tmp_path / "deep", num_hidden_layers=12)
    between = needs_between(dense, rows)
    start(Wanted(str(dense), [str(rows)], devices=parse_devices(f"1x{between / 1e9:.7f}GB")), out)
    recipe = load_recipe(str(out))
    assert recipe.prepare.gradient_checkpointing
    assert recipe.posttrain.gradient_checkpointing
    assert "gradient_checkpointing: true" in out.read_text()
    assert "(chosen to fit)" in out.read_text()
    out.unlink()
    start(Wanted(str(dense), [str(rows)], devices=parse_devices("3x0.0001GB")), out)
    posttrain = load_recipe(str(out)).posttrain
    assert (posttrain.batch_size, posttrain.micro_batch_size) == (15, 1)  # of 16 and 4, which three cannot share
    said = capsys.readouterr().out
    assert "warning: the trainings will not fit on 3 x 0.0001 GB" in said
    assert said.rstrip().splitlines()[-1].startswith("    torchrun --nproc-per-node 3 -m upcycle run ")


def test_tied_embeddings_are_divided_evenly(tmp_path: Path) -> None:
    """As a run wants it: a vocabulary of 99 is no multiple of 2, and one of 3."""
    dense = make_dense(tmp_path / "tied", tie_word_embeddings=True)
    run = Run(load_recipe("upit", given(dense, "rows.jsonl")), tmp_path / "run")
    mapping = run.kind.read_base(run.base, run.recipe)

    def sharded(cards: int) -> set[str]:
        batches = [f"{stage}.batch_size={2 * cards}" for stage in ("prepare", "posttrain")]
        micro = [f"{stage}.micro_batch_size=1" for stage in ("prepare", "posttrain")]
        plain = [*given(dense, "rows.jsonl"), *batches, *micro, "prepare.train=full"]
        found = ways(
            lambda more: load_recipe("upit", [*plain, *more]), mapping, [64], Devices(cards, "card", 1.0, None)
        )
        return {setting for way in found for setting in way.overrides if "fsdp" in setting}

    assert sharded(6) == {"devices.fsdp=3"}
    assert sharded(2) == set()


def test_a_base_without_a_chat_template_can_be_given_one(base: Path, rows: Path, out: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(
        UpcycleError, match=r"no chat template; give data\.chat_template \(upcycle init: --chat-template"
    ):
        start(Wanted(str(bare), [str(rows)]), out)
    start(Wanted(str(bare), [str(rows)], chat_template="chatml"), out)
    assert load_recipe(str(out)).data.chat_template == "chatml"


def test_what_nearly_fills_a_device_is_a_tight_fit() -> None:
    def ways_on(gigabytes: float) -> dict[str, Way]:
        run = Run(load_recipe("upit", given("builtin:tiny", "builtin:train")), Path())
        base = run.kind.read_base(run.base, run.recipe)
        devices = Devices(1, "CPU", gigabytes, None, False)
        return {way.name: way for way in ways(lambda more: load_recipe("upit", [*values, *more]), base, [64], devices)}

    values = given("builtin:tiny", "builtin:train")
    needs = max(forecast.device for forecast in ways_on(1000)["as it is"].stages.values()) / 1e9
    assert [ways_on(needs / share)["as it is"].fits for share in (0.84, 0.86, 0.91, 0.93)] == [
        "yes",
        "tight",
        "tight",
        "no",
    ]


def needs_between(dense: Path, rows: Path) -> float:
    """GB of a card on which a training fits with activations recomputed, and not without."""
    from upcycle.pipeline.fit import ROOM

    draft = starting.Draft("upit", (*given(dense, rows), f"{FEW}=1"))
    run = Run(draft.recipe(), Path())
    base = run.kind.read_base(run.base, run.recipe)
    found = {way.name: way for way in ways(draft.recipe, base, [max_tokens(run)], parse_devices("1x100GB"))}
    plain, less = (
        max(forecast.device for forecast in found[name].stages.values())
        for name in ("as it is", "activations recomputed")
    )
    assert less < plain
    return (plain + less) / 2 / ROOM


def max_tokens(run: Run) -> int:
    return max(len(sample.input_ids) for sample in run.splits.train)


def test_what_is_missing_is_asked_for_on_a_terminal_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"base": None, "data": None, "validation": None, "method": "upit", "checkpoints": None}
    with pytest.raises(UpcycleError, match=r"--base is missing: .*; --data is missing: give a file with chats"):
        ask(nothing, prompt=lambda *_, **__: pytest.fail("nobody is there"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text(json.dumps({}))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked: list[str] = []

    def prompt(question: str, default: str | None, show_default: bool = True) -> str:
        asked.append(question)
        return "mine" if "Dense" in question else str(default)

    expected = {**nothing, "base": "mine", "data": ["chats.jsonl"]}
    assert ask(nothing, prompt) == expected
    assert len(asked) == 4
    assert ask(expected, prompt=lambda *_, **__: pytest.fail("all is there")) == expected
