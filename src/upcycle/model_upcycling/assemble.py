"""The MoE from the plan, in one streaming pass: n dense models are read, one MoE is written.

Each expert's FFN goes straight into the MoE's shards; no child is ever a dense model on disk, and memory is that of a
few pieces of tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from upcycle.artifacts import ExpansionPlan
from upcycle.console import say
from upcycle.errors import UpcycleError
from upcycle.merging.kernels import KERNELS
from upcycle.merging.lineage import Child, materialise
from upcycle.models.families import Family, family_of, moe_config
from upcycle.models.folders import copy_companions, read_config, require_space, write_config
from upcycle.models.identity import check_identity
from upcycle.models.layouts import (
    Config,
    FfnMove,
    Region,
    SharedMove,
    ffn_moves,
    ffn_tensors,
    router_tensors,
    shared_moves,
    zero_tensors,
)
from upcycle.models.routers import random_routers
from upcycle.models.safetensors_io import DTYPES, ModelReader, ModelWriter, TensorSpec, pieces
from upcycle.models.streaming import PIECE, map_tensors
from upcycle.recipe import AssembleSettings

DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class _Sources:
    """What is read: the base, every checkpoint, and those that are experts (the base may be one)."""

    base: ModelReader
    checkpoints: list[ModelReader]
    experts: list[ModelReader]

    def shared(self, origin: str) -> list[ModelReader]:
        """The models whose mean the weights outside the experts are."""
        return {"last": self.checkpoints[-1:], "mean": self.checkpoints, "base": [self.base]}[origin]


def assemble(
    base: Path,
    folders: Sequence[Path],
    plan: ExpansionPlan,
    settings: AssembleSettings,
    chat_template: str | None,
    router_std: float,
    seed: int,
    out_dir: Path,
) -> None:
    """Write the MoE as a Hugging Face folder with the names that save_pretrained writes, and compare its logits.

    Its router is random until the routing stage gives it a better one.

    Args:
        folders: every prepared checkpoint, in order.

    Raises:
        UpcycleError: unsupported base, a tensor with no place in the MoE, one with NaN or Inf, not enough disk space,
            or logits that are not the dense model's.
    """
    config, num_experts = read_config(base), len(plan.experts)
    family = family_of(config, str(base))
    sources = _open(base, folders, plan)
    shapes = _shared_shapes(sources, family, config)
    shared = shared_moves(family.dense_layout, config, shapes)
    ffn = ffn_moves(family.dense_layout, family.moe_layout, config, num_experts)
    dtype = _storage_dtype(sources.experts[0], ffn[0].dense.tensor, settings)
    routers = random_routers(config["num_hidden_layers"], num_experts, config["hidden_size"], router_std, seed)
    small = dict(zip(router_tensors(family.moe_layout, config), routers, strict=True))
    small |= {name: torch.zeros(shape) for name, shape in zero_tensors(family.moe_layout, config).items()}
    specs = moe_specs(shared, ffn, {name: tuple(tensor.shape) for name, tensor in small.items()}, dtype)
    total = sum(prod(spec.shape) for spec in specs.values())
    hint = "lower expand.num_experts or set assemble.dtype=bfloat16"
    require_space(out_dir, total * dtype.itemsize, "the MoE", hint)
    with ModelWriter(out_dir, specs) as writer:
        shared_from = sources.shared(settings.shared)
        map_tensors(lambda move: _write_shared(writer, move, shared_from), shared, "assemble: shared weights")
        map_tensors(lambda move: _write_experts(writer, move, sources, plan), ffn, "assemble: experts")
        for name, tensor in small.items():
            writer.write(name, tensor)
    dtype_name = str(dtype).removeprefix("torch.")
    write_config(out_dir, moe_config(family, config, num_experts, settings.num_experts_per_tok, dtype_name))
    copy_companions(base, out_dir, chat_template)
    say(f"assemble: {family.moe} with {num_experts} experts, {total / 1e6:.1f}M parameters in {dtype_name}")
    _compare(family, config, shapes, sources, settings, plan, dtype, out_dir)


def moe_specs(
    shared: Sequence[SharedMove], ffn: Sequence[FfnMove], rest: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Name, shape and dtype of every tensor of the MoE."""
    regions = [move.moe for move in shared] + [region for move in ffn for region in move.experts]
    shapes = {region.tensor: region.full for region in regions} | rest
    return {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}


