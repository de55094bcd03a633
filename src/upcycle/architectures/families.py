"""Dense families and the MoE architecture that each becomes.

A row is exact: with all experts equal to the dense FFN, the MoE gives the dense model's logits (`identity` compares
them for every real model; a test does for every row).
"""

from collections.abc import Iterable
from typing import Any

from upcycle.architectures.family import Family, Moe
from upcycle.architectures.layouts import MOE_LAYERS, channels, ffn_layers, head_dim
from upcycle.architectures.rewritten import REWRITTEN
from upcycle.architectures.rows import ROWS
from upcycle.errors import NoTwinError, UpcycleError
from upcycle.types import Config

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
    "full_attn_idxs",
    "embedding_initializer_range",
}
"""Fields that say nothing which others, that a row reads where they matter, do not say too."""
NOT_COMPUTED = {"use_cache", "initializer_range", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id"}
"""Fields that may differ between the checkpoints of a run without changing what their weights compute."""

FAMILIES = ROWS + REWRITTEN
MOES = {family.moe.model_type: family.moe for family in FAMILIES}
"""By `model_type`."""
EXPERTS_FIELDS = sorted({moe.experts_field for moe in MOES.values()})
ACTIVE_FIELDS = sorted({moe.active_field for moe in MOES.values()})

WRONG = {
    "olmo": "its norms have no weights, those of OLMoE and FlexOlmo have",
    "gemma2": "no MoE architecture caps the scores of attention as Gemma 2 does",
    "exaone4": "MoE architectures with norms only after attention and FFN do not normalise heads one by one",
    "glm4": "MoE architectures with norms before and after attention and FFN normalise queries and keys too",
    "apertus": "its FFN has no gate, and an activation with weights of its own",
    "starcoder2": "its FFN has no gate, and its norms have biases",
    "jais2": "its norms have biases, which no MoE architecture has that could be exact",
    "nemotron": "its norms have biases, which no MoE architecture has that could be exact",
    "stablelm": "its norms have biases, which no MoE architecture has that could be exact",
    "phi": "its layers compute attention and FFN side by side, with biases",
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
        UpcycleError: it is a mixture already, or there are rows, but none with layers that keep one FFN.
    """
    model_type = dense_config.get("model_type")
    _check_dense(dense_config, where)
    rows = [family for family in FAMILIES if family.dense == model_type]
    if not rows:
        raise _no_row(dense_config, where)
    if _keeps_ffns(dense_config) and not (rows := [row for row in rows if row.moe.partial != "no"]):
        able = ", ".join(sorted({family.dense for family in FAMILIES if family.moe.partial != "no"}))
        raise UpcycleError(
            f"{where}: assemble.layers: no mixture that a {model_type} model becomes can have layers without experts "
            f"(those of {able} can); set assemble.layers=all"
        )
    problems = {family: _misplaced(family, dense_config) or _problem(family, dense_config) for family in rows}
    exact = [family for family, problem in problems.items() if problem is None]
    if not exact:
        listed = "; ".join(f"as {family.moe.model_type}, {problem}" for family, problem in problems.items())
        message = f"{where}: this {model_type} model cannot become a mixture of experts exactly: {listed}"
        raise NoTwinError(message, listed, dense_config)
    return exact[0]


def _check_dense(config: Config, where: str) -> None:
    """Raises UpcycleError if a base is a mixture of experts itself."""
    model_type, text = config.get("model_type"), config.get("text_config")
    text = text if isinstance(text, dict) else config
    if count := expert_counts(text)[0]:
        field = next(name for name in EXPERTS_FIELDS if text.get(name) == count)
        raise UpcycleError(
            f"{where}: config.json says {field}={count}: {model_type} is a mixture of {count} experts already, but a "
            "base must be dense; upcycling a mixture to more experts (arXiv 2604.19835) is not implemented "
            "(docs/decisions/0005-moe-as-a-base.md); use a dense model (`upcycle families` lists them)"
        )


def _keeps_ffns(config: Config) -> bool:
    """Whether some layers keep one FFN."""
    return MOE_LAYERS in config and config[MOE_LAYERS] != ffn_layers(config)


def _misplaced(family: Family, config: Config) -> str | None:
    """What is wrong with the layers that keep one FFN."""
    if family.moe.partial != "first" or not _keeps_ffns(config):
        return None
    sparse, every = config[MOE_LAYERS], ffn_layers(config)
    if sparse == every[-len(sparse) :]:
        return None
    return f"only its first layers can keep one FFN, but assemble.layers comes to {sparse} of {every[0]} to {every[-1]}"


def moe_of(moe_config: Config) -> Moe:
    """The architecture of a MoE configuration.

    Raises:
        UpcycleError: not a MoE of a family here.
    """
    model_type = str(moe_config.get("model_type"))
    if model_type not in MOES:
        listed = ", ".join(sorted(MOES))
        raise UpcycleError(f"'{model_type}' is not a mixture of experts that Upcycle writes; known: {listed}")
    return MOES[model_type]


def expert_counts(config: Config) -> tuple[int, int]:
    """Experts of any MoE's (resolved) configuration, and those for a token; zeros for a dense one."""
    if "moe" not in config.get("layers_block_type", ["moe"]) or config.get("is_moe") is False:
        return 0, 0
    return _first(config, EXPERTS_FIELDS), _first(config, ACTIVE_FIELDS)


def _first(config: Config, names: Iterable[str]) -> int:
    """The first number that is not 0; a damaged file may have anything."""
    return next((number for name in names if isinstance(number := config.get(name), int) and number), 0)


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
    if copied.get("rope_parameters"):  # a row that has use for these says so
        copied["rope_parameters"] = _without(copied["rope_parameters"], "llama_4_scaling_beta", "partial_rotary_factor")
    fields = {**copied, **family.config(dense_config)}
    fields[family.moe.size_field] = channels(family.layout, dense_config) // granularity
    return {
        "architectures": [family.moe.architecture],
        "model_type": family.moe.model_type,
        **fields,
        family.moe.experts_field: num_experts,
        family.moe.active_field: num_experts_per_tok,
        "rope_theta": (fields.get("rope_parameters") or {}).get("rope_theta"),  # where older readers look, mistral.rs
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
    """What makes the row inexact: a condition, or a field that is neither read by the row nor at its default."""
    noted = _Noted(config)
    for condition in family.conditions:
        if (problem := condition(noted)) is not None:
            return problem
    family.config(noted)
    channels(family.layout, noted)
    for name, default in _declared(config).items():
        if name not in noted.read | INERT | set(family.idle) | set(COPIED) and config.get(name) != default:
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
        reason = "it is a multimodal model"
    listed = "`upcycle families` lists what has one"
    message = f"{where}: '{model_type}' has no exact mixture-of-experts twin here: {reason}; {listed}"
    return NoTwinError(message, reason, config)


def _without(values: Config, *names: str) -> Config:
    return {name: value for name, value in values.items() if name not in names}
