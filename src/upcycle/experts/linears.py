"""In which linear layers of a dense model's mlp the FFN weights lie: a row of data for each structure.

What is behind (merging, mixtures, their files) knows gate_proj, up_proj and down_proj alone, or the last two of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

FFN_WEIGHTS = ("gate_proj", "up_proj", "down_proj")
Shapes = dict[str, tuple[int, int]]
"""(outputs, inputs)."""


@dataclass(frozen=True)
class Structure:
    """Of an mlp that computes `formula`; its linear layers may have biases, its activation parameters."""

    linears: Mapping[str, tuple[str, ...]]
    """Each linear layer, and the FFN weights that are equal runs of its rows, in the order of FFN_WEIGHTS."""
    act: str
    """What the mlp calls its activation."""

    @property
    def weights(self) -> tuple[str, ...]:
        """The FFN weights that there are."""
        return tuple(weight for weights in self.linears.values() for weight in weights)

    @property
    def formula(self) -> str:
        gated = "act_fn(gate_proj(x)) * up_proj(x)" if "gate_proj" in self.weights else "act_fn(up_proj(x))"
        return f"down_proj({gated})"

    def shapes(self, hidden: int, channels: int) -> Shapes:
        """Of each linear layer."""
        *inner, outer = self.linears
        return {name: (len(self.linears[name]) * channels, hidden) for name in inner} | {outer: (hidden, channels)}

    def weight_shapes(self, hidden: int, channels: int) -> Shapes:
        """Of each FFN weight."""
        *inner, outer = self.weights
        return {**dict.fromkeys(inner, (channels, hidden)), outer: (hidden, channels)}

    def inner(self, ffn: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """gate_proj(x), if there is one, and up_proj(x)."""
        *inner, _ = self.linears.items()
        outputs = (ffn.get_submodule(name)(x).chunk(len(weights), dim=-1) for name, weights in inner)
        return tuple(part for parts in outputs for part in parts)

    def down(self, ffn: nn.Module, hidden: Tensor) -> Tensor:
        """down_proj(hidden)."""
        *_, outer = self.linears
        output: Tensor = ffn.get_submodule(outer)(hidden)
        return output

    def down_bias(self, ffn: nn.Module) -> Tensor | None:
        """Of down_proj."""
        *_, outer = self.linears
        bias: Tensor | None = getattr(ffn.get_submodule(outer), "bias", None)
        return bias

    def output(self, ffn: nn.Module, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`formula`."""
        first, *rest = self.inner(ffn, x)
        activated = act(first)
        return self.down(ffn, activated * rest[0] if rest else activated)


SEPARATE = Structure({weight: (weight,) for weight in FFN_WEIGHTS}, "act_fn")
FUSED = Structure({"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}, "activation_fn")
"""Phi-3, GLM, GLM-4."""
UNGATED = Structure({"up_proj": ("up_proj",), "down_proj": ("down_proj",)}, "act_fn")
"""Arcee, Nemotron, Jais 2, Apertus."""
CONVOLUTIONS = Structure({"c_fc": ("up_proj",), "c_proj": ("down_proj",)}, "act")
"""StarCoder2, with GPT-2's names."""
NUMBERED = Structure({"fc1": ("up_proj",), "fc2": ("down_proj",)}, "activation_fn")
"""Phi-1, Phi-2."""
STRUCTURES = (SEPARATE, FUSED, UNGATED, CONVOLUTIONS, NUMBERED)
"""One that has all that another has comes before it."""
LINEARS = {name: weights for structure in STRUCTURES for name, weights in structure.linears.items()}
"""Of all structures."""


def structure_of(ffn: object) -> Structure | None:
    """That of an mlp, by the names of what it has."""
    return next((found for found in STRUCTURES if all(hasattr(ffn, name) for name in found.linears)), None)


def weights_in(module: str) -> list[str]:
    """The names of the FFN weights in a linear layer `model.layers.0.mlp.gate_up_proj`, by rows."""
    parent, _, linear = module.rpartition(".")
    return [f"{parent}.{weight}" for weight in LINEARS.get(linear, (linear,))]
