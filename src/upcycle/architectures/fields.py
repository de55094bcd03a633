"""What config.json of a MoE says of a dense model, and what stands against it.

A function of a dense configuration gives the MoE's own fields, beside `families.COPIED` and the number of experts.
"""

from collections.abc import Iterator

from upcycle.architectures.family import NO_BIAS, one_kind_of_layer, only, plain_rope
from upcycle.architectures.layouts import (
    LFM2_DENSE,
    SHARED_EXPERT_SIZE,
    Shape,
    channels,
    head_dim,
    moe_layers,
)
from upcycle.architectures.moves import Region, Rule, SharedMove, copied, split
from upcycle.types import Config
from upcycle.weights.names import EMBEDDINGS, HEAD

WIDE = 1 << 20
"""A sliding window, in tokens, that no text reaches."""


def full_attention(config: Config) -> str | None:
    windows = config.get("sliding_window") is not None and "sliding_attention" in (config.get("layer_types") or ())
    return "some of its layers have a sliding window (exact with full attention in all)" if windows else None


def window_of_no_use(config: Config) -> str | None:
    window, longest = config.get("sliding_window"), config["max_position_embeddings"]
    if window is None or window >= longest:
        return None
    return f"sliding_window={window} would be lost (exact with null, or with max_position_embeddings={longest} or more)"


def rope_in_every_layer(config: Config) -> str | None:
    without = [i for i, rope in enumerate(config.get("no_rope_layers") or ()) if not rope]
    return f"layers {without[:3]} have no rotary positions (exact if no_rope_layers is all 1)" if without else None


def attention_alone(config: Config) -> str | None:
    if set(config["layer_types"]) != {"full_attention"}:
        return "some of its layers are mamba (exact if all are attention)"
    return only("position_embedding_type", "rope")(config)


def no_time_step_limit(config: Config) -> str | None:
    if config["time_step_limit"] is None:
        return "time_step_limit=null is not known (exact with [0, Infinity])"
    limit = tuple(config["time_step_limit"])
    if limit == (0.0, float("inf")):
        return None  # the default, which JSON cannot say
    return f"time_step_limit={list(limit)} would be lost (exact with [0, Infinity])"


def _has_ffn(config: Config) -> str | None:
    return None if "mlp" in config["layers_block_type"] else "none of its blocks is an FFN"


def _window(config: Config) -> int | None:
    """The window of all layers, None for full attention."""
    window: int | None = config.get("sliding_window")
    full = config.get("use_sliding_window") is False or set(config.get("layer_types") or ()) == {"full_attention"}
    return None if full else window


def mixtral(dense: Config) -> Config:
    return {"sliding_window": _window(dense), "router_jitter_noise": 0.0}


def _qwen_moe(dense: Config) -> Config:
    return {
        "norm_topk_prob": True,  # False is the default, and loses the equality
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(range(dense["num_hidden_layers"])) - set(moe_layers(dense))),
        "max_window_layers": dense.get("max_window_layers", dense["num_hidden_layers"]),  # mistral.rs insists on it
    }


def qwen2_moe(dense: Config) -> Config:
    window = dense.get("sliding_window")
    of_all = "full_attention" if window is None else "sliding_attention"
    kinds = dense.get("layer_types") or [of_all] * dense["num_hidden_layers"]
    return {
        **_qwen_moe(dense),
        "sliding_window": window,
        "layer_types": kinds,
        "use_sliding_window": "sliding_attention" in kinds,
        "qkv_bias": True,
        "shared_expert_intermediate_size": SHARED_EXPERT_SIZE,
    }


def qwen3_moe(dense: Config) -> Config:
    window = _window(dense)
    windows = {"sliding_window": window, "use_sliding_window": window is not None}
    return {**_qwen_moe(dense), **windows, "attention_bias": dense["attention_bias"]}


LINEAR_ATTENTION = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


def qwen3_5_moe(dense: Config) -> Config:
    copied = ("attention_bias", "layer_types", "rope_parameters", *LINEAR_ATTENTION)
    return {**{name: dense[name] for name in copied}, "shared_expert_intermediate_size": SHARED_EXPERT_SIZE}


def mellum(dense: Config) -> Config:
    rope = dense["rope_parameters"]
    return {
        "attention_bias": dense["attention_bias"],
        "layer_types": dense["layer_types"],
        "mlp_layer_types": mlp_layer_types(dense),
        "norm_topk_prob": True,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "sliding_window": dense["sliding_window"],
    }


def mlp_layer_types(dense: Config) -> list[str]:
    sparse = moe_layers(dense)
    return ["sparse" if layer in sparse else "dense" for layer in range(dense["num_hidden_layers"])]


def flex_olmo(dense: Config) -> Config:
    rope = dense["rope_parameters"]
    return {
        "rope_parameters": rope.get("full_attention", rope),  # OLMo3 has one entry per kind of layer
        "attention_bias": dense["attention_bias"],
        "norm_topk_prob": True,
    }


MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")


def granite_moe(dense: Config) -> Config:
    return {"attention_bias": dense["attention_bias"], **{name: dense[name] for name in MULTIPLIERS}}


def granite_moe_of_llama(dense: Config) -> Config:
    multipliers = dict.fromkeys(MULTIPLIERS, 1.0)
    multipliers["attention_multiplier"] = head_dim(dense) ** -0.5
    return {"attention_bias": dense.get("attention_bias", False), **multipliers}


def granite_moe_of_hyperclovax(dense: Config) -> Config:
    return {**granite_moe(dense), "logits_scaling": 1 / dense["logits_scaling"]}  # one multiplies, the other divides


def _windows_by_layer(dense: Config) -> Config:
    window, kinds = dense["sliding_window"], dense["layer_types"]
    if "sliding_attention" not in kinds:  # llama.cpp insists on a window
        window, kinds = max(WIDE, dense["max_position_embeddings"]), ["sliding_attention"] * len(kinds)
    return {
        "layer_rope_theta": [dense["rope_parameters"]["rope_theta"]] * dense["num_hidden_layers"],
        "layer_types": kinds,
        "sliding_window": window,
        "shared_intermediate_size": 0,
    }


def granite_moe_swa(dense: Config) -> Config:
    return {**granite_moe_of_llama(dense), **_windows_by_layer(dense)}


def granite_moe_swa_of_granite(dense: Config) -> Config:
    return {**granite_moe(dense), **_windows_by_layer(dense), "layer_rope_theta": dense["layer_rope_theta"]}


def granite_moe_swa_of_smollm3(dense: Config) -> Config:
    theta, rope = dense["rope_parameters"]["rope_theta"], dense["no_rope_layers"]
    return {
        **granite_moe_swa(dense),
        "layer_rope_theta": [theta if has else 0 for has in rope],  # 0: no rotary positions
        "no_rope_layers": rope,  # where llama.cpp's converter looks
    }


MAMBA = (
    "mamba_n_heads",
    "mamba_n_groups",
    "mamba_d_state",
    "mamba_d_head",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_chunk_size",
    "mamba_conv_bias",
    "mamba_proj_bias",
)


GRANITE_LAYERS = {"full_attention": "attention", "linear_attention": "mamba"}
"""What the kinds of layers are called on disk."""
GRANITE_EXPERTS = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")


def granite_moe_hybrid(dense: Config) -> Config:
    copied = ("position_embedding_type", "rope_parameters", *MAMBA)
    return {
        **granite_moe(dense),
        **{name: dense[name] for name in copied},
        "layer_types": [GRANITE_LAYERS[kind] for kind in dense["layer_types"]],
        "shared_intermediate_size": SHARED_EXPERT_SIZE,
    }


def cohere2_moe(dense: Config) -> Config:
    return {**_cohere_moe(dense), **{name: dense[name] for name in ("layer_types", "sliding_window")}}


def cohere2_moe_of_cohere(dense: Config) -> Config:
    kinds = ["sliding_attention"] * dense["num_hidden_layers"]  # only these have rotary positions
    return {**_cohere_moe(dense), "layer_types": kinds, "sliding_window": max(WIDE, dense["max_position_embeddings"])}


def _cohere_moe(dense: Config) -> Config:
    return {
        **{name: dense[name] for name in ("attention_bias", "layer_norm_eps", "logit_scale")},
        "mlp_layer_types": mlp_layer_types(dense),
        "prefix_dense_intermediate_size": dense["intermediate_size"],
        "rms_norm_eps": None,  # a number would make its norms those of Llama
        "num_shared_experts": 0,
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
    }


def ernie_moe(dense: Config) -> Config:
    start, end, interval = ernie_layers(dense) or (0, dense["num_hidden_layers"] - 1, 1)
    return {
        "use_bias": False,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": start,
        "moe_layer_end_index": end,
        "moe_layer_interval": interval,
        "moe_norm_min": 1e-12,
    }


def ernie_layers(config: Config) -> tuple[int, int, int] | None:
    """ERNIE's first and last sparse layer and their distance, of which every layer number plus 1 is a multiple."""
    layers = moe_layers(config)
    interval = layers[1] - layers[0] if len(layers) > 1 else 1
    regular = layers == list(range(layers[0], layers[-1] + 1, interval)) and (layers[0] + 1) % interval == 0
    return (layers[0], layers[-1], interval) if regular else None


def regular_layers(config: Config) -> str | None:
    if ernie_layers(config) is None:
        return (
            f"its layers with experts are {moe_layers(config)}, but they must be equally far from each other, each of "
            "them a multiple of that distance when counted from 1 (as assemble.layers={every: N} has them)"
        )
    return None


