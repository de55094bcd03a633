"""Is the MoE the dense model where it must be? Logits of a cut-down copy with equal experts against the dense ones.

The names of tensors and fields do not tell: several architectures load without a complaint and compute something else
(windows, rotary positions, norms). So the comparison is made for every real model, on a copy that is small however
large the model is: its first layers (one of each kind), 64 FFN channels, 256 rows of the vocabulary, windows and
original positions shortened, so that the text is longer than any of them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from upcycle.architectures.layouts import MOE_LAYERS, DenseLayout, channels, ffn_layers, layer_of, resized
from upcycle.architectures.mapping import Mapping
from upcycle.architectures.moves import Region, Rewrite, ffn_regions, router_tensors
from upcycle.errors import UpcycleError
from upcycle.types import Config
from upcycle.weights.folders import load_state
from upcycle.weights.names import HEAD

CHANNELS, TOKENS, WINDOW, LENGTH = 64, 256, 8, 48
PER_LAYER = ("layer_types", "no_rope_layers", "layers_block_type")
"""Fields with a value for each layer."""
NEARLY_ZERO = 0.1
"""Share of the median size of an embedding. An epsilon beside its square weighs a hundred times as much there, which is
what lies between rounding and TOLERANCE."""
TOLERANCE = 1e-4
"""Of the largest logit: fp32 rounding is 1e-6, a lost field 1e-2 and more."""

Read = Callable[[Region], Tensor]
"""A region's values, in the region's shape."""


def check_identity(
    mapping: Mapping, dense: Read, moe: Read | None, expert: int, stored: torch.dtype = torch.float32
) -> float:
    """Compare the logits of the dense model with those of the MoE whose experts are all `expert`.

    Args:
        moe: the assembled MoE; None to make it here from the dense tensors.
        stored: its dtype, whose rounding is set aside.

    Returns:
        The largest difference over the largest logit.

    Raises:
        UpcycleError: it is more than TOLERANCE, or a tensor has no place in one of the models.
    """
    small = _cut_mapping(mapping)
    family, config, where = mapping.family, small.config, mapping.where
    dense_state: dict[str, Tensor] = {}
    moe_state = small.constants
    kept = [move for move in mapping.shared if move.dense.tensor in small.shapes]
    for move, cut in zip(kept, small.shared, strict=True):
        values = _finite(_corner(dense(move.dense), cut.dense.shape), move.dense, where)
        _put(dense_state, cut.dense, values)
        made = rewritten(values, move.rewrite)
        if moe is not None:
            made = _unrounded(_corner(moe(move.moe), cut.moe.shape), made, stored)
        _put(moe_state, cut.moe, made)
    for ffn, ffn_cut in zip(mapping.ffn, small.ffn, strict=False):  # the copy has the first layers
        values = _finite(_corner(dense(ffn.dense), ffn_cut.dense.shape), ffn.dense, where)
        _put(dense_state, ffn_cut.dense, values)
        made = rewritten(values, ffn.rewrite)
        if moe is not None:
            whole = mapping.slicing.whole(ffn, expert, moe)
            made = _unrounded(_corner(whole, ffn_cut.dense.shape), made, stored)
        for copy in range(2):
            for region, element, part in small.slicing.place(ffn_cut, copy, 0, made.reshape(-1)):
                assert element == 0  # all of it
                _put(moe_state, region, part)
    generator = torch.Generator().manual_seed(0)
    for name in router_tensors(family.moe.layout, config):
        vectors = 0.02 * torch.randn(2, config["hidden_size"], generator=generator)  # sigmoids must not vanish
        moe_state[name] = vectors.repeat_interleave(small.granularity, dim=0)
    tokens = _tokens(dense_state[small.family.layout.embeddings])
    ids = tokens[torch.randint(len(tokens), (1, LENGTH), generator=generator)]
    expected = _logits(config, dense_state, ids, f"{where} (dense)")
    found = _logits(small.moe_config(2, "float32"), moe_state, ids, f"{where} as {family.moe.model_type}")
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise UpcycleError(
            f"{where}: as {family.moe.model_type} with equal experts its logits differ from the dense model's by "
            f"{difference:.1e} of the largest (expected at most {TOLERANCE:.0e}), so the mapping is not exact for this "
            "model; please report its config.json"
        )
    return difference


def _tokens(embeddings: Tensor) -> Tensor:
    """Those that say something: behind an embedding that is nearly zero, as of padding, there is a norm's epsilon."""
    sizes = embeddings.float().square().mean(dim=1).sqrt()
    return (sizes >= NEARLY_ZERO * sizes.median()).nonzero().flatten()


