"""Low-rank updates: inner products, merging apart and as products, against full matrices and PEFT."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from upcycle.experts.adapter_files import read_adapter
from upcycle.experts.kinds import load_model
from upcycle.merging.dare import dare
from upcycle.merging.lineage import Child
from upcycle.merging.low_rank import LowRank, inner, materialise_adapters, merge_adapters, truncated
from upcycle.weights.folders import read_config
from worlds import make_adapter

KEYS = [(7, 2, 0), (7, 2, 1)]


def update(rank: int, seed: int, outputs: int = 24, inputs: int = 16, scaling: float = 1.5) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
    return LowRank(a, b, scaling)


def test_inner_products_are_those_of_the_products() -> None:
    p = {"x": update(4, 1), "y": update(2, 2, scaling=0.5)}
    q = {"x": update(8, 3, scaling=3.0), "z": update(4, 4)}
    expected = (p["x"].product() * q["x"].product()).sum().item()
    assert inner(p, q) == pytest.approx(expected, rel=1e-5)
    assert inner(p, p) == pytest.approx(sum(v.product().square().sum().item() for v in p.values()), rel=1e-5)


def test_merging_apart_is_what_peft_does(base: Path, tmp_path: Path) -> None:
    folders = [make_adapter(base, tmp_path / str(seed), seed, use_rslora=seed == 2) for seed in (1, 2)]
    model = get_peft_model(load_model(base, torch.float32), LoraConfig(r=4, target_modules=["up_proj"]))
    for folder in folders:
        model.load_adapter(str(folder), folder.name)
    model.add_weighted_adapter(["1", "2"], [0.3, 0.7], "child", combination_type="linear")
    parents = [read_adapter(folder, read_config(base)) for folder in folders]
    child = merge_adapters(parents, (0.3, 0.7), "linear", 0.0, "apart", KEYS)
    for name, merged in child.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(merged.a, layer.lora_A["child"].weight.data)
        torch.testing.assert_close(merged.b, layer.lora_B["child"].weight.data)
        assert merged.scaling == layer.scaling["child"] == 1


def test_dare_drops_entries_of_a_and_b_each_with_its_own_mask() -> None:
    parents, weights = [{"w": update(4, 1)}, {"w": update(4, 2, scaling=0.5)}], (0.4, 0.6)
    child = merge_adapters(parents, weights, "dare", 0.5, "apart", KEYS)["w"]
    for side in ("a", "b"):
        expected = torch.zeros_like(getattr(child, side))
        for parent, weight, key in zip(parents, weights, KEYS, strict=True):
            values = getattr(parent["w"], side)
            thinned = dare(values.reshape(-1), 0.5, (*key, "w", side)).view(values.shape)
            expected += math.sqrt(weight * parent["w"].scaling) * thinned
        torch.testing.assert_close(getattr(child, side), expected)


@pytest.mark.parametrize(("how", "growth"), [("average", 1.0), ("product", 1.0), ("apart", 2.0)])
def test_equal_parents_give_an_equal_child_unless_merged_as_peft_does(how: str, growth: float) -> None:
    parent = {"w": update(4, 1)}
    child = merge_adapters([parent, parent], (0.5, 0.5), "linear", 0.0, how, KEYS)["w"]
    torch.testing.assert_close(child.product(), growth * parent["w"].product(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["average", "apart", "product"])
@pytest.mark.parametrize("merge", ["ties", "dare_ties", "slerp", "dare"])
def test_a_scaling_is_a_child_s_whatever_the_merge(how: str, merge: str) -> None:
    """The same update as alpha / r = 4, and with 4 in its factors."""
    parent = {"w": LowRank(update(4, 1).a, update(4, 1).b, 4.0)}
    same = {"w": LowRank(2 * update(4, 1).a, 2 * update(4, 1).b, 1.0)}
    child, other = (merge_adapters([one, one], (0.3, 0.7), merge, 0.0, how, KEYS)["w"] for one in (parent, same))
    torch.testing.assert_close(child.product(), other.product(), rtol=1e-4, atol=1e-4)
    if how == "average":
        torch.testing.assert_close(child.product(), parent["w"].product(), rtol=1e-4, atol=1e-4)


def test_a_product_that_fits_its_rank_is_merged_exactly() -> None:
    one, two = update(2, 1), update(4, 2)
    shared = LowRank(two.a[:2], two.b[:, :2], 0.5)  # its column and row spaces lie within those of `two`
    child = merge_adapters([{"w": shared}, {"w": two}], (0.5, 0.5), "linear", 0.0, "product", KEYS)["w"]
    assert child.rank == 4
    torch.testing.assert_close(child.product(), 0.5 * shared.product() + 0.5 * two.product(), rtol=1e-4, atol=1e-4)
    assert merge_adapters([{"w": one}, {"w": two}], (0.5, 0.5), "dare", 0.2, "product", KEYS)["w"].rank == 4


def test_the_cut_is_as_good_as_an_svd() -> None:
    parents = [update(8, seed, 96, 64, 1.0) for seed in (1, 2)]
    whole = dare((parents[0].product() + parents[1].product()).reshape(-1), 0.3, (1,)).view(96, 64)
    cut = truncated(whole, torch.cat([parent.b for parent in parents], dim=1), 8)
    u, values, v = torch.linalg.svd(whole, full_matrices=False)
    best = (whole - (u[:, :8] * values[:8]) @ v[:8]).norm()
    assert (whole - cut.product()).norm() <= 1.01 * best
    torch.testing.assert_close(cut.a.norm(dim=1), cut.b.norm(dim=0), rtol=1e-4, atol=1e-4)  # shared evenly


def test_a_lineage_is_followed_and_repeats_to_the_bit() -> None:
    sources = [{"w": update(4, 1)}, {"w": update(4, 2)}]
    children = [Child((0, 1), (0.3, 0.7)), Child((1, 2), (0.5, 0.5))]
    made = [materialise_adapters(sources, children, "dare", 0.2, "apart", 0) for _ in range(2)]
    assert all(torch.equal(x["w"].a, y["w"].a) for x, y in zip(*made, strict=True))
    alone = merge_adapters([sources[1], made[0][0]], (0.5, 0.5), "dare", 0.2, "apart", [(0, 3, 1), (0, 3, 2)])
    assert torch.equal(alone["w"].b, made[0][1]["w"].b)
