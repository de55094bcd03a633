"""Dense families and the MoE architecture that each becomes, as rows of a table.

A row is exact: with all experts equal to the dense FFN, the MoE gives the dense model's logits (`identity` compares
them for every real model; a test does for every row). Where the tensors lie is `layouts`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from upcycle.architectures.layouts import (
    FUSED,
    GRANITE_LAYOUT,
    GRANITE_SWA_LAYOUT,
    MIXTRAL_LAYOUT,
    MOE_LAYERS,
    QWEN_LAYOUT,
    SEPARATE,
    SHARED_EXPERT_SIZE,
    DenseLayout,
    MoeLayout,
    head_dim,
    moe_layers,
)
from upcycle.errors import NoTwinError, UpcycleError
from upcycle.types import Config

Rule = Callable[[Config], str | None]
"""None where the mapping is exact; otherwise what stands against it, and what would work."""


@dataclass(frozen=True)
class Moe:
    """A MoE architecture."""

    model_type: str
    architecture: str
    """Class that loads it."""
    layout: MoeLayout
    experts_field: str = "num_experts"
    """What its config.json calls the number of experts."""
    size_field: str = "moe_intermediate_size"
    """What it calls an expert's channels."""
    active_field: str = "num_experts_per_tok"
    """What it calls the number of experts for a token."""
    partial: bool = False
    """Whether some layers can keep one FFN."""


@dataclass(frozen=True)
class Family:
    """How a dense architecture maps onto a MoE one."""

    dense: str
    """`model_type` of the dense configuration."""
    moe: Moe
    config: Callable[[Config], Config]
    """The MoE's own fields for a dense configuration, beside COPIED and the number of experts."""
    rules: tuple[Rule, ...] = ()
    layout: DenseLayout = SEPARATE

    def __str__(self) -> str:
        return f"{self.dense} -> {self.moe.model_type}"


MIXTRAL = Moe("mixtral", "MixtralForCausalLM", MIXTRAL_LAYOUT, "num_local_experts", "intermediate_size")
QWEN2_MOE = Moe(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    replace(QWEN_LAYOUT, shared_expert="mlp.shared_expert", qkv_bias=True),
    partial=True,
)
QWEN3_MOE = Moe("qwen3_moe", "Qwen3MoeForCausalLM", QWEN_LAYOUT, partial=True)
FLEX_OLMO = Moe("flex_olmo", "FlexOlmoForCausalLM", QWEN_LAYOUT, size_field="intermediate_size")
GRANITE_MOE = Moe("granitemoe", "GraniteMoeForCausalLM", GRANITE_LAYOUT, "num_local_experts", "intermediate_size")
GRANITE_MOE_SWA = Moe(
    "granitemoe_swa", "GraniteMoeSWAForCausalLM", GRANITE_SWA_LAYOUT, "num_local_experts", "intermediate_size"
)
COHERE2_MOE = Moe("cohere2_moe", "Cohere2MoeForCausalLM", QWEN_LAYOUT, size_field="intermediate_size")
ERNIE_MOE = Moe(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    replace(QWEN_LAYOUT, selection_bias="mlp.moe_statics.e_score_correction_bias"),
    "moe_num_experts",
    active_field="moe_k",
)

COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "max_position_embeddings",
    "initializer_range",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
