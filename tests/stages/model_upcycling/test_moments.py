"""Adam's moments of preparation in the MoE: what was the same tensor goes on as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_dense
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import KINDS, load_for_training, load_model
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import parse_recipe
from upcycle.records.files import MOMENTS
from upcycle.settings import AssembleSettings, LoraSettings
from upcycle.stages.model_upcycling.moments import carried
from upcycle.training import moments, trainer
from upcycle.training.moments import NAMES
from upcycle.training.trainer import UpcyclingTrainer
from upcycle.weights.safetensors_io import ModelReader
from worlds import as_base, plan_of, shrunk

BEFORE_POSTTRAIN = ("prepare", "expand", "assemble", "route")


def prepared(
    name: str, tiny: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Run, dict[str, Any]]:
    """A run as far as its router, and the state of the dense model's optimizer at the end, by parameter."""
    states: dict[str, Any] = {}
    save = moments.save_moments

    def spied(model: Any, optimizer: Any, *rest: Any) -> None:
        for parameter_name, parameter in model.named_parameters():
            if parameter in optimizer.state:
                states[parameter_name] = {k: v.clone() for k, v in optimizer.state[parameter].items()}
        save(model, optimizer, *rest)

    monkeypatch.setattr(trainer, "save_moments", spied)
    run = Run(shrunk(name, tiny, posttrain={"optimizer_state": "carry"}, prepare={"epochs": 1.0}), folder)
    run_stages(run, BEFORE_POSTTRAIN)
    return run, states


def moments_of(run: Run, scratch: Path) -> dict[str, dict[str, torch.Tensor]]:
    model = load_for_training(run.routed_moe, run.base.folder, False, "none", run.recipe.devices)
    found = carried(
        run.kind, run.base, MOMENTS.of(run.folder), Path("checkpoint-7"), run.plan, run.recipe, model, scratch
    )
    return {name: dict(state) for name, state in found.items()}


@pytest.mark.parametrize("train", ["full", "ffn"])
def test_moments_lie_where_their_weights_lie(
    train: str, tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dense = prepared(
        "upit", {**tiny_recipe, "prepare": {**tiny_recipe["prepare"], "train": train}}, tmp_path / "run", monkeypatch
    )
    found = moments_of(run, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    m, k = len(run.plan.experts), 2
    for moment, scale in zip(NAMES, (1 / m, 1 / (m * k)), strict=True):
        for name, state in found.items():
            assert state["step"] == 7
            if ".experts." not in name:
                assert torch.equal(state[moment], dense[name][moment]), name
                continue
            ffn = {
                part: dense[f"{name.partition('.experts.')[0]}.{part}.weight"][moment]
                for part in ("gate_proj", "up_proj", "down_proj")
            }
            gate_up = torch.cat([ffn["gate_proj"], ffn["up_proj"]])
            of_one = gate_up if name.endswith("gate_up_proj") else ffn["down_proj"]
            torch.testing.assert_close(state[moment], scale * of_one.expand(m, -1, -1))
    names = {name for name, _ in load_model(run.routed_moe, torch.float32).named_parameters()}
    assert set(found) == {name for name in names if ".experts." in name or (train == "full" and ".gate." not in name)}


@pytest.mark.parametrize(
    ("dense", "changes", "fresh"),
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, {"sinks"}),  # which the architecture has and the dense model has not
        ("glm", {"head_dim": 16}, {"lm_head.weight", "model.embed_tokens.weight"}),  # one tensor there, two in the MoE
    ],
)
def test_what_was_no_tensor_of_its_own_begins_fresh(
    dense: str, changes: dict[str, Any], fresh: set[str], tmp_path: Path
) -> None:
    base = make_dense(tmp_path / "base", model_type=dense, **changes)
    made = tmp_path / "moments"
    made.mkdir()
    routers, settings = [torch.zeros(2, 32)] * 2, AssembleSettings(dtype="float32")
    # the model itself in the place of its moments
    KINDS["full"].assemble(as_base(base), [base] * 2, plan_of(2), settings, LoraSettings(), routers, made, moments=True)
    reader = ModelReader(made)
    empty = {name for name in reader.names() if not reader.elements(name).any()}
    idle = ("gate", "router", "shared_experts", "bias")  # routers, and what the architecture has and nothing changes
    assert {name for name in empty if not any(part in name for part in idle)} == {
        name for name in reader.names() if name.endswith(tuple(fresh))
    }


def test_adapters_carry_theirs(tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, dense = prepared("upit-lora", tiny_recipe, tmp_path / "run", monkeypatch)
    found = moments_of(run, tmp_path / "scratch")
    m = len(run.plan.experts)
    a = found["model.layers.0.mlp.experts.gate_proj.lora_A"]["exp_avg"]
    b = found["model.layers.0.mlp.experts.gate_proj.lora_B"]["exp_avg_sq"]
    name = "base_model.model.model.layers.0.mlp.gate_proj.lora_{}.default.weight"
    rank = run.recipe.lora.rank
    torch.testing.assert_close(a[:, :rank], dense[name.format("A")]["exp_avg"].expand(m, -1, -1) / m)
    torch.testing.assert_close(b[:, :rank], dense[name.format("B")]["exp_avg_sq"].T.expand(m, -1, -1) / (2 * m))
    assert not a[:, rank:].any()


def test_post_training_begins_with_them_and_a_resume_with_its_own(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(shrunk("upit", tiny_recipe, posttrain={"optimizer_state": "carry"}), tmp_path / "run")
    run_stages(run, BEFORE_POSTTRAIN)
    begun = []
    create, step = UpcyclingTrainer.create_optimizer, UpcyclingTrainer.training_step

    def spied(self: Any, model: Any = None) -> Any:
        optimizer = create(self, model)
        begun.append({state["step"].item() for state in optimizer.state.values()})
        return optimizer

    def broken(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == self.state.max_steps - 1:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(UpcyclingTrainer, "create_optimizer", spied)
    monkeypatch.setattr(UpcyclingTrainer, "training_step", broken)
    with pytest.raises(KeyboardInterrupt):
        run_stages(run, ("posttrain",))
    steps = float(run.checkpoints[-1].path.removeprefix("checkpoint-"))
    assert begun == [{steps}]
    monkeypatch.setattr(UpcyclingTrainer, "training_step", step)
    run_stages(run, ("posttrain",))
    assert begun[1:] == [set()]  # the Trainer puts the checkpoint's own state there
    assert not list((run.folder / "posttrain").rglob("moments"))
    assert not list(run.folder.rglob("*.bin"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prepare": {"checkpoints": ["a", "b"]}}, "no one training to carry it from"),
        ({"prepare": {"by_domain": True}}, "no one training to carry it from"),
        ({"expand": {"copies_of": "base"}}, "no one training to carry it from"),
        ({"assemble": {"shared": "base"}}, "the shared weights are not those"),
    ],
)
def test_where_there_is_nothing_to_carry_it_is_refused(
    changes: dict[str, Any], message: str, tiny_recipe: dict[str, Any]
) -> None:
    values = {**tiny_recipe, **{name: {**tiny_recipe.get(name, {}), **section} for name, section in changes.items()}}
    values["posttrain"] = {**values["posttrain"], "optimizer_state": "carry"}
    with pytest.raises(UpcycleError, match=message):
        parse_recipe(values, "test")
