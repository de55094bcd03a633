"""Balance without a loss: a bias on the choice of experts that follows their load (Wang et al. 2024, arXiv 2408.15664).

Legend: E experts, L layers.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from upcycle.records.files import ROUTER_BIAS
from upcycle.routing.routers import logits_of, num_slices, router_modules, scores_of, weights_of
from upcycle.types import Model

DECAY_FROM = 0.75
"""Share of the steps after which the bias fades: at the last step it is 0, as no MoE here can store it."""


class LossFreeBias:
    """A bias b per layer and expert: the top k are chosen by p_i + b_i, weighted as the model itself weighs them.

    p_i is the router's own score: the softmax of the logits, or their sigmoid.

    After each step b_i grows by `rate` if expert i had less than the mean load and falls by it if it had more. Hardly a
    MoE here has a place for it (ERNIE's alone), so it fades out linearly over the last quarter of the
    training: the model that is saved at the end computes what was trained last. Use as a context manager around the
    training.
    """

    def __init__(self, model: Model, rate: float) -> None:
        self._model, self._gates = model, router_modules(model)
        self._rate = rate
        self._handles: list[RemovableHandle] = []
        self.bias: Float[Tensor, "L E"] = torch.zeros(len(self._gates), num_slices(model), device=model.device)
        self.strength = 1.0
        self._load = torch.zeros_like(self.bias)

    def __enter__(self) -> "LossFreeBias":
        self._handles = [
            gate.register_forward_hook(lambda _m, _i, outputs, layer=layer: self._choose(layer, *outputs))
            for layer, gate in enumerate(self._gates)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def add(self, counts: Float[Tensor, "L E"]) -> None:
        """Add the slots that each expert got in one forward pass of all processes."""
        self._load += counts

    def step(self, progress: float) -> None:
        """After an optimizer step, `progress` being the share of the training that is done."""
        self.bias += self._rate * torch.sign(self._load.mean(dim=1, keepdim=True) - self._load)
        self._load.zero_()
        self.strength = min(1.0, max(0.0, 1 - progress) / (1 - DECAY_FROM))

    def save(self, folder: Path) -> None:
        """For a resume; the model itself does not carry it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"bias": self.bias.cpu(), "strength": torch.tensor(self.strength)}, ROUTER_BIAS.of(folder))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        values = load_file(ROUTER_BIAS.of(folder))
        self.bias.copy_(values["bias"])
        self.strength = values["strength"].item()

    def _choose(self, layer: int, logits: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate = self._gates[layer]
        scores = scores_of(self._model, logits_of(gate, logits))
        chosen = (scores + self.strength * self.bias[layer]).topk(indices.shape[1], dim=-1).indices
        return logits, weights_of(gate, scores, chosen).to(weights.dtype), chosen