INERT = {
    "use_cache",
    "layer_types",
    "use_sliding_window",
    "max_window_layers",
    "no_rope_layer_interval",
    "original_max_position_embeddings",
}
"""Fields that say nothing which others, that a row reads where they matter, do not say too."""
NOT_COMPUTED = {"use_cache", "initializer_range", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"}
"""Fields that may differ between the checkpoints of a run without changing what their weights compute."""


def _only(field: str, *exact: Any) -> Rule:
    def check(config: Config) -> str | None:
        value = config.get(field, exact[0])
        return None if value in exact else f"{field}={value!r} would be lost (exact with {field}={exact[0]!r})"

    return check


def _plain_rope(config: Config) -> str | None:
    rope = config.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial_rotary_factor={rope['partial_rotary_factor']} would be lost (exact with 1.0)"
    if rope.get("llama_4_scaling_beta"):
        return f"llama_4_scaling_beta={rope['llama_4_scaling_beta']} would be lost (exact with 0)"
    return None


def _one_kind_of_layer(config: Config) -> str | None:
    kinds = sorted(set(config.get("layer_types") or ()))
    return f"its layers mix {' and '.join(kinds)} (exact if all are of one kind)" if len(kinds) > 1 else None


def _full_attention(config: Config) -> str | None:
    windows = config.get("sliding_window") is not None and "sliding_attention" in (config.get("layer_types") or ())
    return "some of its layers have a sliding window (exact with full attention in all)" if windows else None


def _rope_in_every_layer(config: Config) -> str | None:
    without = [i for i, rope in enumerate(config.get("no_rope_layers") or ()) if not rope]
    return f"layers {without[:3]} have no rotary positions (exact if no_rope_layers is all 1)" if without else None


def _window(config: Config) -> int | None:
    """The window of all layers, None for full attention."""
    window: int | None = config.get("sliding_window")
    full = config.get("use_sliding_window") is False or set(config.get("layer_types") or ()) == {"full_attention"}
    return None if full else window


def _mixtral(dense: Config) -> Config:
    return {"sliding_window": _window(dense), "router_jitter_noise": 0.0}


def _qwen_moe(dense: Config) -> Config:
    return {
        "norm_topk_prob": True,  # False is the default, and loses the equality
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(range(dense["num_hidden_layers"])) - set(moe_layers(dense))),
        "max_window_layers": dense.get("max_window_layers", dense["num_hidden_layers"]),  # mistral.rs insists on it
    }


def _qwen2_moe(dense: Config) -> Config:
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


def _qwen3_moe(dense: Config) -> Config:
    window = _window(dense)
    windows = {"sliding_window": window, "use_sliding_window": window is not None}
    return {**_qwen_moe(dense), **windows, "attention_bias": dense["attention_bias"]}


def _flex_olmo(dense: Config) -> Config:
    rope = dense["rope_parameters"]
    return {
        "rope_parameters": rope.get("full_attention", rope),  # OLMo3 has one entry per kind of layer
        "attention_bias": dense["attention_bias"],
        "norm_topk_prob": True,
    }


MULTIPLIERS = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")


def _granite_moe(dense: Config) -> Config:
    return {"attention_bias": dense["attention_bias"], **{name: dense[name] for name in MULTIPLIERS}}


def _granite_moe_of_llama(dense: Config) -> Config:
    multipliers = dict.fromkeys(MULTIPLIERS, 1.0)
    multipliers["attention_multiplier"] = head_dim(dense) ** -0.5
    return {"attention_bias": dense["attention_bias"], **multipliers}


def _granite_moe_swa(dense: Config) -> Config:
    theta, rope = dense["rope_parameters"]["rope_theta"], dense["no_rope_layers"]
    return {
        **_granite_moe_of_llama(dense),
        "layer_rope_theta": [theta if has else 0 for has in rope],  # 0: no rotary positions
        "no_rope_layers": rope,  # where llama.cpp's converter looks
        "layer_types": dense["layer_types"],
        "sliding_window": dense["sliding_window"] or dense["max_position_embeddings"],  # it insists on a number
        "shared_intermediate_size": 0,
    }


def _cohere2_moe(dense: Config) -> Config:
    return {
        **{name: dense[name] for name in ("attention_bias", "layer_norm_eps", "logit_scale", "sliding_window")},
        "layer_types": dense["layer_types"],
        "mlp_layer_types": ["sparse"] * dense["num_hidden_layers"],
        "rms_norm_eps": None,  # a number would make its norms those of Llama
        "num_shared_experts": 0,
        "expert_selection_fn": "softmax",
        "norm_topk_prob": True,
    }


