"""Router modules over one frozen MoE: expert i as a dense model is the MoE with every token sent to expert i.

Legend: T tokens (B x S flattened), B rows of the batch, S tokens per row, H hidden, E experts, L layers.
A router returns (logits (T, E), weights (T, k), indices (T, k)), as transformers' own do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from upcycle.models.folders import router_modules, routers

DEAD = 0.01
"""An expert with less than this share of the mean load is called dead."""


class RowExperts:
    """Which expert each row of the batch goes to; shared by the routers of all layers, set before a forward."""

    def __init__(self) -> None:
        self.experts: Int[Tensor, " B"] = torch.zeros(1, dtype=torch.long)

    def of_tokens(self, num_tokens: int) -> Int[Tensor, " T"]:
        return self.experts.repeat_interleave(num_tokens // len(self.experts))


class ForcedRouter(nn.Module):
    """Every token to its row's expert with weight 1: the dense model of that expert."""

    def __init__(self, rows: RowExperts, num_experts: int) -> None:
        super().__init__()
        self.rows = rows
        self.num_experts = num_experts

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        experts = self.rows.of_tokens(len(flat))
        weights = flat.new_ones(len(flat), 1)
        return nn.functional.one_hot(experts, self.num_experts).to(flat), weights, experts[:, None]


class GatedRouter(nn.Module):
    """y = sigmoid(h . r_i) FFN_i(h), i the row's expert: UpIT's pre-optimisation of the routing vectors.

    `scores` keeps h . r_i of the last forward for the auxiliary loss.
    """

    def __init__(self, rows: RowExperts, vectors: Float[Tensor, "E H"]) -> None:
        super().__init__()
        self.rows = rows
        self.vectors = nn.Parameter(vectors.clone().float())
        self.scores: Float[Tensor, " T"] | None = None

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        experts = self.rows.of_tokens(len(flat))
        self.scores = (flat.float() * self.vectors[experts]).sum(dim=-1)
        gates = torch.sigmoid(self.scores)[:, None].to(flat.dtype)
        return nn.functional.one_hot(experts, len(self.vectors)).to(flat), gates, experts[:, None]


def parts(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of a MoE with the part that it belongs to: `router`, `experts`, or `shared` for all the rest."""
    gates = {id(router.weight) for router in router_modules(model)}
    for name, parameter in model.named_parameters():
        yield "router" if id(parameter) in gates else "experts" if ".experts." in name else "shared", parameter


@contextmanager
def swapped_routers(model: Any, make: Callable[[int], nn.Module]) -> Iterator[list[Any]]:
    """Replace the router of each layer by `make(layer)`; the model's own come back at the end."""
    places = routers(model)
    originals = router_modules(model)
    replacements = [make(layer) for layer in range(len(places))]
    try:
        for (parent, attribute), module in zip(places, replacements, strict=True):
            setattr(parent, attribute, module)
        yield replacements
    finally:
        for (parent, attribute), module in zip(places, originals, strict=True):
            setattr(parent, attribute, module)


class RouterRecorder:
    """Collects what the routers of all layers return in a forward; use as a context manager.

    Works on the router modules themselves, so it does not depend on the model passing router logits on.
    """

    def __init__(self, model: Any) -> None:
        self._gates = router_modules(model)
        self._handles: list[Any] = []
        self.logits: list[Float[Tensor, "T E"]] = []
        self.indices: list[Int[Tensor, "T k"]] = []

    def __enter__(self) -> "RouterRecorder":
        self._handles = [gate.register_forward_hook(self._record) for gate in self._gates]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forget the last forward."""
        self.logits, self.indices = [], []

    def _record(self, _module: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        self.logits.append(outputs[0])
        self.indices.append(outputs[2])


def random_routers(num_layers: int, num_experts: int, hidden: int, std: float, seed: int) -> list[Tensor]:
    """Gaussian routing vectors (E, H) per layer, the usual start of vanilla upcycling (std 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_experts, hidden, generator=generator) * std for _ in range(num_layers)]
