"""A mixture of adapters: a dense model whose FFN blocks have a router and, for each expert, a small addition.

Kept as a compact folder in PEFT's form: `adapter_config.json` and `adapter_model.safetensors` with the adapters and the
routers; the dense model stays where it is.

Legend: T tokens, k experts per token, E experts, H hidden, I intermediate size, r rank.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from upcycle.errors import UpcycleError
from upcycle.merging.low_rank import LowRank, fresh
from upcycle.models.adapters import CONFIG, FFN, PREFIX, WEIGHTS, read_adapter_config, read_tensors
from upcycle.models.lora_ffn import Factors, lora_ffn, slot_products

MULTIPLE = 8
"""Ranks are padded with zeros to a multiple of it, which stay zero in training: grouped products want it so."""
LORA, BOTTLENECK = "UPCYCLE_LORA_MOE", "UPCYCLE_BOTTLENECK_MOE"
ROUTER_MODULE = "mlp.gate"


@dataclass(frozen=True)
class MixtureConfig:
    """adapter_config.json of a mixture; PEFT's names where it has one."""

    peft_type: str
    base_model_name_or_path: str
    num_experts: int
    num_experts_per_tok: int
    expert_ranks: tuple[int, ...]
    expert_scaling: tuple[float, ...]
    """s of each expert: it adds s B A."""
    dtype: str = "float32"
    task_type: str = "CAUSAL_LM"

    def save(self, folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps({**asdict(self), "r": max(self.expert_ranks)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "MixtureConfig":
        values = read_adapter_config(folder)
        values.pop("r", None)
        try:
            found = cls(**values)
        except TypeError as error:
            raise UpcycleError(f"{folder / CONFIG} is not a mixture made by upcycle: {error}") from None
        lists = {name: tuple(getattr(found, name)) for name in ("expert_ranks", "expert_scaling")}
        return cls(**{**asdict(found), **lists})


class TopKRouter(nn.Module):
    """Softmax over experts, the k largest, renormalised: Mixtral's router, with the same outputs."""

    def __init__(self, num_experts: int, hidden: int, num_experts_per_tok: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden))
        self.top_k = num_experts_per_tok

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden, self.weight)
        weights, chosen = torch.softmax(logits.float(), dim=-1).topk(self.top_k, dim=-1)
        return logits, (weights / weights.sum(dim=-1, keepdim=True)).to(hidden.dtype), chosen


class StackedLora(nn.Module):
    """The low-rank updates of one weight: of all experts, padded to one rank."""

    def __init__(self, num_experts: int, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(num_experts, rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, rank, outputs))  # transposed, see Factors


class LoraExperts(nn.ModuleDict):
    """gate_proj, up_proj and down_proj of all experts of a layer."""

    scaling: Float[Tensor, " E"]

    def __init__(self, config: MixtureConfig, hidden: int, channels: int) -> None:
        rank = -(-max(config.expert_ranks) // MULTIPLE) * MULTIPLE
        sizes = {"gate_proj": (hidden, channels), "up_proj": (hidden, channels), "down_proj": (channels, hidden)}
        super().__init__({name: StackedLora(config.num_experts, rank, *size) for name, size in sizes.items()})
        self.register_buffer("scaling", torch.tensor(config.expert_scaling), persistent=False)

    def factors(self) -> Factors:
        gate, up, down = (cast(StackedLora, self[name]) for name in FFN)
        return Factors(torch.cat([gate.lora_A, up.lora_A], dim=1), gate.lora_B, up.lora_B, down.lora_A, down.lora_B)

    def forward(self, ffn: Any, hidden: Float[Tensor, "T H"], weights: Tensor, chosen: Tensor) -> Tensor:
        return lora_ffn(hidden, ffn, weights, chosen, self.factors(), self.scaling)


class BottleneckExperts(nn.Module):
    """Expert e is h + U_e act(D_e h) with h = FFN(x): PESC (Wu et al. 2024, arXiv 2401.02731, section 3.2).

    The paper leaves the activation open; it is the FFN's own.
    """

    def __init__(self, config: MixtureConfig, hidden: int) -> None:
        super().__init__()
        rank = -(-max(config.expert_ranks) // MULTIPLE) * MULTIPLE
        self.adapter_down = nn.Parameter(torch.zeros(config.num_experts, rank, hidden))
        self.adapter_up = nn.Parameter(torch.zeros(config.num_experts, hidden, rank))

    def forward(self, ffn: Any, hidden: Float[Tensor, "T H"], weights: Tensor, chosen: Tensor) -> Tensor:
        output = ffn.down_proj(ffn.act_fn(ffn.gate_proj(hidden)) * ffn.up_proj(hidden))
        added = slot_products(output, weights, chosen, self.adapter_down, self.adapter_up, ffn.act_fn)
        total: Tensor = weights.sum(dim=1, keepdim=True) * output + added
        return total


class MixtureFfn(nn.Module):
    """A dense FFN block with a router and the experts' additions; the dense weights are shared by all experts."""

    def __init__(self, ffn: Any, router: TopKRouter, experts: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = ffn.gate_proj, ffn.up_proj, ffn.down_proj
        self.act_fn = ffn.act_fn
        self.gate = router
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, chosen = self.gate(flat)
        output: Tensor = self.experts(self, flat, weights, chosen)
        return output.view(hidden.shape)


def attach(model: Any, config: MixtureConfig) -> Any:
    """Make a dense model a mixture, in place: its own weights are frozen, the additions and routers are zeros."""
    model.requires_grad_(False)
    hidden, channels = model.config.hidden_size, model.config.intermediate_size
    for layer in model.model.layers:
        device = layer.mlp.down_proj.weight.device
        router = TopKRouter(config.num_experts, hidden, config.num_experts_per_tok)
        lora = config.peft_type == LORA
        experts = LoraExperts(config, hidden, channels) if lora else BottleneckExperts(config, hidden)
        layer.mlp = MixtureFfn(layer.mlp, router.to(device), experts.to(device))
    model.mixture = config
    return model


def mixture_of(model: Any) -> MixtureConfig | None:
    """The configuration of a mixture; None for any other model."""
    return getattr(model, "mixture", None)


def router_names(num_layers: int) -> list[str]:
    """The router's weight of every layer, as on disk."""
    return [f"{PREFIX}model.layers.{layer}.{ROUTER_MODULE}.weight" for layer in range(num_layers)]


def expert_tensor(module: str, expert: int, factor: str) -> str:
    """The name on disk of an expert's factor (`lora_A`) of an FFN weight `model.layers.0.mlp.gate_proj`."""
    parent, _, weight = module.rpartition(".")
    return f"{PREFIX}{parent}.experts.{expert}.{weight}.{factor}.weight"


def lora_tensors(module: str, expert: int, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """An expert's A and B of a weight, named as on disk."""
    return {expert_tensor(module, expert, "lora_A"): a, expert_tensor(module, expert, "lora_B"): b}


def bottleneck_tensors(
    num_layers: int, hidden: int, rank: int, num_experts: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Fresh bottlenecks: D uniform as a linear layer's, U zero, so that an expert is the dense FFN."""
    tensors: dict[str, Tensor] = {}
    for layer in range(num_layers):
        for expert in range(num_experts):
            prefix = f"{PREFIX}model.layers.{layer}.mlp.experts.{expert}."
            start = fresh((hidden, hidden), rank, 1.0, generator)
            tensors |= {f"{prefix}adapter_down.weight": start.a, f"{prefix}adapter_up.weight": start.b}
    return tensors


def _slots(model: Any, config: MixtureConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on disk with the part of a parameter where it lies in memory."""
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            parent, _, rest = name.partition(".experts.")
            for expert, rank in enumerate(config.expert_ranks):
                whole = parameter.data[expert]
                part = whole[:, :rank] if rest.endswith("adapter_up") else whole[:rank]
                part = part.T if rest.endswith("lora_B") else part
                yield f"{PREFIX}{parent}.experts.{expert}.{rest}.weight", part
        elif name.endswith(f"{ROUTER_MODULE}.weight"):
            yield PREFIX + name, parameter.data


def write_mixture(folder: Path, config: MixtureConfig, tensors: Mapping[str, Tensor]) -> None:
    """The compact folder's two files."""
    dtype = getattr(torch, config.dtype)
    save_file({name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config.save(folder)


def save_mixture(model: Any, folder: Path, dtype: str | None = None) -> None:
    """Write a model's routers and adapters, each at its own rank, in `dtype` (default: the mixture's own)."""
    config = replace(model.mixture, dtype=dtype or model.mixture.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_mixture(folder, config, dict(_slots(model, config)))


@torch.no_grad()
def load_tensors(model: Any, folder: Path) -> None:
    """Put the routers and adapters of a compact folder into a mixture.

    Raises:
        UpcycleError: a tensor is missing, left over, or of another shape.
    """
    tensors = read_tensors(folder)
    for name, part in _slots(model, model.mixture):
        if name not in tensors:
            raise UpcycleError(f"{folder / WEIGHTS} has no {name}; the mixture is incomplete, make it again")
        found = tensors.pop(name)
        if found.shape != part.shape:
            raise UpcycleError(
                f"{folder / WEIGHTS}: {name} has shape {tuple(found.shape)}, expected {tuple(part.shape)}: the mixture "
                "belongs to another base, or the file to another configuration"
            )
        part.copy_(found)
    if tensors:
        raise UpcycleError(f"{folder / WEIGHTS}: {min(tensors)} has no place in the mixture")


def expert_updates(folder: Path, config: MixtureConfig) -> list[dict[str, LowRank]]:
    """The LoRA experts of a compact folder, by the name of the weight's module."""
    tensors = read_tensors(folder)
    experts: list[dict[str, LowRank]] = []
    for expert, scaling in enumerate(config.expert_scaling):
        marker = f".experts.{expert}."
        names = sorted(n for n in tensors if marker in n and n.endswith(".lora_A.weight"))
        updates = {}
        for name in names:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight").replace(marker, ".")
            updates[module] = LowRank(tensors[name], tensors[expert_tensor(module, expert, "lora_B")], scaling)
        experts.append(updates)
    return experts