def _ernie_moe(dense: Config) -> Config:
    return {
        "use_bias": False,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": dense["num_hidden_layers"] - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    }


NO_BIAS = (_only("attention_bias", False, None), _only("mlp_bias", False, None))
_LLAMA = (_plain_rope, _only("mlp_bias", False, None), _only("pretraining_tp", 1, None))
_SEED_OSS = (
    *_LLAMA,
    _only("attention_bias", True, False),
    _only("attention_out_bias", False),
    _only("residual_dropout", 0.0, 0.1),  # of training alone, and 0.1 is what the published ones say
)
_SMOLLM3 = (*NO_BIAS, _plain_rope, _rope_in_every_layer, _one_kind_of_layer)

FAMILIES = (
    Family("llama", MIXTRAL, _mixtral, (*NO_BIAS, *_LLAMA)),
    Family("llama", GRANITE_MOE, _granite_moe_of_llama, _LLAMA),
    Family("llama", QWEN2_MOE, _qwen2_moe, (*NO_BIAS, *_LLAMA)),
    Family("mistral", MIXTRAL, _mixtral, (_plain_rope,)),
    Family("mistral", QWEN2_MOE, _qwen2_moe, (_plain_rope,)),
    Family("ministral3", MIXTRAL, _mixtral, (_plain_rope,)),
    Family("ministral", MIXTRAL, _mixtral, (_plain_rope, _one_kind_of_layer)),
    Family("ministral", QWEN2_MOE, _qwen2_moe, (_plain_rope,)),
    Family("phi3", MIXTRAL, _mixtral, (_plain_rope,), FUSED),
    Family("smollm3", MIXTRAL, _mixtral, _SMOLLM3),
    Family("smollm3", GRANITE_MOE_SWA, _granite_moe_swa, (*NO_BIAS, _plain_rope)),
    Family("qwen2", QWEN2_MOE, _qwen2_moe, (_plain_rope,)),
    Family("qwen3", QWEN3_MOE, _qwen3_moe, (_plain_rope, _one_kind_of_layer)),
    Family("olmo2", FLEX_OLMO, _flex_olmo, (_plain_rope,)),
    Family("olmo3", FLEX_OLMO, _flex_olmo, (_full_attention,)),
    Family("internlm3", MIXTRAL, _mixtral, (*NO_BIAS, _plain_rope)),
    Family("seed_oss", QWEN2_MOE, _qwen2_moe, _SEED_OSS),
    Family("ernie4_5", ERNIE_MOE, _ernie_moe, (_plain_rope, _only("use_bias", False, None))),
    Family("cohere2", COHERE2_MOE, _cohere2_moe, (_plain_rope,)),
    Family("granite", GRANITE_MOE, _granite_moe, (_plain_rope, _only("mlp_bias", False))),
)
MOES = {family.moe.model_type: family.moe for family in FAMILIES}
"""By `model_type`."""

WRONG = {
    "olmo": "its norms have no weights, those of OLMoE and FlexOlmo have",
    "gemma": "no MoE architecture scales embeddings and adds 1 to the norms' weights as Gemma does",
    "gemma2": "no MoE architecture caps logits and has four norms per layer as Gemma 2 does",
    "gemma3_text": "no MoE architecture has Gemma 3's norms and its two kinds of rotary positions",
    "phi": "its layers compute attention and FFN side by side, with biases",
    "cohere": "no MoE architecture has its full attention with rotary positions beside the FFN (Cohere2 has a row)",
    "gpt2": "its FFN has no gate",
    "gpt_neox": "its FFN has no gate",
    "opt": "its FFN has no gate",
    "falcon": "its FFN has no gate",
}
"""Why a dense architecture has no row, where users ask for one."""


def family_of(dense_config: Config, where: str) -> Family:
    """The row for a (resolved) dense configuration; the first that is exact, where there are several.

    Where some layers only are to be sparse (`layouts.MOE_LAYERS`), rows whose MoE allows that alone count.

    Raises:
        NoTwinError: no row, or a field with which the mapping would not be exact.
        UpcycleError: there are rows, but none with layers that keep one FFN.
    """
    model_type = dense_config.get("model_type")
    rows = [family for family in FAMILIES if family.dense == model_type]
    if not rows:
        raise _no_row(dense_config, where)
    if MOE_LAYERS in dense_config and not (rows := [family for family in rows if family.moe.partial]):
        able = ", ".join(sorted({family.dense for family in FAMILIES if family.moe.partial}))
        raise UpcycleError(
            f"{where}: assemble.layers: no mixture that a {model_type} model becomes can have layers without experts "
            f"(those of {able} can); set assemble.layers=all"
        )
    problems = {family: _problem(family, dense_config) for family in rows}
    exact = [family for family, problem in problems.items() if problem is None]
    if not exact:
        listed = "; ".join(f"as {family.moe.model_type}, {problem}" for family, problem in problems.items())
        message = f"{where}: this {model_type} model cannot become a mixture of experts exactly: {listed}"
        raise NoTwinError(message, listed, dense_config)
    return exact[0]


def moe_of(moe_config: Config) -> Moe:
    """The architecture of a MoE configuration.

    Raises:
        UpcycleError: not a MoE of a family here.
    """
    model_type = str(moe_config.get("model_type"))
    if model_type not in MOES:
        listed = ", ".join(sorted(MOES))
        raise UpcycleError(f"'{model_type}' is not a mixture-of-experts model made here; known: {listed}")
    return MOES[model_type]


def expert_counts(config: Config) -> tuple[int, int]:
    """Experts of any MoE's (resolved) configuration, and those for a token; zeros for a dense one."""
    total = {moe.experts_field for moe in MOES.values()}
    active = {moe.active_field for moe in MOES.values()}
    return _first(config, total), _first(config, active)


def _first(config: Config, names: Iterable[str]) -> int:
    return next((int(config[name]) for name in sorted(names) if config.get(name)), 0)


def moe_config(
    family: Family,
    dense_config: Config,
    num_experts: int,
    num_experts_per_tok: int,
    dtype: str,
    granularity: int = 1,
) -> Config:
    """A config.json for the MoE that transformers and the programs that read its files agree on.

    Every field is written out: a MoE's defaults (eps, theta, window, activation) are not its dense twin's.

    Args:
        num_experts: as the MoE counts them, slices for G > 1.
        granularity: G, which divides the FFN's channels.
    """
    copied = {name: dense_config[name] for name in COPIED if name in dense_config}
    copied["head_dim"] = head_dim(dense_config)  # not all can do without
    copied["rope_parameters"] = _without(copied["rope_parameters"], "llama_4_scaling_beta", "partial_rotary_factor")
    fields = {**copied, **family.config(dense_config)}
    fields[family.moe.size_field] = dense_config["intermediate_size"] // granularity
    return {
        "architectures": [family.moe.architecture],
        "model_type": family.moe.model_type,
        **fields,
        family.moe.experts_field: num_experts,
        family.moe.active_field: num_experts_per_tok,
        "rope_theta": fields["rope_parameters"].get("rope_theta"),  # older readers, mistral.rs among them, look here
        "output_router_logits": False,
        "use_cache": True,
        "dtype": dtype,
    }


def computed_fields(config: Config) -> Config:
    """The fields that decide what a dense model computes from its weights: the same in all checkpoints of a run."""
    return {name: config.get(name) for name in ("model_type", *_declared(config)) if name not in NOT_COMPUTED}


class _Noted(dict[str, Any]):
    """A configuration that notes which fields were read."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def _problem(family: Family, config: Config) -> str | None:
    """What makes the row inexact: a rule, or a field that is neither read by the row nor at its default."""
    noted = _Noted(config)
    for rule in family.rules:
        if (problem := rule(noted)) is not None:
            return problem
    family.config(noted)
    for name, default in _declared(config).items():
        if name not in noted.read | INERT | set(COPIED) and config.get(name) != default:
            return f"{name}={config[name]!r} would be lost (exact with {default!r})"
    return None


def _declared(config: Config) -> Config:
    """The fields of the dense architecture, with their defaults."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    common = PretrainedConfig().to_dict()
    defaults = CONFIG_MAPPING[config["model_type"]]().to_dict()
    return {name: value for name, value in defaults.items() if name not in common}


def _no_row(config: Config, where: str) -> NoTwinError:
    model_type = config.get("model_type")
    reason = WRONG.get(str(model_type), "there is no row for it")
    if "text_config" in config:
        reason = "it is a model of more than text"
    supported = ", ".join(map(str, FAMILIES))
    message = f"{where}: '{model_type}' has no exact mixture-of-experts twin here: {reason}; supported: {supported}"
    return NoTwinError(message, reason, config)


def _without(values: Config, *names: str) -> Config:
    return {name: value for name, value in values.items() if name not in names}
