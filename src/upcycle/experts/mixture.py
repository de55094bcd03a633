"""A mixture of adapters: a dense model whose FFN blocks have a router and, for each expert, a small addition.

Kept as a compact folder in PEFT's form: `adapter_config.json` and `adapter_model.safetensors` with the adapters and the
routers; the dense model stays where it is.

Legend: E experts, H hidden.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, FiniteFloat, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from upcycle.distributed.world import is_main
from upcycle.errors import UpcycleError, counted
from upcycle.experts.adapter_files import CONFIG, PREFIX, WEIGHTS, base_of, read_tensors
from upcycle.experts.kind import Load, Routers
from upcycle.experts.linears import Shapes, Structure, structure_of
from upcycle.reading import MAX_BYTES
from upcycle.records.files import LINEAGE
from upcycle.records.manifest import FORMAT, HASHED_WITH
from upcycle.records.plan import ExpansionPlan
from upcycle.records.record import Record, optional, read_record, write_record
from upcycle.settings import MOST_EXPERTS, AssembleSettings
from upcycle.types import Model
from upcycle.weights.base import Base
from upcycle.weights.folders import copy_companions, load_dense
from upcycle.weights.hashing import hash_model

MULTIPLE = 8
"""Ranks are padded with zeros to a multiple of it, which stay zero in training: grouped products want it so."""
ROUTER_MODULE = "mlp.gate"


class MixtureConfig(Record):
    """adapter_config.json of a mixture; PEFT's names where it has one."""

    peft_type: str
    base_model_name_or_path: str
    num_experts: int = Field(ge=1, le=MOST_EXPERTS)
    num_experts_per_tok: int = Field(ge=1)
    expert_ranks: tuple[Annotated[int, Field(ge=1)], ...]
    expert_scaling: tuple[FiniteFloat, ...]
    """s of each expert: it adds s B A."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    r: int
    """The largest rank."""
    base_hash: str | None = optional()
    """`FORMAT:HASH` of the dense model's files; None in mixtures of earlier versions."""

    @model_validator(mode="after")
    def _is_of_all_experts(self) -> "MixtureConfig":
        for name, values in (("expert_ranks", self.expert_ranks), ("expert_scaling", self.expert_scaling)):
            if len(values) != self.num_experts:
                raise ValueError(f"{name} has {len(values)} values, but num_experts is {self.num_experts}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok} of num_experts {self.num_experts}")
        if self.r != max(self.expert_ranks):
            raise ValueError(f"r is {self.r}, but the largest of expert_ranks is {max(self.expert_ranks)}")
        return self

    @property
    def padded_rank(self) -> int:
        """Of all experts' tensors in memory."""
        return -(-self.r // MULTIPLE) * MULTIPLE

    @classmethod
    def load(cls, folder: Path) -> "MixtureConfig":
        """
        Raises:
            UpcycleError: it is not the configuration of a mixture, or its fields contradict each other.
        """
        found: MixtureConfig = read_record(folder / CONFIG, cls, most_bytes=MAX_BYTES)
        return found


def check_trained_on(base_hash: str | None, base: Path, where: Path) -> None:
    """
    Args:
        base_hash: of the dense model that the mixture in `where` was trained on, see `MixtureConfig`.

    Raises:
        UpcycleError: `base` is another one.
    """
    known, _, expected = (base_hash or "").partition(":")
    if known.isdecimal() and int(known) in HASHED_WITH and hash_model(base, int(known)) != expected:
        raise UpcycleError(
            f"{base} is not the base that {where} was trained on (their hashes differ); name the right one with "
            "--base, or put it back"
        )


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


class MixtureFfn(nn.Module):
    """A dense FFN block with a router and the experts' additions; the dense weights are shared by all experts."""

    def __init__(self, ffn: nn.Module, structure: Structure, router: TopKRouter, experts: nn.Module) -> None:
        super().__init__()
        self.structure = structure
        for name in structure.linears:  # as they are: they may be quantized, sharded or hooked
            setattr(self, name, getattr(ffn, name))
        self.act_fn = getattr(ffn, structure.act)
        self.gate = router
        self.experts = experts

    def inner(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """What the dense block computes before its activation."""
        return self.structure.inner(self, hidden)

    def down(self, hidden: Tensor) -> Tensor:
        """Its last linear layer."""
        return self.structure.down(self, hidden)

    @property
    def down_bias(self) -> Tensor | None:
        """That of its last linear layer."""
        return self.structure.down_bias(self)

    def dense(self, hidden: Tensor) -> Tensor:
        """Its output."""
        return self.structure.output(self, self.act_fn, hidden)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, chosen = self.gate(flat)
        output: Tensor = self.experts(self, flat, weights, chosen)
        return output.view(hidden.shape)


MakeAdditions = Callable[[MixtureConfig, Shapes], nn.Module]
"""(configuration, shapes of the FFN weights): the additions of one layer, all zeros."""


def load_mixture(how: Load, make: MakeAdditions) -> Model:
    """The mixture in a compact folder, on its dense model.

    Raises:
        UpcycleError: see `load_tensors`.
    """
    config = MixtureConfig.load(how.folder)
    base = base_of(how.folder, how.base)
    check_trained_on(config.base_hash, base, how.folder)
    tensors = read_tensors(how.folder)
    check_ranks(config, tensors, how.folder)
    model = attach(load_dense(base, how.dtype, how.four_bit, **how.where), config, make)
    put_tensors(model, tensors, how.folder)
    return (model if how.four_bit or how.where else model.to(device=how.device, dtype=how.dtype)).eval()


def attach(model: Model, config: MixtureConfig, make: MakeAdditions) -> Model:
    """Make a dense model a mixture, in place: its own weights are frozen, the additions and routers are zeros."""
    model.requires_grad_(False)
    hidden, channels = model.config.hidden_size, model.config.intermediate_size
    for layer in model.model.layers:
        structure, device = structure_of(layer.mlp), next(layer.mlp.parameters()).device
        assert structure is not None  # see structure.problem_of
        router = TopKRouter(config.num_experts, hidden, config.num_experts_per_tok).to(device)
        additions = make(config, structure.weight_shapes(hidden, channels)).to(device)
        layer.mlp = MixtureFfn(layer.mlp, structure, router, additions)
    model.mixture = config
    return model


def mixture_of(model: Model) -> MixtureConfig | None:
    """The configuration of a mixture; None for any other model."""
    return getattr(model, "mixture", None)


def router_names(num_layers: int) -> list[str]:
    """The router's weight of every layer, as on disk."""
    return [f"{PREFIX}model.layers.{layer}.{ROUTER_MODULE}.weight" for layer in range(num_layers)]


def router_keys(model: Model) -> list[str]:
    """The router's weight of every layer of a model, as on disk."""
    return router_names(model.config.num_hidden_layers)


def expert_tensor(module: str, expert: int, factor: str) -> str:
    """The name on disk of an expert's factor (`lora_A`) of an FFN weight `model.layers.0.mlp.gate_proj`."""
    parent, _, weight = module.rpartition(".")
    return f"{PREFIX}{parent}.experts.{expert}.{weight}.{factor}.weight"


def _views(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Every tensor on disk with the part of a parameter where it lies in memory."""
    for layer, name in zip(model.model.layers, router_keys(model), strict=True):
        yield name, layer.mlp.gate.weight.data
        prefix = name.removesuffix(f"{ROUTER_MODULE}.weight")
        for expert, rank in enumerate(model.mixture.expert_ranks):
            for tensor, view in layer.mlp.experts.on_disk(expert, rank):
                yield f"{prefix}mlp.experts.{expert}.{tensor}.weight", view


def write_mixture(folder: Path, config: MixtureConfig, tensors: Mapping[str, Tensor]) -> None:
    """The compact folder's two files."""
    dtype = getattr(torch, config.dtype)
    save_file({name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    write_record(folder / CONFIG, config)


def save_checkpoint(model: Model, folder: Path, dtype: str = "float32") -> None:
    """Write a model's routers and adapters, each at its own rank."""
    folder.mkdir(parents=True, exist_ok=True)
    write_mixture(folder, model.mixture.model_copy(update={"dtype": dtype}), dict(_views(model)))


def save_mixture(model: Model, folder: Path, initial: Path) -> None:
    """Write a trained mixture, in its own dtype, with what else lies in the initial folder."""
    if is_main():
        save_checkpoint(model, folder, model.mixture.dtype)
        copy_companions(initial, folder)


def check_ranks(config: MixtureConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Compare the configuration with the tensors, before memory is taken for what it says.

    Raises:
        UpcycleError: an expert has no tensor of its rank.
    """
    sizes: dict[int, set[int]] = {}
    for name, tensor in tensors.items():
        if match := re.search(r"\.experts\.(\d{1,9})\.", name):
            sizes.setdefault(int(match[1]), set()).update(tensor.shape)
    for expert, rank in enumerate(config.expert_ranks):
        if rank not in sizes.get(expert, ()):
            raise UpcycleError(
                f"{folder / CONFIG}: expert_ranks[{expert}] is {rank}, but expert {expert} has no tensor of that rank "
                f"in {WEIGHTS}; the mixture is incomplete; rebuild it"
            )


def load_tensors(model: Model, folder: Path) -> None:
    """Put the routers and adapters of a compact folder into a mixture.

    Raises:
        UpcycleError: see `put_tensors`.
    """
    put_tensors(model, read_tensors(folder), folder)


@torch.no_grad()
def put_tensors(model: Model, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors of a compact folder into a mixture; they are taken from `tensors`.

    Raises:
        UpcycleError: a tensor is missing, left over, or of another shape.
    """
    for name, part in _views(model):
        if name not in tensors:
            raise UpcycleError(f"{folder / WEIGHTS} has no {name}; the mixture is incomplete; rebuild it")
        found = tensors.pop(name)
        if found.shape != part.shape:
            raise UpcycleError(
                f"{folder / WEIGHTS}: {name} has shape {tuple(found.shape)}, expected {tuple(part.shape)}: the "
                "mixture belongs to a different base, or the file to a different configuration"
            )
        part.copy_(found)
    if tensors:
        raise UpcycleError(f"{folder / WEIGHTS}: {min(tensors)} has no place in the mixture")


@dataclass(frozen=True)
class NewExperts:
    """The experts of a mixture that is being assembled."""

    peft_type: str
    ranks: list[int]
    scalings: list[float]
    tensors: dict[str, Tensor]
    """Named as on disk."""


def write_new(
    base: Base, plan: ExpansionPlan, settings: AssembleSettings, routers: Routers, experts: NewExperts, out_dir: Path
) -> str:
    """Write the compact folder of a new mixture, and return a line on it."""
    named = dict(zip(router_names(len(routers)), routers, strict=True))
    config = MixtureConfig(
        peft_type=experts.peft_type,
        base_model_name_or_path=base.name,
        num_experts=len(plan.experts),
        num_experts_per_tok=settings.num_experts_per_tok,
        expert_ranks=tuple(experts.ranks),
        expert_scaling=tuple(experts.scalings),
        r=max(experts.ranks),
        dtype="float32" if settings.dtype == "source" else settings.dtype,
        base_hash=f"{FORMAT}:{hash_model(base.folder)}",
    )
    write_mixture(out_dir, config, {**experts.tensors, **named})
    base.write_companions(out_dir)
    LINEAGE.write(out_dir, plan)
    added = sum(tensor.numel() for tensor in (*experts.tensors.values(), *routers))
    return (
        f"assemble: {counted(len(plan.experts), 'expert')} of rank {max(experts.ranks)} on {base.name}, "
        f"{added / 1e6:.1f}M parameters besides the base's"
    )
