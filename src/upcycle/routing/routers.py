"""Router modules over one frozen MoE: expert i as a dense model is the MoE with every token sent to expert i.

Legend: T tokens (B x S flattened), B rows of the batch, S tokens per row, H hidden, E experts, L layers.
A router returns (logits (T, E), weights (T, k), indices (T, k)), as transformers' own do.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from upcycle.types import Model

CONSTANT = "e_score_correction_bias"
SIGMOID = frozenset({"glm4_moe", "deepseek_v3", "beam", "lfm2_moe", "nemotron_h"})
"""Model types whose routers take a sigmoid of each logit."""
Router = TypeVar("Router", bound=nn.Module)

ROUTER_NAMES = ("gate", "router")
"""What transformers calls the router beside `experts`."""


def routers(model: Model) -> list[tuple[nn.Module, str]]:
    """(MoE block, name of the router in it) of every layer that has one, in layer order; none for a dense model."""
    return [
        (block, name)
        for block in model.modules()
        if hasattr(block, "experts")
        for name in ROUTER_NAMES
        if isinstance(getattr(block, name, None), nn.Module)
    ]


def router_modules(model: Model) -> list[nn.Module]:
    """The router of every layer, in layer order."""
    return [getattr(block, name) for block, name in routers(model)]


def routing_vectors(router: nn.Module) -> nn.Parameter:
    """The parameter (E, H) of a model's own router, by whatever name: Hunyuan has a linear layer in it."""
    return next(parameter for parameter in router.parameters() if parameter.dim() == 2)


def _norm(router: nn.Module) -> nn.Module | None:
    """What a router does to its input before it multiplies by routing vectors: Gemma 4's normalises."""
    return getattr(router, "norm", None)


