"""In which linear layers of a dense model's mlp the FFN weights lie: a row of data for each structure.

What is behind (merging, mixtures, their files) knows gate_proj, up_proj and down_proj alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

FFN_WEIGHTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Structure:
    """Of an mlp that computes down_proj(act(gate_proj(x)) * up_proj(x))."""

    linears: Mapping[str, tuple[str, ...]]
    """Each linear layer, and the FFN weights that are equal runs of its rows, in the order of FFN_WEIGHTS."""
    act: str
    """What the mlp calls its activation."""

    def shapes(self, hidden: int, channels: int) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of each linear layer."""
        *inner, outer = self.linears
        return {name: (len(self.linears[name]) * channels, hidden) for name in inner} | {outer: (hidden, channels)}

    def gate_and_up(self, ffn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """gate_proj(x) and up_proj(x)."""
        *inner, _ = self.linears.items()
        outputs = (ffn.get_submodule(name)(x).chunk(len(weights), dim=-1) for name, weights in inner)
        gate, up = (part for parts in outputs for part in parts)
        return gate, up


SEPARATE = Structure({weight: (weight,) for weight in FFN_WEIGHTS}, "act_fn")
FUSED = Structure({"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}, "activation_fn")
"""Phi-3, GLM, GLM-4."""
STRUCTURES = (SEPARATE, FUSED)
LINEARS = {**SEPARATE.linears, **FUSED.linears}
"""Of all structures."""


def structure_of(ffn: nn.Module) -> Structure | None:
    """That of an mlp, by the names of what it has."""
    return next((found for found in STRUCTURES if all(hasattr(ffn, name) for name in found.linears)), None)


def weights_in(module: str) -> list[str]:
    """The names of the FFN weights in a linear layer `model.layers.0.mlp.gate_up_proj`, by rows."""
    parent, _, linear = module.rpartition(".")
    return [f"{parent}.{weight}" for weight in LINEARS.get(linear, (linear,))]
