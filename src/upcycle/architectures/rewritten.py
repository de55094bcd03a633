"""The table of families whose weights are rewritten: the MoE architecture computes the same from other values.

`tests/architectures/test_families.py` compares the logits of every row.
"""

from collections.abc import Callable, Iterator
from math import sqrt

from upcycle.architectures.family import NO_BIAS, Family, Moe, only, plain_rope
from upcycle.architectures.fields import (
    OWN_HEAD,
    SPLIT_FFN,
    deepseek_v3,
    glm_moe,
    granite_moe_of_llama,
    mixtral,
    mlp_layer_types,
)
from upcycle.architectures.layouts import (
    FUSED,
    GEMMA4_LAYOUT,
    SEPARATE,
    SHARED_EXPERT_SIZE,
    Constant,
    DenseLayout,
    Shape,
    head_dim,
    shared_expert,
    with_constants,
)
from upcycle.architectures.moes import BEAM, DEEPSEEK_V3, GLM_MOE, GRANITE_MOE, MIXTRAL
from upcycle.architectures.moves import Region, Rewrite, Rule, SharedMove, changed
from upcycle.types import Config
from upcycle.weights.names import EMBEDDINGS, HEAD

Scale = Callable[[Config], float]
"""What a tensor is multiplied by."""


def _halves(config: Config) -> Rewrite:
    """A head's rows, which rotate in pairs 0-1, 2-3, ..., in the order in which one half rotates with the other."""
    dim = head_dim(config)
    rotated = int(dim * config["rope_parameters"].get("partial_rotary_factor", 1.0))
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, dim)]
    return Rewrite(lambda rows: rows.view(-1, dim, *rows.shape[1:])[:, order].view_as(rows), dim, permutes=True)


HALVES = tuple(changed(f"{part}_proj.{kind}", _halves) for part in "qk" for kind in ("weight", "bias"))
REORDERED = "the rows of queries and keys are reordered, for rotary positions by halves"

UNGATED = DenseLayout(SEPARATE.up, SEPARATE.up, SEPARATE.down)
"""Arcee's FFN squares what the ReLU passes: relu(Wx)^2 = relu(Wx) Wx, a gated FFN whose gate is its up projection."""


def _mixtral_of_arcee(dense: Config) -> Config:
    return {**mixtral(dense), "hidden_act": "relu"}


def _one_more(_: Config) -> Rewrite:
    """Gemma multiplies by 1 + w what it has normalised."""
    return Rewrite(lambda weight: weight + 1)


ONE_MORE = changed("norm.weight", _one_more)


def _granite_moe_of_gemma(dense: Config) -> Config:
    return {**granite_moe_of_llama(dense), "embedding_multiplier": sqrt(dense["hidden_size"])}


def _times(factor: float) -> Rewrite:
    return Rewrite(lambda weight: weight * factor)


def _with_a_head(embeddings: Scale, head: Scale) -> tuple[Rule, Rule]:
    """Embeddings and head by factors of their own; a tied model gets a head."""

    def moves(config: Config, name: str, shape: Shape) -> Iterator[SharedMove]:
        whole = Region(name, shape, 0, shape)
        yield SharedMove(whole, whole, _times(embeddings(config)))
        if config["tie_word_embeddings"]:
            yield SharedMove(whole, Region(HEAD, shape, 0, shape), _times(head(config)))

    return (EMBEDDINGS, moves), changed(HEAD, lambda config: _times(head(config)))


def _residual(config: Config) -> Rewrite:
    """MiniCPM3 multiplies by this what a layer adds."""
    return _times(config["scale_depth"] / sqrt(config["num_hidden_layers"]))


MINICPM3_MOVES = (
    *_with_a_head(
        lambda config: float(config["scale_emb"]), lambda config: config["dim_model_base"] / config["hidden_size"]
    ),
    *(changed(ending, _residual) for ending in ("o_proj.weight", "o_proj.bias", "down_proj.weight")),
)


DEPTH_SCALE = 4.0
"""Beam divides the residual stream by the square root of 1 plus the number of additions before; norms undo that but for
their epsilon, whose share this keeps as small as it was, for some 50 layers."""


def _one_more_times(factor: Scale) -> Callable[[Config], Rewrite]:
    return lambda config: Rewrite(lambda weight: (weight + 1) * factor(config))


def _query_scale(config: Config) -> float:
    """Beam divides by the square root of head_dim alone."""
    return sqrt(head_dim(config) / config["query_pre_attn_scalar"])


GEMMA3_MOVES = (
    *_with_a_head(lambda config: sqrt(config["hidden_size"]) * DEPTH_SCALE, lambda _: 1.0),
    changed("q_norm.weight", _one_more_times(_query_scale)),
    *(
        changed(f"post_{block}_layernorm.weight", _one_more_times(lambda _: DEPTH_SCALE))
        for block in ("attention", "feedforward")
    ),
    ONE_MORE,
    changed("o_proj.weight", lambda _: _times(2.0)),  # Beam's gate halves what comes here
)


def _beam(dense: Config) -> Config:
    copied = ("attention_bias", "layer_types", "sliding_window", "final_logit_softcapping")
    return {
        **{name: dense[name] for name in copied},
        "hidden_act": dense["hidden_activation"],
        "mlp_layer_types": mlp_layer_types(dense),
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
    }


