"""Multimodal folders (images, video, sound): which of their tensors and fields are the text model's.

A wrapper's config.json has the text model's as a part, and its file has the text model's tensors under a prefix. Here
such a folder is its text model: `folders.read_config` gives that part and `safetensors_io.ModelReader` those tensors,
under the names that they have in a folder of the text model alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.reading import read_json
from upcycle.types import Config

TEXT_CONFIG = "text_config"
OF_THE_WHOLE = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id")
"""Fields that transformers takes from the wrapper, where it has them, rather than from its text part."""


@dataclass(frozen=True)
class Wrapper:
    """A kind of wrapper, in all the forms of its files that transformers reads."""

    model_type: str
    prefixes: tuple[str, ...]
    """Regular expressions of what stands for `model.`, in memory too."""
    heads: tuple[str, ...] = ("lm_head.",)
    """What stands for `lm_head.`."""
    text: str | None = None
    """Type of the text model, where its own type has no model with a head: one that is the same on text."""
    keeps: Mapping[str, str] = field(default_factory=dict)
    """Types of MoEs of text that can take the text model's place, and the type of the whole with each."""
    stacks: bool = False
    """Whether a layer's experts are one tensor, transposed: gate and up (E, H, 2 I), down (E, I, H)."""

    def text_name(self, name: str) -> str | None:
        """A tensor's name in the text model; None for a tensor that is no part of it."""
        for plain, found in (("model.", self.prefixes), ("lm_head.", map(re.escape, self.heads))):
            for pattern in found:
                if match := re.match(pattern, name):
                    return plain + name[match.end() :]
        return None

    def text_config(self, whole: Config) -> Config:
        """The text part of a wrapper's configuration, in which every field is written out."""
        text = {**whole[TEXT_CONFIG], **{name: whole[name] for name in OF_THE_WHOLE if whole.get(name) is not None}}
        if self.text is not None:
            text["model_type"] = self.text
            text["rope_parameters"] = _of_one_dimension(text["rope_parameters"])
        return text


def _of_one_dimension(rope: Config) -> Config:
    """Rotary positions without the axes of images: on text a token has the same position on each."""
    return {name: value for name, value in rope.items() if not name.startswith("mrope") and value != "mrope"}


_LLAVA = (r"language_model\.model\.", r"model\.language_model\.")
_LLAVA_HEADS = ("language_model.lm_head.", "lm_head.")
_INNER = (r"model\.language_model\.",)

WRAPPERS: Mapping[str, Wrapper] = {
    wrapper.model_type: wrapper
    for wrapper in (
        Wrapper("mistral3", _LLAVA, _LLAVA_HEADS, keeps={"mixtral": "mistral3", "qwen2_moe": "mistral3"}),
        Wrapper("gemma3", _LLAVA, _LLAVA_HEADS),
        Wrapper("gemma4", _INNER, keeps={"gemma4_text": "gemma4"}),
        Wrapper("qwen2_5_vl", (*_INNER, r"model\.(?!visual\.)"), text="qwen2"),
        Wrapper("qwen3_vl", _INNER, text="qwen3", keeps={"qwen3_moe": "qwen3_vl_moe"}),
        Wrapper("qwen3_vl_moe", _INNER, text="qwen3_moe", stacks=True),
        Wrapper("qwen3_5", _INNER, keeps={"qwen3_5_moe_text": "qwen3_5_moe"}),
        Wrapper("qwen3_5_moe", _INNER),
    )
}


def wrapper_of(config: Config, where: Path) -> Wrapper | None:
    """The row for a decoded config.json; None for a model of text alone.

    Raises:
        UpcycleError: a wrapper that has no row.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in WRAPPERS:
        return WRAPPERS[model_type]
    if TEXT_CONFIG not in config:
        return None
    raise UpcycleError(
        f"{where}: '{model_type}' is a multimodal model ({TEXT_CONFIG}), and the layout of its text model is known "
        f"only for {', '.join(WRAPPERS)}; give a folder with the text model itself"
    )


def wrapper_in(folder: Path) -> Wrapper | None:
    """That of a model folder; None also for one without config.json."""
    path = folder / "config.json"
    return wrapper_of(read_json(path), path) if path.is_file() else None
