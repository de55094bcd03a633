"""Fine-grained experts: slices of FFNs that together are the FFN, in every family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import ONE_OF_EACH_MOE

from conftest import make_dense, perturbed
from upcycle.architectures.families import expert_counts
from upcycle.architectures.mapping import map_model
from upcycle.architectures.slices import Slicing
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import load_model
from upcycle.recipe import parse_recipe
from upcycle.weights.safetensors_io import ModelReader
from worlds import IDS, assemble, assert_experts_are, logits, plan_of


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose channels 8 divides into a multiple of 8."""
    return make_dense(tmp_path_factory.mktemp("wide"), intermediate_size=64)


@pytest.fixture(scope="module")
def tuned(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [perturbed(wide, tmp_path_factory.mktemp("tuned") / f"checkpoint-{i}", i) for i in (1, 2, 3)]


@pytest.mark.parametrize(("dense", "moe", "changes"), ONE_OF_EACH_MOE, ids=lambda v: v if isinstance(v, str) else "")
def test_the_first_moe_is_that_of_whole_ffns(dense: str, moe: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Different experts, top-2 of 3, and top-1, as transformers computes them."""
    source = make_dense(tmp_path / "dense", model_type=dense, intermediate_size=64, **changes)
    folders = [perturbed(source, tmp_path / f"c{i}", i) for i in (1, 2, 3)]
    for k in (1, 2):
        settings: dict[str, Any] = {"num_experts_per_tok": k, "router_std": 0.3}
        whole = assemble("ffn", source, folders, plan_of(3), tmp_path / f"whole-{k}", **settings)
        fine = assemble("ffn", source, folders, plan_of(3), tmp_path / f"fine-{k}", granularity=4, **settings)
        config = json.loads((fine / "config.json").read_text())
        assert config["model_type"] == moe
        assert expert_counts(config) == (12, 4 * k)
        model = load_model(fine, torch.float32)
        sizes = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n}
        weights = 2 if dense == "nemotron_h" else 3
        assert sum(sizes.values()) == 3 * weights * 64 * 32 * 2  # experts x weights x channels x hidden x layers
        torch.testing.assert_close(logits(fine), logits(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", ["contiguous", "strided", "random"])
@pytest.mark.parametrize("granularity", [2, 8])
def test_a_forced_expert_is_its_checkpoint(
    granularity: int, channels: str, wide: Path, tuned: list[Path], tmp_path: Path
) -> None:
    made = assemble("ffn", wide, tuned, plan_of(3), tmp_path / "moe", granularity=granularity, channels=channels)
    assert_experts_are(tuned, made)


def test_slices_are_the_channels_that_they_say(wide: Path, tuned: list[Path], tmp_path: Path) -> None:
    made = assemble("ffn", wide, tuned, plan_of(3), tmp_path / "moe", granularity=4, channels="strided")
    dense, moe = ModelReader(tuned[1]), ModelReader(made)
    up = dense.tensor("model.layers.1.mlp.up_proj.weight")
    down = dense.tensor("model.layers.1.mlp.down_proj.weight")
    for part in range(4):
        place = f"model.layers.1.block_sparse_moe.experts.{4 + part}"  # of the second expert
        assert torch.equal(moe.tensor(f"{place}.w3.weight"), up[part::4])
        assert torch.equal(moe.tensor(f"{place}.w2.weight"), 4 * down[:, part::4])


@pytest.mark.parametrize("channels", ["contiguous", "strided", "random"])
def test_pieces_of_rows_end_where_whole_weights_do(channels: str, wide: Path) -> None:
    mapping = map_model(wide, ModelReader(wide), 2, Slicing(4, channels, 7))
    for move in mapping.ffn[:3]:
        weight = torch.randn(move.dense.shape)
        rows, width = weight.shape
        state = {region.tensor: torch.zeros(region.full) for region in move.experts[1]}
        for first, count in ((0, 5), (5, 17), (22, rows - 22)):
            piece = weight[first : first + count].reshape(-1)
            for region, element, values in mapping.slicing.place(move, 1, first * width, piece):
                state[region.tensor].view(-1)[element : element + values.numel()] = values.reshape(-1)
        whole = mapping.slicing.whole(move, 1, lambda region, state=state: state[region.tensor])  # type: ignore[misc]
        assert torch.equal(whole, weight)


def test_noise_tells_slices_apart_and_none_leaves_them_equal() -> None:
    from upcycle.stages.router_initialization.route import sliced

    vectors = [torch.randn(3, 8)]
    (equal,), (noisy,) = sliced(vectors, 4, 0.0, 0), sliced(vectors, 4, 0.1, 0)
    assert torch.equal(equal.view(3, 4, 8), vectors[0][:, None].expand(3, 4, 8))
    assert (noisy - equal).std() == pytest.approx(0.1 * vectors[0].std().item(), rel=0.4)
    assert torch.equal(sliced(vectors, 4, 0.1, 0)[0], noisy)


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    source = make_dense(tmp_path / "dense", intermediate_size=96)
    with pytest.raises(UpcycleError, match=r"assemble\.granularity is 8, which does not divide the FFN's 96 channels"):
        map_model(source, ModelReader(source), 2, Slicing(8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"assemble": {"granularity": 3}}, r"assemble\.granularity: .*\(found 3\)"),
        ({"assemble": {"granularity": 2}, "prepare": {"train": "lora"}}, "adapters cannot be cut into slices"),
        ({"assemble": {"granularity": 2}, "posttrain": {"optimizer_state": "carry"}}, "does not fit slices"),
        ({"assemble": {"granularity": 8}, "expand": {"num_experts": 1024}}, "is more than 4096 experts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, tiny_recipe: dict[str, Any]
) -> None:
    values = {**tiny_recipe, **{name: {**tiny_recipe.get(name, {}), **section} for name, section in changes.items()}}
    with pytest.raises(UpcycleError, match=message):
        parse_recipe(values, "test")


def test_a_lineage_that_does_not_fit_the_model_is_refused(wide: Path, tuned: list[Path], tmp_path: Path) -> None:
    made = assemble("ffn", wide, tuned, plan_of(3), tmp_path / "moe", granularity=2)
    lineage = json.loads((made / "upcycle_plan.json").read_text())
    (made / "upcycle_plan.json").write_text(json.dumps({**lineage, "granularity": 4}))
    with pytest.raises(UpcycleError, match="granularity is 4, which does not divide the model's 6 experts"):
        load_model(made, torch.float32)


def test_one_expert_of_slices_has_a_router_with_a_gradient(wide: Path, tuned: list[Path], tmp_path: Path) -> None:
    """With top-1 of whole experts there is none: the one weight is always 1."""
    grads = {}
    for granularity in (1, 4):
        out = tmp_path / str(granularity)
        made = assemble(
            "ffn", wide, tuned, plan_of(3), out, num_experts_per_tok=1, granularity=granularity, router_std=0.3
        )
        model = load_model(made, torch.float32).train()
        model(IDS, labels=IDS).loss.backward()
        grads[granularity] = model.model.layers[0].mlp.gate.weight.grad.abs().max().item()
    assert grads[1] < 1e-7 < 1e-4 < grads[4]
