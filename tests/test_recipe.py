"""Recipes: shipped ones, overrides, and errors that name the field."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from upcycle.errors import UpcycleError
from upcycle.recipe import describe_settings, differences, dump_recipe, load_recipe, parse_recipe, shipped_recipes


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    load_recipe(name)
    assert shipped_recipes()[name].startswith("# ")


def test_what_is_dumped_is_read_back(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = parse_recipe(tiny_recipe, "test")
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe
    assert differences(recipe, recipe) == []


def test_overrides_replace_settings_of_any_depth() -> None:
    recipe = load_recipe("upit", ["expand.num_experts=16", "seed=7", "prepare.learning_rate=2e-4", "data.train=[a, b]"])
    assert (recipe.expand.num_experts, recipe.seed) == (16, 7)
    assert recipe.prepare.learning_rate == 2e-4
    assert recipe.data.train == ["a", "b"]
    assert differences(load_recipe("upit"), recipe)[-1] == "seed: 0 -> 7"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("expand.num_expert=3", r"^override 'expand\.num_expert=3': unknown setting; did you mean 'num_experts'\?"),
        ("exapnd.num_experts=3", r"^override exapnd\.num_experts=3: exapnd: unknown setting; did you mean 'expand'\?"),
        ("expand.num_experts=many", r"^override 'expand\.num_experts=many': expected a whole number \(found 'many'\)$"),
        (
            "epochs=1",
            r"^override 'epochs=1': unknown setting; did you mean prepare\.epochs, route\.epochs or ",
        ),
        ("prepare.batch=1", r"'prepare\.batch=1': unknown setting; did you mean 'batch_size'\?"),
        ("prepare.checkpoints=3", r"'prepare\.checkpoints=3': expected text or a list \(found 3\)$"),
        ("lora.four_bit=maybe", r"'lora\.four_bit=maybe': expected true or false \(found 'maybe'\)$"),
        ("prepare=3", r"'prepare=3': expected fields with values, .* \(found 3\)$"),
        ("route.epochs=2 posttrain.epochs=2 posttrain.epochs=x", r"^override 'posttrain\.epochs=x': expected a number"),
        ("expand.num_checkpoints=9", r"expand.num_checkpoints is 9, but there are 8 checkpoints .* room for 8 experts"),
        ("route.start=ridge route.expert_learning_rate=1e-4", r"start=ridge trains no experts"),
        ("assemble.num_experts_per_tok=1", r"gives the router no gradient; take 2 or more, cut experts into slices"),
        ("prepare.checkpoint_every=2", r"1 checkpoint of 1 \(prepare.checkpoints, .* expected 2 or more"),
        ("expand.num_experts=0", r"'expand\.num_experts=0': expected 1 or more \(found 0\)"),
        ("expand.drop_rate=0.99", r"'expand\.drop_rate=0\.99': expected 0\.95 or less \(found 0\.99\)"),
        ("route.start=kmeanz", r"'route\.start=kmeanz': expected .*'mean_hidden' or 'random' \(found 'kmeanz'\)"),
        (
            "assemble.num_experts_per_tok=9",
            r"^recipe upit with the overrides \S+=9 is not valid:\n  \S+ is 9, more than expand\.num_experts, 8",
        ),
        ("prepare.micro_batch_size=3", r"prepare: batch_size 16 is not a multiple of micro_batch_size 3"),
        ("data.train=[a", r"override 'data\.train=\[a': the value is not YAML"),
        ("data.train=3", r"^override 'data\.train=3': expected a file, folder, pattern or hub dataset"),
        ("prepare.lr_scheduler=linear", r"posttrain.lr_scheduler is cosine and .* set both alike"),
        ("'prepare.checkpoints=[a, b]' posttrain.schedule=continue", r"given checkpoints .* do not say how far"),
        (
            "expand.copies_of=last expand.spread=1 expand.keep_base=true",
            r"expand\.keep_base is True, .* no effect: with",
        ),
        (
            "expand.copies_of=last expand.spread=1 expand.num_checkpoints=2",
            r"expand\.num_checkpoints is 2, .* no effect",
        ),
        ("expand.adapters=product", r"expand\.adapters is product, which has no effect: experts are whole FFNs"),
        ("assemble.channels=random", r"assemble\.channels is random, .* not cut into slices"),
        ("posttrain.balance_over=experts", r"posttrain\.balance_over is experts, which has no effect"),
        (
            "'prepare.checkpoints=[a]' expand.copies_of=base assemble.shared=base expand.spread=1",
            r"prepare\.checkpoints is \['a'\], .* nothing is taken from them",
        ),
        ("posttrain.freeze=shared posttrain.shared_rate=10", r"shared_rate is 10\.0, .* posttrain\.freeze is shared"),
        (
            "posttrain.optimizer_state=carry 'prepare.trainer={optim: adafactor}'",
            r"optimizer_state is carry, but prepare\.trainer\.optim is adafactor",
        ),
        (
            "'prepare.trainer={pad_to_multiple_of: 64}'",
            r"pad_to_multiple_of is not for SFTConfig here; rows of a micro",
        ),
        ("seed", r"override 'seed' is not of the form section\.field=value"),
        ("base.x=1", r"override 'base\.x=1': 'base' is a value, not a section"),
    ],
)
def test_a_bad_setting_is_named(override: str, message: str) -> None:
    with pytest.raises(UpcycleError, match=message):
        load_recipe("upit", shlex.split(override))


def test_what_shipped_recipes_set_may_be_idle() -> None:
    """One's own domain models in place of a training by domain; a frozen router in place of a slow one."""
    assert load_recipe("btx", ["prepare.checkpoints=[a, b]", "expand.num_experts=2"]).prepare.by_domain
    assert load_recipe("upit-fine", ["posttrain.freeze=router"]).posttrain.router_rate == 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["expand.spread=1"],
            r"assemble\.shared is last, which needs a last checkpoint.*set assemble\.shared=mean or base",
        ),
        (["assemble.shared=mean", "expand.spread=1", "expand.copies_of=last"], r"expand\.copies_of is last"),
        (["assemble.shared=mean", "expand.spread=-0.25"], r"expand\.spread is -0\.25"),
    ],
)
def test_no_domain_is_taken_for_the_last_checkpoint(words: list[str], message: str) -> None:
    by_domain = ["prepare.train=full", "prepare.by_domain=true", *words]
    with pytest.raises(UpcycleError, match=message):
        load_recipe("upit", by_domain)
    assert load_recipe("btx").assemble.shared == "mean"
    assert load_recipe("self-moe").prepare.by_domain


