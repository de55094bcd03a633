"""Tiny wrappers of more than text, in the shapes that transformers writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import make_tokenizer
from upcycle.weights.safetensors_io import SINGLE

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 20000.0}
YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 32}
AXES = {**ROPE, "mrope_section": [2, 1, 1]}
EYE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
PIXTRAL = {**EYE, "model_type": "pixtral", "head_dim": 8, "image_size": 28, "patch_size": 14}
SIGLIP = {**EYE, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
QWEN_EYE = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
QWEN_EYE |= {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
QWEN3_EYE = {**QWEN_EYE, "num_position_embeddings": 16}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
KINDS_OF_LAYER = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
GEMMA4 = {**KINDS_OF_LAYER, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}

SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral3": ("mistral3", {"model_type": "mistral", "sliding_window": None, "rope_parameters": ROPE}, PIXTRAL),
    "mistral3 of ministral3": (
        "mistral3",
        {"model_type": "ministral3", "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
        PIXTRAL,
    ),
    "gemma3": ("gemma3", KINDS_OF_LAYER, SIGLIP),
    "gemma4": ("gemma4", GEMMA4, {**EYE, "num_key_value_heads": 2, "head_dim": 8}),
    "qwen2_5_vl": ("qwen2_5_vl", {"rope_parameters": AXES}, {**QWEN_EYE, "fullatt_block_indexes": [0]}),
    "qwen2_5_vl with yarn": (
        "qwen2_5_vl",
        {"rope_parameters": {**YARN, "mrope_section": [2, 1, 1]}},
        {**QWEN_EYE, "fullatt_block_indexes": [0]},
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {"rope_parameters": {**AXES, "mrope_interleaved": True}},
        {**QWEN3_EYE, "deepstack_visual_indexes": [0]},
    ),
    "qwen3_5": ("qwen3_5", {**LINEAR, **LINEAR_LAYERS}, QWEN3_EYE),
}
"""(type, its text model's settings, its vision model's)."""
IMAGE_TOKEN = 5


def make_wrapper(folder: Path, shape: str = "mistral3", tied: bool = False, seed: int = 0, **text: Any) -> Path:
    """A random wrapper in fp32; like `make_dense`, with norms and biases that are not at their start."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    model_type, settings, vision = SHAPES[shape]
    config = CONFIG_MAPPING[model_type](
        text_config={**TEXT, **settings, **text},
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=IMAGE_TOKEN,
        **({"audio_config": None} if model_type == "gemma4" else {}),
        **({"mm_tokens_per_image": 4} if model_type == "gemma3" else {}),
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def renamed(source: Path, folder: Path, rename: Callable[[str], str]) -> Path:
    """A copy whose tensors have other names."""
    shutil.copytree(source, folder)
    rewrite(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the tensors of a folder."""
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the config.json of a folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
