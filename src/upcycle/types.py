"""Names for what other libraries define and are slow to import."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = object

__all__ = ["Config", "Model", "Tokenizer"]

Config = dict[str, Any]
"""A decoded config.json."""


def __getattr__(name: str) -> type:
    """At run time a model is any module of torch's, which is imported by who asks for it."""
    if name != "Model":
        raise AttributeError(f"module 'upcycle.types' has no attribute '{name}'")
    from torch.nn import Module

    return Module