def rewritten(values: Tensor, rewrite: Rewrite | None) -> Tensor:
    """As the MoE has them; what is computed is in fp32."""
    return values if rewrite is None else rewrite.apply(values.float())


def cut_down(config: Config, layout: DenseLayout) -> Config:
    """The configuration of the copy."""
    layers = _layers_of_every_kind(config)
    small = {
        **config,
        "num_hidden_layers": layers,
        "vocab_size": min(TOKENS, config["vocab_size"]),
        "pad_token_id": None,
        "bos_token_id": 0,  # CWM insists on a number
        "eos_token_id": None,
        **{name: config[name][:layers] for name in PER_LAYER if config.get(name)},
    }
    small = resized(layout, small, min(CHANNELS, channels(layout, config)))
    if MOE_LAYERS in config:
        small[MOE_LAYERS] = [layer for layer in config[MOE_LAYERS] if layer < layers]
    if config.get("sliding_window") and config["sliding_window"] < config["max_position_embeddings"]:
        small["sliding_window"] = min(WINDOW, config["sliding_window"])
    if config.get("per_layer_config"):  # by layer, of which JSON makes words
        small["per_layer_config"] = {n: of for n, of in config["per_layer_config"].items() if int(n) < layers}
    if "scale_depth" in config:  # MiniCPM3 divides it by the square root of the number of layers
        small["scale_depth"] = config["scale_depth"] * (layers / config["num_hidden_layers"]) ** 0.5
    return _shorten_positions(small)


def _shorten_positions(config: Config) -> Config:
    """Positions from which scaled rotary embeddings behave otherwise come within the text."""
    rope = dict(config.get("rope_parameters") or {})
    original = rope.get("original_max_position_embeddings")
    if original:
        ratio = config["max_position_embeddings"] / original
        rope["original_max_position_embeddings"] = 2 * WINDOW
        if "original_max_position_embeddings" in config:
            config["original_max_position_embeddings"] = 2 * WINDOW
        return {**config, "rope_parameters": rope, "max_position_embeddings": round(2 * WINDOW * ratio)}
    return {**config, "max_position_embeddings": 2 * WINDOW}


def _layers_of_every_kind(config: Config) -> int:
    fields = [config[name] for name in PER_LAYER if config.get(name)]
    if MOE_LAYERS in config:
        fields.append([layer in config[MOE_LAYERS] for layer in range(config["num_hidden_layers"])])
    kinds = list(zip(*fields, strict=True))
    firsts = [kinds.index(kind) + 1 for kind in set(kinds)]
    return int(min(config["num_hidden_layers"], max([2, *firsts])))


def _cut_mapping(mapping: Mapping) -> Mapping:
    """The copy's, with two experts."""
    config, layout = cut_down(mapping.config, mapping.family.layout), mapping.family.layout
    # of layers that keep one FFN
    vocabulary = (layout.embeddings, HEAD)
    ffns = {region.tensor: region.full for region in ffn_regions(layout, config, ffn_layers(config))}
    shapes = {
        name: ffns.get(name) or ((config["vocab_size"], *shape[1:]) if name in vocabulary else shape)
        for name, shape in mapping.shapes.items()
        if (layer_of(name) or 0) < config["num_hidden_layers"]
    }
    return replace(mapping, config=config, shapes=shapes, num_experts=2)


def _finite(values: Tensor, region: Region, where: Path) -> Tensor:
    if not values.isfinite().all():
        raise UpcycleError(f"{where}: {region.tensor} holds NaN or Inf, so this model is damaged; use another copy")
    return values


def _corner(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values[tuple(slice(n) for n in shape)].float()


def _unrounded(written: Tensor, made: Tensor, stored: torch.dtype) -> Tensor:
    """What was written, and in the place of values that are rounded rightly those before: 1 + w loses bits of w."""
    return torch.where(made.to(stored).float() == written, made, written)


def _put(state: dict[str, Tensor], region: Region, values: Tensor) -> None:
    tensor = state.setdefault(region.tensor, torch.zeros(region.full))
    tensor.view(-1)[region.element : region.element + region.count] = values.reshape(-1)


@torch.no_grad()
def _logits(config: Config, state: dict[str, Tensor], ids: Tensor, what: str) -> Tensor:
    try:
        logits: Tensor = load_state(config, state, what)(ids, return_dict=True).logits
    except UpcycleError:
        raise
    except Exception as error:  # a configuration that is not one surfaces as any kind
        raise UpcycleError(
            f"{what}: transformers cannot compute with this config.json: {type(error).__name__}: {error}"
        ) from error
    return logits