def _first_dense(dense: Config) -> int:
    """Layers before the first with experts."""
    return int(moe_layers(dense)[0])


def glm_moe(dense: Config) -> Config:
    return {
        **sigmoid_routing(dense),
        "attention_bias": dense.get("attention_bias", False),
        "rope_parameters": (rope := dense["rope_parameters"]),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),  # where older readers look
        "use_qk_norm": False,
        "num_mtp_layers": 0,
        "tie_word_embeddings": False,
    }


def sigmoid_routing(dense: Config) -> Config:
    """Sigmoids in the place of softmax, here without groups of experts or scale."""
    return {
        "n_shared_experts": 1,  # of zeros: readers insist on one
        "first_k_dense_replace": _first_dense(dense),
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    }


DEEPSEEK_ROUTING = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
"""What transformers takes for granted of DeepSeek-V3, and others read from its config.json."""
MLA = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim")


def deepseek_v3(dense: Config) -> Config:
    return {
        **sigmoid_routing(dense),
        **{name: dense[name] for name in (*MLA, "attention_bias")},
        "rope_interleave": dense.get("rope_interleave", False),
        "tie_word_embeddings": False,
        **DEEPSEEK_ROUTING,
        "num_mtp_layers": 0,
    }


def lfm2_moe(dense: Config) -> Config:
    return {
        **{name: dense[name] for name in ("norm_eps", "conv_bias", "conv_L_cache", "layer_types")},
        "num_dense_layers": _first_dense(dense),
        "intermediate_size": channels(LFM2_DENSE, dense),
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "use_expert_bias": True,
    }


def hunyuan_moe(dense: Config) -> Config:
    return {
        "attention_bias": dense["attention_bias"],
        "rope_parameters": dense["rope_parameters"],
        "eod_token_id": dense["eod_token_id"],
    }


NEMOTRON_FIELDS = (
    "attention_bias",
    "mlp_hidden_act",
    "ssm_state_size",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_hidden_act",
    "n_groups",
    "conv_kernel",
    "expand",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "use_conv_bias",
    "chunk_size",
    "mamba_proj_bias",
    "use_bias",
    "layer_norm_epsilon",
    "residual_in_fp32",
    "sliding_window",
)


NEMOTRON_IDLE = (
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_overlap",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "mtp_layers_block_type",
    "num_logits_to_keep",
    "use_mamba_kernels",
    "mamba_ssm_cache_dtype",
    "rescale_prenorm_residual",
)


def nemotron_h(dense: Config) -> Config:
    sparse = set(moe_layers(dense))
    blocks = ["moe" if layer in sparse else block for layer, block in enumerate(dense["layers_block_type"])]
    routing = sigmoid_routing(dense)
    del routing["first_k_dense_replace"]
    return {
        **{name: dense[name] for name in NEMOTRON_FIELDS},
        **routing,
        "layers_block_type": blocks,
        "moe_shared_expert_intermediate_size": SHARED_EXPERT_SIZE,
        "moe_latent_size": None,
        "mlp_bias": False,
    }


def _qkv(config: Config) -> dict[str, int]:
    keys = config["num_key_value_heads"] * head_dim(config)
    return {
        "q_proj.weight": config["num_attention_heads"] * head_dim(config),
        "k_proj.weight": keys,
        "v_proj.weight": keys,
    }


def _gate_and_up(config: Config) -> dict[str, int]:
    return dict.fromkeys(("gate_proj.weight", "up_proj.weight"), int(config["intermediate_size"]))


def _own_head(config: Config, name: str, shape: Shape) -> Iterator[SharedMove]:
    """Embeddings, and a head of its own for a tied model: vLLM does not tie it in these architectures."""
    yield from copied(config, name, shape)
    if config["tie_word_embeddings"]:
        yield SharedMove(Region(name, shape, 0, shape), Region(HEAD, shape, 0, shape))


OWN_HEAD: Rule = (EMBEDDINGS, _own_head)
SPLIT_FFN = split("gate_up_proj.weight", _gate_and_up)
"""In layers that keep one."""
SPLIT = (split("qkv_proj.weight", _qkv), SPLIT_FFN)
"""Fused tensors."""

LLAMA = (plain_rope, only("mlp_bias", False, None), only("pretraining_tp", 1, None))
SEED_OSS = (
    *LLAMA,
    only("attention_bias", True, False),
    only("attention_out_bias", False),
    only("residual_dropout", 0.0, 0.1),  # of training alone, and 0.1 is what the published ones say
)
SMOLLM3 = (*NO_BIAS, plain_rope, rope_in_every_layer, one_kind_of_layer)
NEMOTRON = (
    _has_ffn,
    no_time_step_limit,
    only("mlp_bias", False),
    only("use_bias", False),
    only("moe_latent_size", None),
    only("hidden_dropout", 0.0),
    only("num_nextn_predict_layers", 0),
)