def logits_of(router: nn.Module, returned: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """What the router takes the softmax of, from what it returns first; of Gemma 4's but for a constant."""
    if not _norm(router):
        return returned
    return returned.clamp_min(torch.finfo(returned.dtype).tiny).log()  # it returns probabilities


def scores_of(model: Model, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """What a model's routers weigh experts by, in fp32: their probabilities, or a sigmoid of each logit."""
    sigmoid = model.config.model_type in SIGMOID
    return logits.float().sigmoid() if sigmoid else torch.softmax(logits.float(), dim=-1)


def weights_of(router: nn.Module, scores: Float[Tensor, "T E"], indices: Int[Tensor, "T k"]) -> Float[Tensor, "T k"]:
    """The weights that a router gives to chosen experts: their scores, renormalised; Gemma 4 scales them after that."""
    own = scores.gather(1, indices)
    weights, scale = own / own.sum(dim=1, keepdim=True), getattr(router, "per_expert_scale", None)
    return weights if scale is None else weights * scale[indices]


def granularity(model: Model) -> int:
    """Slices that an expert is cut into, as `experts.kinds.load_model` found them in its lineage; 1 for any other."""
    return int(getattr(model, "granularity", 1))


def num_experts(model: Model) -> int:
    """Whole experts per layer; 0 for a dense model."""
    return num_slices(model) // granularity(model)


def num_slices(model: Model) -> int:
    """What the router of a layer chooses among: the model's own experts, slices where they are cut."""
    return next((len(routing_vectors(router)) for router in router_modules(model)), 0)


def parts(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of a MoE with the part that it belongs to.

    `router` (Gemma 4's has scales beside its vectors), `experts`, `constant` (ERNIE's bias on the choice of experts,
    which no loss reaches), or `shared` for all the rest.
    """
    gates = {id(parameter) for router in router_modules(model) for parameter in router.parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith(CONSTANT):
            yield "constant", parameter
        else:
            yield "router" if id(parameter) in gates else "experts" if ".experts." in name else "shared", parameter


def freeze(model: Model, fixed: Collection[str]) -> None:
    """Leave the named `parts` of a MoE as they are; what trains is in fp32."""
    for part, parameter in parts(model):
        trains = part not in {"constant", *fixed}
        if trains:
            parameter.data = parameter.data.float() if parameter.dtype != torch.float32 else parameter.data
        parameter.requires_grad_(trains)


class RowExperts:
    """Which expert each row of the batch goes to; shared by the routers of all layers, set before a forward."""

    def __init__(self, slices: int = 1) -> None:
        self.experts: Int[Tensor, " B"] = torch.zeros(1, dtype=torch.long)
        self.slices = slices
        """Experts of the model that one of `experts` is, G."""

    def of_tokens(self, num_tokens: int, device: torch.device | None = None) -> Int[Tensor, " T"]:
        """On the device of a layer, which need not be that of the rows."""
        return self.experts.repeat_interleave(num_tokens // len(self.experts)).to(device or self.experts.device)

    def slots(self, experts: Int[Tensor, " T"], weights: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, indices) (T, G) of the slices of each token's expert, which share its weight (T,)."""
        parts = torch.arange(self.slices, device=experts.device)
        return weights[:, None].expand(-1, self.slices) / self.slices, experts[:, None] * self.slices + parts


class ForcedRouter(nn.Module):
    """Every token to its row's expert (all its slices) with weight 1: the dense model of that expert."""

    def __init__(self, rows: RowExperts, num_experts: int) -> None:
        super().__init__()
        self.rows = rows
        self.num_experts = num_experts

    def forward(self, hidden: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        experts = self.rows.of_tokens(len(flat), flat.device)
        scores = nn.functional.one_hot(experts, self.num_experts).to(flat)
        return scores, *self.rows.slots(experts, flat.new_ones(len(flat)))


class GatedRouter(nn.Module):
    """y = sigmoid(h . r_i) FFN_i(h), i the row's expert: UpIT's pre-optimisation of the routing vectors.

    `scores` keeps h . r_i of the last forward for the auxiliary loss.
    """

    def __init__(self, rows: RowExperts, vectors: Float[Tensor, "E H"]) -> None:
        super().__init__()
        self.rows = rows
        self.vectors = nn.Parameter(vectors.clone().float())
        self.scores: Float[Tensor, " T"] = torch.zeros(0)

    def forward(self, hidden: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        experts = self.rows.of_tokens(len(flat), flat.device)
        self.scores = (flat.float() * self.vectors[experts]).sum(dim=-1)
        gates = torch.sigmoid(self.scores).to(flat.dtype)
        return nn.functional.one_hot(experts, len(self.vectors)).to(flat), *self.rows.slots(experts, gates)


@contextmanager
def swapped_routers(model: Model, make: Callable[[int], Router]) -> Iterator[list[Router]]:
    """Replace the router of each layer by `make(layer)`, which sees what routing vectors see; the own come back."""
    places = routers(model)
    originals = router_modules(model)
    replacements = [make(layer) for layer in range(len(places))]
    try:
        for (parent, attribute), original, module in zip(places, originals, replacements, strict=True):
            if norm := _norm(original):
                module.register_forward_pre_hook(lambda _, inputs, norm=norm: (norm(inputs[0]),))
            setattr(parent, attribute, module)
        yield replacements
    finally:
        for (parent, attribute), original in zip(places, originals, strict=True):
            setattr(parent, attribute, original)


class RouterRecorder:
    """Collects what the routers of all layers return in a forward; use as a context manager.

    Works on the router modules themselves, so it does not depend on the model passing router logits on.
    """

    def __init__(self, model: Model) -> None:
        self._gates = router_modules(model)
        self.granularity = granularity(model)
        self._handles: list[RemovableHandle] = []
        self.logits: list[Float[Tensor, "T E"]] = []
        self.indices: list[Int[Tensor, "T k"]] = []

    def __enter__(self) -> "RouterRecorder":
        self._handles = [gate.register_forward_hook(self._record) for gate in self._gates]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def experts(self) -> list[Int[Tensor, "T k"]]:
        """`indices`, of whole experts."""
        return [indices // self.granularity for indices in self.indices]

    def clear(self) -> None:
        """Forget the last forward."""
        self.logits, self.indices = [], []

    def _record(self, router: nn.Module, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        device = self.logits[0].device if self.logits else outputs[0].device  # layers may lie on several
        self.logits.append(logits_of(router, outputs[0]).to(device))
        self.indices.append(outputs[2].to(device))


def random_routers(num_layers: int, num_experts: int, hidden: int, std: float, seed: int) -> list[Tensor]:
    """Gaussian routing vectors (E, H) per layer, the usual start of vanilla upcycling (std 0.02)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_experts, hidden, generator=generator) * std for _ in range(num_layers)]
