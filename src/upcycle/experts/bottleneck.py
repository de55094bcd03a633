"""Bottlenecks behind one shared FFN as experts: PESC (Wu et al. 2024, arXiv 2401.02731).

They start as copies of the base and are trained in the mixture alone.

Legend: E experts, T tokens, k experts per token, H hidden, r width of the bottleneck.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from upcycle.console import say
from upcycle.errors import UpcycleError
from upcycle.experts.active import active_additions
from upcycle.experts.adapter_files import PREFIX
from upcycle.experts.gram import Measure
from upcycle.experts.kind import Kind, Load, Routers
from upcycle.experts.linears import Shapes
from upcycle.experts.lora_ffn import slot_products
from upcycle.experts.mixture import (
    MixtureConfig,
    MixtureFfn,
    NewExperts,
    load_mixture,
    load_tensors,
    router_keys,
    save_checkpoint,
    save_mixture,
    write_new,
)
from upcycle.experts.structure import check_base, checked_dense
from upcycle.merging.low_rank import fresh
from upcycle.recipe import Recipe
from upcycle.records.description import Description
from upcycle.records.plan import ExpansionPlan, Gram
from upcycle.settings import AssembleSettings, ExpandSettings, LoraSettings
from upcycle.types import Config, Model
from upcycle.weights.base import Base

BOTTLENECK_MIXTURE = "UPCYCLE_BOTTLENECK_MOE"


class BottleneckExperts(nn.Module):
    """Expert e is h + U_e act(D_e h) with h = FFN(x) (PESC, section 3.2).

    The paper leaves the activation open; it is the FFN's own.
    """

    def __init__(self, config: MixtureConfig, shapes: Shapes) -> None:
        super().__init__()
        hidden, _ = shapes["down_proj"]
        self.adapter_down = nn.Parameter(torch.zeros(config.num_experts, config.padded_rank, hidden))
        self.adapter_up = nn.Parameter(torch.zeros(config.num_experts, hidden, config.padded_rank))

    def forward(
        self, ffn: MixtureFfn, hidden: Float[Tensor, "T H"], weights: Float[Tensor, "T k"], chosen: Int[Tensor, "T k"]
    ) -> Float[Tensor, "T H"]:
        output = ffn.dense(hidden)
        added = slot_products(output, weights, chosen, self.adapter_down, self.adapter_up, ffn.act_fn)
        total: Tensor = weights.sum(dim=1, keepdim=True) * output + added
        return total

    def on_disk(self, expert: int, rank: int) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of an expert's D and U, without the padding of their width."""
        yield "adapter_down", self.adapter_down.data[expert, :rank]
        yield "adapter_up", self.adapter_up.data[expert, :, :rank]


def no_checkpoints(*_: object) -> NoReturn:
    """Raises UpcycleError: such experts come from no checkpoint."""
    raise UpcycleError(
        "prepare.train is bottleneck: such experts start as copies of the base; set expand.copies_of=base"
    )


def compare(
    _base: Base, _folders: Sequence[Path], _settings: ExpandSettings, _seed: int
) -> tuple[Gram, Measure | None]:
    """There is nothing to compare."""
    return np.zeros((0, 0)), None


def assemble(
    base: Base,
    _folders: Sequence[Path],
    plan: ExpansionPlan,
    settings: AssembleSettings,
    lora: LoraSettings,
    routers: Routers,
    out_dir: Path,
    moments: bool = False,
) -> None:
    """Write the compact folder of a mixture of fresh bottlenecks."""
    count = len(plan.experts)
    draw = torch.Generator().manual_seed(plan.seed)
    tensors = bottleneck_tensors(len(routers), base.config["hidden_size"], lora.rank, count, draw)
    experts = NewExperts(BOTTLENECK_MIXTURE, [lora.rank] * count, [1.0] * count, tensors)
    assert not moments  # nothing is trained before
    say(write_new(base, plan, settings, routers, experts, out_dir))


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


def load(how: Load) -> Model:
    """A mixture."""
    return load_mixture(how, BottleneckExperts)


def fold(source: Path, _target: Path, _dtype: str, _base: str | None) -> NoReturn:
    """Raises UpcycleError: it cannot be done."""
    raise UpcycleError(
        f"{source} has bottleneck experts (PESC), which are not linear: no weights of a plain MoE compute the same; "
        "export it without --fold, or use LoRA experts"
    )


def describe(folder: Path) -> Description:
    """From its configuration."""
    count = MixtureConfig.load(folder).num_experts
    return Description(f"A mixture of {count} bottlenecks (PESC; it needs its base and upcycle)", plain=False)


def addition(config: Config, recipe: Recipe) -> int:
    """Parameters of an expert."""
    return int(config["num_hidden_layers"] * 2 * config["hidden_size"] * recipe.lora.rank)


BOTTLENECK = Kind(
    peft_types=(BOTTLENECK_MIXTURE,),
    frozen=frozenset({"shared"}),
    check_base=check_base,
    read_base=lambda base, _: checked_dense(base),
    check_checkpoint=no_checkpoints,
    trainable=no_checkpoints,
    num_saved=no_checkpoints,
    finish_checkpoint=no_checkpoints,
    merge_rule=lambda settings: settings.adapters,
    compare=compare,
    assemble=assemble,
    load=load,
    save=save_mixture,
    save_checkpoint=save_checkpoint,
    resume=load_tensors,
    router_keys=router_keys,
    fold=fold,
    active=active_additions(addition),
    describe=describe,
    addition=addition,
)