def _open(base: Path, folders: Sequence[Path], plan: ExpansionPlan) -> _Sources:
    first, checkpoints = ModelReader(base), [ModelReader(folder) for folder in folders]
    experts = [first if e.checkpoint is None else checkpoints[e.checkpoint] for e in plan.sources]
    return _Sources(first, checkpoints, experts)


def _write_experts(writer: ModelWriter, move: FfnMove, sources: _Sources, plan: ExpansionPlan) -> None:
    source, children = move.dense, [Child(e.parents, e.weights) for e in plan.children]
    for begin, count in pieces(source.count, source.count if KERNELS[plan.merge].whole_tensor else PIECE):
        start = source.element + begin
        theta, *experts = (r.elements(source.tensor, start, count) for r in (sources.base, *sources.experts))
        made = materialise(theta, experts, children, plan.merge, plan.drop_rate, plan.seed, source.tensor, start)
        for target, values in zip(move.experts, chain(experts, made), strict=True):
            writer.write(target.tensor, values, target.element + begin)


def _write_shared(writer: ModelWriter, move: SharedMove, readers: Sequence[ModelReader]) -> None:
    source, target = move.dense, move.moe
    for begin, count in pieces(source.count, PIECE):
        values = _mean([reader.elements(source.tensor, source.element + begin, count) for reader in readers])
        if not values.float().sum().isfinite() and not values.isfinite().all():  # the sum is quicker
            raise UpcycleError(f"{readers[-1].folder}: {source.tensor} holds NaN or Inf; take an undamaged checkpoint")
        writer.write(target.tensor, values, target.element + begin)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack([value.float() for value in values]).mean(dim=0)


def _shared_shapes(sources: _Sources, family: Family, config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that is not an expert's, with its shape; what some files carry without need is left aside."""
    tied = bool(config.get("tie_word_embeddings"))
    names = _needed(sources.base, tied)
    for reader in sources.checkpoints:
        if _needed(reader, tied) != names:
            odd = sorted(_needed(reader, tied) ^ names)[0]
            raise UpcycleError(f"{reader.folder}: tensor {odd} is in only one of this checkpoint and the base")
        for name in names:
            found, expected = reader.spec(name).shape, sources.base.spec(name).shape
            if found != expected:
                raise UpcycleError(f"{reader.folder}: {name} has shape {found}, the base has {expected}")
    shared = names - set(ffn_tensors(family.dense_layout, config))
    strange = [n for n in shared if ".mlp." in n]
    if strange:
        raise UpcycleError(f"{sources.base.folder}: {sorted(strange)[0]} has no place in the mixture of experts")
    return {name: sources.base.spec(name).shape for name in sorted(shared)}


def _needed(reader: ModelReader, tied: bool) -> set[str]:
    # older files repeat the tied head, and a table of rotary frequencies that is computed anyway
    return {n for n in reader.names() if not n.endswith("rotary_emb.inv_freq") and not (tied and n == "lm_head.weight")}


def _storage_dtype(reader: ModelReader, name: str, settings: AssembleSettings) -> torch.dtype:
    return reader.spec(name).dtype if settings.dtype == "source" else DTYPE_NAMES[settings.dtype]


def _compare(
    family: Family,
    config: Config,
    shapes: dict[str, tuple[int, ...]],
    sources: _Sources,
    settings: AssembleSettings,
    plan: ExpansionPlan,
    dtype: torch.dtype,
    out_dir: Path,
) -> None:
    """Logits of what was written, every expert being the last that exists as a dense model, against that model's."""
    made = ModelReader(out_dir)
    shared = sources.shared(settings.shared)

    def dense(region: Region) -> Tensor:
        readers = shared if region.tensor in shapes else sources.experts[-1:]
        values = _mean([r.elements(region.tensor, region.element, region.count) for r in readers])
        return values.to(dtype).view(region.shape)

    def moe(region: Region) -> Tensor:
        return made.elements(region.tensor, region.element, region.count).view(region.shape)

    last = len(sources.experts) - 1
    difference = check_identity(family, config, shapes, dense, moe, last, len(plan.experts), sources.base.folder)
    say(f"assemble: logits of a cut-down copy with equal experts are the dense model's (difference {difference:.0e})")
