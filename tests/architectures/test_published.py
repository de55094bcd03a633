"""Published models, their flags as published and their sizes cut down: what `upcycle check` makes of each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from upcycle.architectures.check import check
from upcycle.errors import NoTwinError
from upcycle.experts.structure import offering_adapters, problem_of
from upcycle.weights.folders import read_config

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD: dict[str, Any] = {"head_dim": 16}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
FULL = {"layer_types": ["full_attention"] * 4}


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def llama3(factor: float, theta: float) -> dict[str, Any]:
    scaled = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return rope(theta, rope_type="llama3", factor=factor, **scaled)


def yarn(factor: float, original: int, theta: float, **more: Any) -> dict[str, Any]:
    return rope(theta, rope_type="yarn", factor=factor, original_max_position_embeddings=original, **more)


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    factors = {"long_factor": [1.5] * pairs, "short_factor": [1.0] * pairs}
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144}
    return {**rope(1e4, rope_type="longrope", **factors, **more), **lengths}


GRANITE = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625, **TIED}
GRANITE_4 = {
    **GRANITE,
    "logits_scaling": 10.0,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 96,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_expand": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
QWEN3_5 = {
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GEMMA_4 = {"global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "layer_types": MIXED}
NEMOTRON_H = {
    "hybrid_override_pattern": "M-M*-",
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 16,
}
FALCON_H1 = {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}
OLMO_3 = {
    "rope_parameters": {
        "sliding_attention": rope(5e5)["rope_parameters"],
        "full_attention": yarn(8.0, 8192, 5e5, beta_fast=32, beta_slow=1)["rope_parameters"],
    }
}
BETA = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
QWEN2 = {"use_sliding_window": False, "max_window_layers": 28}
HALF = {"partial_rotary_factor": 0.5}

PUBLISHED: list[tuple[str, str, dict[str, Any], str]] = [
    ("Llama-3.2-1B", "llama", {**HEAD, **TIED, **llama3(32.0, 5e5)}, "mixtral"),
    ("Llama-3.1-8B", "llama", llama3(8.0, 5e5), "mixtral"),
    ("SmolLM2-1.7B", "llama", {**TIED, **rope(1.3e5)}, "mixtral"),
    ("SmolLM3-3B", "smollm3", {**TIED, **FULL, **rope(5e6), "no_rope_layers": [1, 1, 1, 0]}, "granitemoe_swa"),
    ("Qwen2.5-7B", "qwen2", {**QWEN2, "sliding_window": 131072, **rope(1e6)}, "qwen2_moe"),
    ("Qwen3-8B", "qwen3", {**HEAD, "sliding_window": None, "max_window_layers": 36, **rope(1e6)}, "qwen3_moe"),
    ("Qwen3-4B-2507", "qwen3", {**HEAD, **TIED, **rope(5e6), "max_position_embeddings": 262144}, "qwen3_moe"),
    ("Qwen3.5-4B text", "qwen3_5_text", {**HEAD, **TIED, **QWEN3_5}, "qwen3_5_moe_text"),
    ("OLMo-2-7B", "olmo2", {**rope(5e5), "rms_norm_eps": 1e-6}, "flex_olmo"),
    ("OLMo-3-7B", "olmo3", {"sliding_window": 4096, "layer_types": MIXED, **OLMO_3}, "lora"),
    ("Mistral-7B-v0.3", "mistral", {"sliding_window": None, **rope(1e6)}, "mixtral"),
    ("Mistral-Nemo-12B", "mistral", {**HEAD, "sliding_window": None, **rope(1e6)}, "mixtral"),
    ("Ministral-8B-2410", "mistral", {**HEAD, "sliding_window": 32768, **rope(1e8)}, "mixtral"),
    ("Ministral-3-8B text", "ministral3", {**HEAD, **yarn(16.0, 16384, 1e6, **BETA)}, "lora"),
    ("Phi-4 14B", "phi3", {**rope(2.5e5, partial_rotary_factor=1.0), "sliding_window": None}, "mixtral"),
    ("Phi-3.5-mini", "phi3", longrope(8, partial_rotary_factor=1.0), "mixtral"),
    ("Phi-4-mini", "phi3", {**TIED, **longrope(6, partial_rotary_factor=0.75)}, "glm4_moe"),
    ("Granite-3.3-8B", "granite", {**GRANITE, "logits_scaling": 16.0}, "granitemoe"),
    (
        "Granite-4.0-micro",
        "granitemoehybrid",
        {**GRANITE_4, "position_embedding_type": "rope", "layer_types": ["attention"] * 4},
        "granitemoe",
    ),
    (
        "Granite-4.0-h-micro",
        "granitemoehybrid",
        {**GRANITE_4, "position_embedding_type": "nope", "layer_types": ["mamba", "mamba", "attention", "mamba"]},
        "granitemoehybrid",
    ),
    ("granite_swa", "granite_swa", {"sliding_window": 8}, "granitemoe_swa"),
    ("Gemma-1 2B", "gemma", {"head_dim": 32}, "granitemoe"),
    ("Gemma-2-2B", "gemma2", HEAD, "lora"),
    ("Gemma-3-1B", "gemma3_text", HEAD, "beam"),
    ("Gemma-4 31B text", "gemma4_text", {**HEAD, **GEMMA_4}, "gemma4_text"),
    ("GLM-4-9B-chat", "glm", {**HEAD, "attention_bias": True, **rope(1e4, **HALF)}, "glm4_moe"),
    ("GLM-4-9B-0414", "glm4", {**HEAD, "attention_bias": True, **rope(1e4, **HALF)}, "lora"),
    ("ERNIE-4.5-0.3B", "ernie4_5", {**HEAD, **TIED, **rope(5e5), "use_bias": False}, "ernie4_5_moe"),
    (
        "Hunyuan-7B-Instruct",
        "hunyuan_v1_dense",
        {**HEAD, **rope(1e4, rope_type="dynamic", alpha=1000.0, factor=1.0)},
        "hunyuan_v1_moe",
    ),
    ("EXAONE-4.0-32B", "exaone4", {"sliding_window": 4096, "layer_types": MIXED, **llama3(16.0, 1e6)}, "lora"),
    ("EXAONE-4.0-1.2B", "exaone4", {**HEAD, **TIED, **FULL, "sliding_window": None, **llama3(16.0, 1e6)}, "lora"),
    (
        "Seed-OSS-36B",
        "seed_oss",
        {**HEAD, "attention_bias": True, "attention_dropout": 0.1, "residual_dropout": 0.1, **rope(1e7)},
        "qwen2_moe",
    ),
    ("Command-R", "cohere", {"use_qk_norm": False}, "cohere2_moe"),
    ("Command-R7B", "cohere2", {**HEAD, "sliding_window": 4096, "layer_types": MIXED}, "cohere2_moe"),
    ("Nemotron-Mini-4B", "nemotron", HALF, "lora"),
    ("Nemotron-Nano-9B-v2", "nemotron_h", {**HEAD, **NEMOTRON_H, "num_hidden_layers": 5}, "nemotron_h"),
    ("Falcon3-7B", "llama", {**HEAD, **rope(1000042.0)}, "mixtral"),
    ("Falcon-H1", "falcon_h1", FALCON_H1, "refused"),
    ("StarCoder2-7B", "starcoder2", {"use_bias": True, "sliding_window": 4096}, "lora"),
    (
        "LFM2-1.2B",
        "lfm2",
        {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_multiple_of": 32},
        "lfm2_moe",
    ),
    ("Apertus-8B", "apertus", {}, "lora"),
    ("AFM-4.5B", "arcee", {**yarn(20.0, 4096, 1e4, mscale=1.0, beta_slow=1.0)}, "mixtral"),
    ("Helium-1-2B", "helium", HEAD, "mixtral"),
    ("InternLM3-8B", "internlm3", HEAD, "mixtral"),
    ("MiniCPM3-4B", "minicpm3", LATENT, "deepseek_v3"),
    ("MiniCPM4, as a Llama", "llama", {}, "mixtral"),
    ("Youtu-LLM-2B", "youtu", {**LATENT, "pad_token_id": None}, "deepseek_v3"),
    ("CWM-32B", "cwm", {**HEAD, "sliding_window": 8192}, "granitemoe_swa"),
    ("HyperCLOVAX-Think-14B", "hyperclovax", {}, "lora"),
    ("Jais-2", "jais2", {}, "lora"),
    ("OLMo-Hybrid-7B", "olmo_hybrid", {}, "lora"),
    ("StableLM-2-1.6B", "stablelm", {"use_qkv_bias": True}, "lora"),
    ("DeepSeek-R1-Distill-Qwen-7B", "qwen2", {**QWEN2, "sliding_window": 4096, **rope(1e4)}, "qwen2_moe"),
]
"""(name, `model_type`, flags, the mixture's `model_type`; `lora`: adapters alone can be experts; or `refused`)."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("model_type", "flags", "expected"), [row[1:] for row in PUBLISHED], ids=[row[0] for row in PUBLISHED]
)
def test_a_published_model_becomes_a_mixture_or_is_refused_with_the_reason(
    model_type: str, flags: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **flags})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    assert outcome(tmp_path) == expected


def outcome(folder: Path) -> str:
    try:
        with offering_adapters():
            return check(str(folder), 4, 2, "source").family.moe.model_type
    except NoTwinError as error:
        works = problem_of(read_config(folder)) is None and "LoRA experts work on it" in str(error)
        return "lora" if works else "refused"


def test_most_of_them_become_one() -> None:
    assert sum(row[3] != "refused" for row in PUBLISHED) >= 52