FIRST_NORM = 2.0**-18
"""Gemma 4 normalises what its experts give twice: the weight of the first norm, which every dtype has.

So small, the second divides by hardly more than the root of its epsilon, and both are one norm: with d = FIRST_NORM^2 /
epsilon, about 1e-5, epsilon / (1 + d) is its epsilon, and the second's weight / sqrt(1 + 1 / d) its weight. A step of
training would be larger than this weight, so it stays."""


def _second_norm(config: Config) -> Rewrite:
    return _times(sqrt(1 + config["rms_norm_eps"] / FIRST_NORM**2))


def _twice(config: Config, name: str, shape: Shape) -> Iterator[SharedMove]:
    """The FFN's norm; that of the FFN of zeros beside the experts may be the same."""
    whole = Region(name, shape, 0, shape)
    yield SharedMove(whole, whole)
    other = name.replace("layernorm", "layernorm_2")
    yield SharedMove(whole, Region(other, shape, 0, shape))


GEMMA4 = Moe(
    "gemma4_text",
    "Gemma4ForCausalLM",
    with_constants(
        GEMMA4_LAYOUT,
        *shared_expert("mlp", SHARED_EXPERT_SIZE, "gate", "up"),
        Constant("post_feedforward_layernorm_1.weight", ("hidden",), 1.0),
        Constant("post_feedforward_layernorm_2.weight", ("hidden",), FIRST_NORM, trains=False),
        Constant("router.scale", ("hidden",), lambda dense: sqrt(dense["hidden_size"])),  # which it divides by
        Constant("router.per_expert_scale", ("experts",), 1.0),
    ),
    active_field="top_k_experts",
    routing="normed",
)
GEMMA4_MOVES = (
    ("pre_feedforward_layernorm.weight", _twice),
    changed("post_feedforward_layernorm.weight", _second_norm),
)
GEMMA4_FIELDS = (
    "hidden_activation",
    "attention_bias",
    "sliding_window",
    "layer_types",
    "per_layer_config",
    "final_logit_softcapping",
    "attention_k_eq_v",
)
GEMMA4_IDLE = ("num_experts", "top_k_experts", "moe_intermediate_size", "vocab_size_per_layer_input")


def _gemma4(dense: Config) -> Config:
    return {
        **{name: dense[name] for name in GEMMA4_FIELDS},
        "rope_parameters": dense["rope_parameters"],
        "intermediate_size": SHARED_EXPERT_SIZE,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": True,
    }


def _layers_for_themselves(config: Config) -> str | None:
    for field in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if config[field]:
            return f"{field}={config[field]}, so its layers cannot be compared on a copy with fewer (exact with 0)"
    return None


def _no_moe_block(config: Config) -> str | None:
    count = config["num_experts"]
    return f"it is a mixture of {count} experts already (exact without)" if config["enable_moe_block"] else None


_GEMMA4 = (_no_moe_block, _layers_for_themselves, only("use_double_wide_mlp", False))
_CAUSAL = only("use_bidirectional_attention", None, False)
_ARCEE = (*NO_BIAS, plain_rope, only("hidden_act", "relu2"))

REWRITTEN = (
    Family("glm", GLM_MOE, glm_moe, layout=FUSED, moves=(*HALVES, SPLIT_FFN, OWN_HEAD), note=REORDERED),
    Family("helium", MIXTRAL, mixtral, (*NO_BIAS, plain_rope), moves=HALVES, note=REORDERED),
    Family("arcee", MIXTRAL, _mixtral_of_arcee, _ARCEE, UNGATED, note="the up projection is the gate too"),
    Family(
        "gemma",
        GRANITE_MOE,
        _granite_moe_of_gemma,
        (plain_rope, _CAUSAL),
        moves=(ONE_MORE,),
        note="in bf16 Gemma rounds the square root of hidden_size that it multiplies embeddings with, the MoE does not",
    ),
    Family(
        "minicpm3",
        DEEPSEEK_V3,
        deepseek_v3,
        (only("mlp_bias", False), only("pretraining_tp", 1, None)),
        moves=MINICPM3_MOVES,
        idle=("qk_head_dim", "scale_emb", "scale_depth", "dim_model_base"),
        down=_residual,
        note="its scales go into the weights, so that embeddings and head are two tensors",
    ),
    Family(
        "gemma4_text",
        GEMMA4,
        _gemma4,
        _GEMMA4,
        moves=GEMMA4_MOVES,
        idle=GEMMA4_IDLE,
        note="the FFN beside the experts is zeros, and the router's z-loss has no effect; not in float16",
    ),
    Family(
        "gemma3_text",
        BEAM,
        _beam,
        moves=GEMMA3_MOVES,
        idle=("query_pre_attn_scalar", "_sliding_window_pattern"),
        note="norms and scales are rewritten, embeddings and head are two tensors; tokens whose embeddings are nearly "
        "zero (an untrained padding row) get other logits; of the programs that serve models "
        "only SGLang and transformers know Beam",
    ),
)
"""Dense families and the MoE architecture that each becomes, as exact as `rows.ROWS`."""
