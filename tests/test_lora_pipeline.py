"""The whole path with adapters as experts: UpIT's LoRA setting and the methods that it is compared with."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_dense, perturbed
from upcycle.api import export as make_export
from upcycle.api import report
from upcycle.errors import UpcycleError
from upcycle.evaluation.benchmark import Contender, benchmark
from upcycle.evaluation.tasks import read_tasks
from upcycle.experts.adapter_files import read_tensors
from upcycle.experts.gram import adapter_gram
from upcycle.experts.kinds import KINDS, load_model
from upcycle.experts.lora import expert_updates
from upcycle.experts.mixture import MixtureConfig
from upcycle.pipeline.manifest import read_manifest
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.pipeline.stages import training_flops
from upcycle.pipeline.summary import show_summary
from upcycle.recipe import parse_recipe
from upcycle.settings import ExpandSettings
from upcycle.stages.model_upcycling.export import export
from upcycle.studies.benchmark import contenders
from worlds import IDS, as_base, logits, make_adapter, shrunk, some_long

PLAIN = """
import sys, torch
sys.modules["upcycle"] = None
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert model.config.model_type == "mixtral"
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.parametrize("name", some_long(["upit-lora", "lora-moe", "self-moe", "pesc"], {"upit-lora", "pesc"}))
def test_each_method_runs_and_learns(name: str, tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    experts = {"self-moe": 2}.get(name, 4)
    recipe = shrunk(name, tiny_recipe, expand={"num_experts": experts}, posttrain={"learning_rate": 3e-3})
    run = Run(recipe, tmp_path / "run")
    run_stages(run)
    log = json.loads((run.folder / "posttrain" / "log.json").read_text())["log"]
    assert log[-1]["loss"] < log[0]["loss"]
    assert len(log[0]["load"]) == 2
    assert len(log[0]["load"][0]) == experts
    kinds = {e.kind for e in run.plan.experts}
    assert kinds == {"upit-lora": {"checkpoint", "child"}, "self-moe": {"checkpoint"}}.get(name, {"base"})
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    assert scores["MoE"]["loss"]["all"] < scores["base"]["loss"]["all"]
    if name == "self-moe":
        assert [e.name for e in run.plan.experts] == ["domain-copy", "domain-reverse"]
        both = json.loads((run.folder / "prepare" / "log.json").read_text())
        assert both["rows"] == len(run.splits.train)
    if name in ("lora-moe", "pesc"):
        assert run.checkpoints == []
    if name == "pesc":
        with pytest.raises(UpcycleError, match="are not linear"):
            export(run.folder / "posttrain", tmp_path / "plain", True, "source")
        return
    export(run.folder / "posttrain", tmp_path / "plain", True, "source")
    torch.testing.assert_close(logits(tmp_path / "plain"), logits(run.folder / "posttrain"), rtol=0, atol=1e-5)


def test_what_is_exported_needs_nothing_of_ours(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    run = Run(shrunk("upit-lora", tiny_recipe, expand={"num_experts": 3}), tmp_path / "run")
    run_stages(run)
    export(run.folder / "posttrain", tmp_path / "plain", True, "source")
    ids, out = tmp_path / "ids.pt", tmp_path / "logits.pt"
    torch.save(IDS, ids)
    subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path / "plain"), str(ids), str(out)], check=True)
    torch.testing.assert_close(torch.load(out), logits(run.folder / "posttrain"), rtol=0, atol=1e-5)