def test_what_changes_in_a_setting_of_several_values_is_seen() -> None:
    def changes(before: str, after: str) -> list[str]:
        return differences(load_recipe("upit", [before]), load_recipe("upit", [after]))

    assert changes("assemble.layers=all", "assemble.layers={every: 2}") == ["assemble.layers: all -> {'every': 2}"]
    clipped = "posttrain.trainer={max_grad_norm: 0.5}"
    assert changes("posttrain.trainer={}", clipped) == ["posttrain.trainer: {} -> {'max_grad_norm': 0.5}"]
    assert changes(clipped, "posttrain.trainer={}") == ["posttrain.trainer: {'max_grad_norm': 0.5} -> {}"]
    (said,) = changes("data.train={path: x.jsonl, weight: 2}", "data.train=x.jsonl")
    assert said.startswith("data.train: {'path': 'x.jsonl', 'weight': 2.0")
    assert changes(clipped, clipped) == []


def test_one_schedule_spans_what_a_run_trains() -> None:
    def share(name: str, *overrides: str) -> float:
        return load_recipe(name, overrides).dense_share

    assert share("upit") == 0.5
    assert share("upit", "prepare.epochs=1", "prepare.checkpoint_every=0.25", "posttrain.epochs=3") == 0.25
    # a schedule of its own: none to share, or said so; then the shapes may differ
    assert share("vanilla") == share("sft") == share("upit", "prepare.checkpoints=[a, b]") == 1
    assert share("upit", "posttrain.schedule=restart", "prepare.lr_scheduler=linear") == 1


def test_a_missing_setting_and_a_missing_recipe_are_named(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"recipe test is not valid:\n  data: missing; add it to the recipe"):
        parse_recipe({"base": "x"}, "test")
    (tmp_path / "recipe.yaml").write_text("base: x\n")
    with pytest.raises(UpcycleError, match=r"recipe\.yml does not exist; did you mean '.*recipe\.yaml'\?"):
        load_recipe(str(tmp_path / "recipe.yml"))
    with pytest.raises(UpcycleError, match=r"recipe' is neither .*; did you mean '.*recipe\.yaml'\?"):
        load_recipe(str(tmp_path / "recipe"))
    with pytest.raises(UpcycleError, match=r"'upti' is neither .*did you mean 'upit'\?"):
        load_recipe("upti")
    with pytest.raises(UpcycleError, match=r"gone\.yaml does not exist"):
        load_recipe(str(tmp_path / "gone.yaml"))
    (tmp_path / "bad.yaml").write_text("base: [")
    with pytest.raises(UpcycleError, match=r"bad\.yaml is not YAML"):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_every_setting_has_a_meaning() -> None:
    text = describe_settings()
    for name in ("base", "data.train", "prepare.checkpoint_every", "route.alpha", "evaluate.max_generated"):
        assert f"\n{name}: " in text
    recipe = load_recipe("upit").model_dump()
    documented = sum(len(section) if isinstance(section, dict) else 1 for section in recipe.values())
    assert len(re.findall(r"^[\w.]+: .*\n(?:  \S.*\n)*    \S", text, re.MULTILINE)) == documented
    assert max(map(len, text.splitlines())) <= 120


def test_a_folder_named_like_a_shipped_recipe_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quickstart").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart").base == "builtin:tiny"
