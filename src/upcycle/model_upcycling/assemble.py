"""The MoE from the plan, in one streaming pass: n dense models are read, one MoE is written.

Each expert's FFN goes straight into the MoE's shards; no child is ever a dense model on disk, and memory is that of a
few pieces of tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from upcycle.artifacts import ExpansionPlan
from upcycle.console import say, warn
from upcycle.errors import UpcycleError
from upcycle.merging.kernels import KERNELS
from upcycle.merging.lineage import Child, materialise
from upcycle.merging.perturb import perturbed
from upcycle.models.clients import CLIENTS, limits
from upcycle.models.families import moe_config
from upcycle.models.folders import LINEAGE, copy_companions, require_space, write_config
from upcycle.models.identity import check_identity
from upcycle.models.layouts import DenseLayout, FfnMove, Region, SharedMove, router_tensors
from upcycle.models.mapping import Mapping, map_model, needed_tensors, read_region
from upcycle.models.routers import random_routers
from upcycle.models.safetensors_io import DTYPE_NAMES, ModelReader, ModelWriter, pieces
from upcycle.models.streaming import PIECE, map_tensors
from upcycle.settings import AssembleSettings


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
    sources = _open(base, folders, plan)
    mapping = map_model(base, sources.base, len(plan.experts))
    _check_tensors(sources, mapping)
    dtype = _storage_dtype(sources.experts[0], mapping, settings)
    hint = "lower expand.num_experts or set assemble.dtype=bfloat16"
    require_space(out_dir, mapping.num_parameters() * dtype.itemsize, "the MoE", hint)
    layout = mapping.family.layout
    with ModelWriter(out_dir, mapping.specs(dtype)) as writer:
        shared_from = sources.shared(settings.shared)
        map_tensors(lambda move: write_shared(writer, move, shared_from), mapping.shared, "assemble: shared weights")
        map_tensors(lambda move: _write_experts(writer, move, sources, plan, layout), mapping.ffn, "assemble: experts")
        for name, tensor in _small_tensors(mapping, router_std, seed).items():
            writer.write(name, tensor)
    dtype_name = str(dtype).removeprefix("torch.")
    k, experts = settings.num_experts_per_tok, len(plan.experts)
    config = moe_config(mapping.family, mapping.config, experts, k, dtype_name)
    write_config(out_dir, config)
    copy_companions(base, out_dir, chat_template)
    plan.save(out_dir / LINEAGE)
    millions = mapping.num_parameters() / 1e6
    say(f"assemble: {mapping.family.moe.model_type} with {experts} experts, {millions:.1f}M parameters in {dtype_name}")
    _compare(mapping, sources, plan, settings, dtype, out_dir)
    for limit in limits(config):
        if limit.silent:
            warn(f"{CLIENTS[limit.client]} loads this {limit.moe} but {limit.what}: its output will be another")


def _small_tensors(mapping: Mapping, router_std: float, seed: int) -> dict[str, Tensor]:
    """The routers, and what the architecture insists on and that holds nothing."""
    config = mapping.config
    names = router_tensors(mapping.family.moe.layout, config)
    routers = random_routers(len(names), mapping.num_experts, config["hidden_size"], router_std, seed)
    return dict(zip(names, routers, strict=True)) | {n: torch.zeros(shape) for n, shape in mapping.zeros.items()}


def _open(base: Path, folders: Sequence[Path], plan: ExpansionPlan) -> _Sources:
    first, checkpoints = ModelReader(base), [ModelReader(folder) for folder in folders]
    experts = [first if e.checkpoint is None else checkpoints[e.checkpoint] for e in plan.sources]
    return _Sources(first, checkpoints, experts)


def _write_experts(
    writer: ModelWriter, move: FfnMove, sources: _Sources, plan: ExpansionPlan, layout: DenseLayout
) -> None:
    if plan.perturb != "none":
        for number, target in enumerate(move.experts):
            writer.write(target.tensor, _expert(sources, plan, layout, number, move.dense), target.element)
        return
    source, children = move.dense, [Child(e.parents, e.weights) for e in plan.children]
    for begin, count in pieces(source.count, source.count if KERNELS[plan.merge].whole_tensor else PIECE):
        start = source.element + begin
        theta, *experts = (r.elements(source.tensor, start, count) for r in (sources.base, *sources.experts))
        made = materialise(theta, experts, children, plan.merge, plan.drop_rate, plan.seed, source.tensor, start)
        for target, values in zip(move.experts, chain(experts, made), strict=True):
            writer.write(target.tensor, values, target.element + begin)


def _expert(sources: _Sources, plan: ExpansionPlan, layout: DenseLayout, number: int, region: Region) -> Tensor:
    """A weight of an expert that is a checkpoint, the base or a perturbed copy of one."""
    weight = read_region(sources.experts[number], region)
    if plan.perturb == "none":
        return weight
    channels = 1 if region.tensor.endswith(layout.down.tensor) else 0
    return perturbed(
        weight,
        channels,
        plan.perturb,
        plan.perturb_rate,
        plan.noise_std,
        plan.seed,
        number,
        f"{region.tensor}.{region.row}",
    )


def write_shared(writer: ModelWriter, move: SharedMove, readers: Sequence[ModelReader]) -> None:
    """Copy a run of rows from one model, or the mean of several; refuses NaN and Inf."""
    source, target = move.dense, move.moe
    for begin, count in pieces(source.count, PIECE):
        values = _mean([reader.elements(source.tensor, source.element + begin, count) for reader in readers])
        if not values.float().sum().isfinite() and not values.isfinite().all():  # the sum is quicker
            raise UpcycleError(f"{readers[-1].folder}: {source.tensor} holds NaN or Inf; take an undamaged checkpoint")
        writer.write(target.tensor, values, target.element + begin)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack([value.float() for value in values]).mean(dim=0)


def _check_tensors(sources: _Sources, mapping: Mapping) -> None:
    """Every checkpoint has the base's tensors."""
    names = needed_tensors(sources.base, mapping.config)
    for reader in sources.checkpoints:
        if odd := needed_tensors(reader, mapping.config) ^ names:
            raise UpcycleError(f"{reader.folder}: tensor {min(odd)} is in only one of this checkpoint and the base")
        for name in names:
            found, expected = reader.spec(name).shape, sources.base.spec(name).shape
            if found != expected:
                raise UpcycleError(f"{reader.folder}: {name} has shape {found}, the base has {expected}")


def _storage_dtype(reader: ModelReader, mapping: Mapping, settings: AssembleSettings) -> torch.dtype:
    source = reader.spec(mapping.ffn[0].dense.tensor).dtype
    return source if settings.dtype == "source" else DTYPE_NAMES[settings.dtype]


def _compare(
    mapping: Mapping,
    sources: _Sources,
    plan: ExpansionPlan,
    settings: AssembleSettings,
    dtype: torch.dtype,
    out_dir: Path,
) -> None:
    """Logits of what was written, every expert being the last that exists as a dense model, against that model's."""
    made, shared, last = ModelReader(out_dir), sources.shared(settings.shared), len(sources.experts) - 1

    def dense(region: Region) -> Tensor:
        if region.tensor in mapping.shapes:
            return _mean([read_region(reader, region) for reader in shared]).to(dtype)
        return _expert(sources, plan, mapping.family.layout, last, region).to(dtype)

    difference = check_identity(mapping, dense, partial(read_region, made), last)
    say(f"assemble: logits of a cut-down copy with equal experts are the dense model's (difference {difference:.0e})")