def test_a_base_with_gate_and_up_in_one_layer(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """From training the adapters to the folded MoE."""
    base = make_dense(tmp_path / "phi3", model_type="phi3")
    recipe = {**tiny_recipe, "base": str(base)}
    with pytest.raises(UpcycleError, match=r"has gate_proj and up_proj in one layer, gate_up_proj, .*; name both or"):
        run_stages(Run(shrunk("upit-lora", recipe, lora={"targets": ["up_proj"]}), tmp_path / "half"), ("prepare",))
    run = Run(shrunk("upit-lora", recipe), tmp_path / "run")
    run_stages(run)
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    assert scores["MoE"]["loss"]["all"] < scores["base"]["loss"]["all"]
    export(run.folder / "posttrain", tmp_path / "plain", True, "source")
    torch.testing.assert_close(logits(tmp_path / "plain"), logits(run.folder / "posttrain"), rtol=0, atol=1e-5)


def test_a_base_without_a_gate(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """From training the adapters to the mixture, whose activation has parameters of its own."""
    base = make_dense(tmp_path / "apertus", model_type="apertus")
    recipe = {**tiny_recipe, "base": str(base)}
    gated = shrunk("upit-lora", recipe, lora={"targets": ["gate_proj", "down_proj"]})
    with pytest.raises(UpcycleError, match=r"has no gate_proj, only up_proj and down_proj: name of these, or leave"):
        run_stages(Run(gated, tmp_path / "gated"), ("prepare",))
    run = Run(shrunk("upit-lora", recipe), tmp_path / "run")
    run_stages(run)
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    assert scores["MoE"]["loss"]["all"] < scores["base"]["loss"]["all"]
    trained = sum(factor.numel() for factor in read_tensors(run.checkpoint_folders[-1]).values())
    assert KINDS["lora"].addition(run.base.config, run.recipe) == trained
    active = run.kind.active(run.base, run.recipe)
    routers = 2 * 32 * run.recipe.expand.num_experts
    assert active.moe - active.dense == trained * (run.recipe.assemble.num_experts_per_tok - 1) + routers


def test_the_same_seed_gives_the_same_bytes(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    stages = ("prepare", "expand", "assemble")
    contents = []
    for name in ("one", "two"):
        run = Run(shrunk("upit-lora", tiny_recipe, lora={"rank": 4, "dropout": 0.1}), tmp_path / name)
        run_stages(run, stages)
        contents.append([read_manifest(run.folder / stage).content for stage in stages])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("how", ["average", "apart", "product"])
def test_the_users_own_adapters_become_experts(
    how: str, tiny_recipe: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    ranks = (4, 6) if how == "product" else (4, 4)
    folders = [make_adapter(base, tmp_path / f"mine-{i}", i, rank) for i, rank in enumerate(ranks)]
    given = {"checkpoints": [str(f) for f in folders]}
    recipe = shrunk("upit-lora", tiny_recipe, prepare=given, expand={"num_experts": 4, "adapters": how})
    run = Run(recipe, tmp_path / "run")
    run_stages(run, ("prepare", "expand", "assemble"))
    assert [e.name for e in run.plan.experts] == ["mine-0", "mine-1", "child-2", "child-3"]
    assert run.plan.adapters == how
    config = load_model(run.folder / "assemble", torch.float32).mixture
    assert config.expert_ranks == (4, ranks[1], max(ranks), max(ranks))
    assert config.expert_scaling == (2.0, 2.0, 1.0, 1.0)


def test_adapters_that_cannot_be_merged_apart_are_refused_where_there_are_children(base: Path, tmp_path: Path) -> None:
    def compare(settings: dict[str, Any], *folders: Path) -> None:
        KINDS["lora"].compare(as_base(base), folders, ExpandSettings(**settings), 0)

    small, large = (make_adapter(base, tmp_path / f"rank-{rank}", rank, rank) for rank in (4, 8))
    gates, ups = ([f"layers.{i}.mlp.{name}" for i in (0, 1)] for name in ("gate_proj", "up_proj"))
    gate = make_adapter(base, tmp_path / "gate", 0, 4, target_modules=gates)
    up, wide = (make_adapter(base, tmp_path / f"up-{rank}", 0, rank, target_modules=ups) for rank in (4, 8))
    negative = make_adapter(base, tmp_path / "negative", 0)
    config = json.loads((negative / "adapter_config.json").read_text())
    (negative / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": -8}))
    chosen = {"num_experts": 4, "num_checkpoints": 2}
    for settings, folders, said in (
        (chosen, (small, large, small, large), "rank 8 at .*, but 4 in .*rank-4; set expand.adapters=product"),
        ({"num_experts": 4}, (gate, up, wide), "rank 8 at .*up_proj, but 4 in .*up-4"),
        ({"num_experts": 4}, (small, negative), "negative: lora_alpha at .* is negative"),
    ):
        with pytest.raises(UpcycleError, match=said):
            compare(settings, *folders)
        compare({**settings, "adapters": "product"}, *folders)
    compare({"num_experts": 4, "copies_of": "last"}, small, large)  # nothing is merged
    compare({"num_experts": 2}, small, negative)


def test_fresh_adapters_are_of_the_weights_that_are_asked_for(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = shrunk("lora-moe", tiny_recipe, lora={"targets": ["down_proj"]})
    run = Run(recipe, tmp_path / "run")
    run_stages(run, ("prepare", "expand", "assemble"))
    for expert in expert_updates(run.folder / "assemble", MixtureConfig.load(run.folder / "assemble")):
        assert {name.rpartition(".")[2] for name, update in expert.items() if update.a.any()} == {"down_proj"}


def test_what_is_assembled_is_what_was_planned_also_with_the_base_as_a_parent(
    tiny_recipe: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    given = {"checkpoints": [str(make_adapter(base, tmp_path / f"mine-{i}", i, 8)) for i in range(2)]}
    expand = {"num_experts": 6, "keep_base": True, "similarity": "l2", "parents": "random"}
    run = Run(shrunk("upit-lora", tiny_recipe, prepare=given, expand=expand), tmp_path / "run")
    run_stages(run, ("prepare", "expand", "assemble"))
    assert any(2 in expert.parents for expert in run.plan.children)  # the base
    experts = expert_updates(run.folder / "assemble", MixtureConfig.load(run.folder / "assemble"))
    np.testing.assert_allclose(adapter_gram(experts), np.array(run.plan.gram), rtol=1e-4, atol=1e-6)


def test_adapters_and_models_are_not_confused(
    tiny_recipe: dict[str, Any], base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    adapters = [str(make_adapter(base, tmp_path / str(i), i, rank)) for i, rank in enumerate((4, 6))]

    def run(name: str, given: list[str], train: str, stages: tuple[str, ...] = ("prepare",)) -> None:
        recipe = shrunk("upit-lora", tiny_recipe, prepare={"checkpoints": given, "train": train})
        run_stages(Run(recipe, tmp_path / name), stages)

    with pytest.raises(UpcycleError, match=r"is an adapter; set prepare.train=lora"):
        run("a", adapters, "ffn")
    with pytest.raises(UpcycleError, match=r"is not an adapter \(no adapter_config.json\), but prepare.train is lora"):
        run("b", [str(c) for c in checkpoints], "lora")
    with pytest.raises(UpcycleError, match=r"rank 6 at .* but 4 in .*; set expand.adapters=product"):
        run("c", adapters, "lora", ("prepare", "expand"))


def test_domains_are_needed_for_a_training_by_domain(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    chat = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]
    rows.write_text(
        "\n".join(json.dumps({"messages": [{**chat[0], "content": f"say {i}"}, chat[1]]}) for i in range(60))
    )
    data = {"data": {**tiny_recipe["data"], "train": str(rows)}}
    recipe = shrunk("self-moe", tiny_recipe | data, expand={"num_experts": 2})
    with pytest.raises(UpcycleError, match=r"prepare.by_domain: found \d+ training rows of one domain"):
        run_stages(Run(recipe, tmp_path / "run"), ("prepare",))
    lines = [{**json.loads(line), "domain": f"d{n % 3}"} for n, line in enumerate(rows.read_text().splitlines())]
    rows.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        UpcycleError, match=r"each of 3 domains, but .* room for 2 experts, .* set expand.num_experts=3, or"
    ):
        run_stages(Run(recipe, tmp_path / "more"), ("prepare",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prepare": {"train": "bottleneck"}}, "set expand.copies_of=base"),
        ({"prepare": {"train": "lora"}, "assemble": {"shared": "mean"}}, "adapters share the base's weights"),
        ({"lora": {"four_bit": True}}, "lora.four_bit needs prepare.train=lora"),
        ({"lora": {"targets": []}}, "lora.targets"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    changes: dict[str, Any], message: str, tiny_recipe: dict[str, Any]
) -> None:
    with pytest.raises(UpcycleError, match=message):
        parse_recipe({**tiny_recipe, **changes}, "test")


ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("dense", "changes", "reason"),
    [
        ("gemma2", {**ALTERNATING, "head_dim": 8}, "no MoE architecture caps the scores"),
        ("olmo3", ALTERNATING, "some of its layers have a sliding window"),
    ],
)
@pytest.mark.parametrize("name", some_long(["upit-lora", "pesc"], {"pesc"}))
def test_a_base_without_a_plain_moe_runs_to_the_end_and_is_told_so_at_the_start(
    name: str,
    dense: str,
    changes: dict[str, Any],
    reason: str,
    tiny_recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make_dense(tmp_path / dense, model_type=dense, **changes)
    run = Run(shrunk(name, {**tiny_recipe, "base": str(base)}), tmp_path / "run")
    run_stages(run, ("prepare",))
    warning = f"warning: {dense} has no exact plain MoE ("
    assert (warning in capsys.readouterr().out) == (name == "upit-lora")  # bottlenecks are never folded
    run_stages(run)
    scores = json.loads((run.folder / "evaluate" / "scores.json").read_text())
    assert scores["MoE"]["loss"]["all"] < scores["base"]["loss"]["all"]
    assert training_flops(run)["posttrain"] > 0
    show_summary(run)
    assert "--fold" not in capsys.readouterr().out
    result = run.folder / "posttrain"
    export(result, tmp_path / "compact", False, "source")
    assert "--fold" not in capsys.readouterr().out
    torch.testing.assert_close(logits(tmp_path / "compact"), logits(result), rtol=0, atol=0)
    if name == "upit-lora":
        with pytest.raises(UpcycleError, match=f"{reason}.*; export .*posttrain without --fold"):
            export(result, tmp_path / "plain", True, "source")
    with pytest.raises(UpcycleError, match=rf"{reason}.*; LoRA experts work on it: prepare\.train=lora"):
        run_stages(Run(parse_recipe({**tiny_recipe, "base": str(base)}, "test"), tmp_path / "other"))


def test_what_has_changed_since_is_never_used_in_silence(tiny_recipe: dict[str, Any], tmp_path: Path) -> None:
    """Adapters on other weights than they were trained on, texts that were not scored."""
    home = Path(shutil.copytree(tiny_recipe["base"], tmp_path / "base"))
    data = Path(shutil.copy(tiny_recipe["data"]["train"], tmp_path / "rows.jsonl"))
    values = {**tiny_recipe, "base": str(home), "data": {**tiny_recipe["data"], "train": str(data)}}
    run = Run(shrunk("upit-lora", values, expand={"num_experts": 2}), tmp_path / "run")
    run_stages(run)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "say.jsonl").write_text(json.dumps({"prompt": "copy a", "answer": "a"}))
    tasks, (adapter, *_) = read_tasks(tmp_path / "tasks"), run.checkpoint_folders

    def kept(base: Path | None) -> int:
        benchmark([Contender("adapter", adapter, base=base)], tasks, tmp_path / "out")
        return len(list((tmp_path / "out" / "cache").iterdir()))

    assert kept(home) == kept(None) == 1
    text = data.read_text()
    data.write_text(text.replace("copy", "echo"))
    with pytest.raises(UpcycleError, match="stage prepare was made from another data than is there now"):
        report(run.folder)
    data.write_text(text)
    compact, ours = make_export(run.folder, tmp_path / "own"), Path(shutil.copytree(home, tmp_path / "moved"))
    perturbed(home, home, 9, ffn_only=False)
    assert kept(home) == 2
    make_export(compact, tmp_path / "plain", fold=True, base=str(ours))  # of a mixture whose base has moved
    for folder in (compact, run.result):
        with pytest.raises(UpcycleError, match=r"base is not the base that .* was trained on \(their hashes differ\)"):
            make_export(folder, tmp_path / "other", fold=True, base=str(home))
        with pytest.raises(UpcycleError, match="is not the base that"):
            load_model(folder, torch.float32, base=home)
    for use in (
        lambda: report(run.folder),
        lambda: make_export(run.folder, tmp_path / "compact"),
        lambda: contenders([str(run.folder)], experts=False),
    ):
        with pytest.raises(UpcycleError, match="stage prepare was made from another base than is there now; put back"):
            use()
