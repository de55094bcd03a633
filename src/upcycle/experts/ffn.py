"""Whole FFNs as experts: dense checkpoints go side by side into a plain MoE, in one streaming pass.

No child is ever a dense model on disk, and peak memory is a few tensor chunks, whatever the model's size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upcycle.architectures.agreement import check_agreement
from upcycle.architectures.clients import CLIENTS, limits
from upcycle.architectures.families import computed_fields, expert_counts, family_of, moe_of
from upcycle.architectures.layouts import ffn, in_memory, moe_layers, prefix
from upcycle.architectures.mapping import (
    Mapping,
    map_model,
    needed_tensors,
    read_region,
    with_layers,
    with_own_head,
)
from upcycle.architectures.moves import Region, ffn_tensors, router_tensors
from upcycle.architectures.slices import Slicing
from upcycle.console import warn
from upcycle.distributed.shards import is_sharded, placement, take_over
from upcycle.distributed.world import is_main
from upcycle.errors import UpcycleError, counted
from upcycle.experts.active import active_ffns
from upcycle.experts.adapter_files import is_adapter
from upcycle.experts.gram import Measure, task_vector_gram
from upcycle.experts.kind import Kind, Load, Routers
from upcycle.experts.plain_moe import Parts, Piece, storage_dtype, write_moe
from upcycle.experts.sharded import write_plain
from upcycle.experts.structure import check_twin, checked_mapping
from upcycle.merging.kernels import KERNELS
from upcycle.merging.lineage import Child, materialise
from upcycle.merging.perturb import perturbed
from upcycle.reading import read_json
from upcycle.records.description import Description
from upcycle.records.files import LINEAGE
from upcycle.records.plan import ExpansionPlan, Expert, Gram
from upcycle.settings import AssembleSettings, DevicesSettings, ExpandSettings, LoraSettings
from upcycle.types import Config, Model
from upcycle.weights.base import Base
from upcycle.weights.folders import copy_companions, load_dense, read_config, write_config
from upcycle.weights.names import HEAD
from upcycle.weights.safetensors_io import ModelReader, check_one, pieces
from upcycle.weights.streaming import BLOCK, PIECE
from upcycle.weights.wrappers import wrapper_in


def check_base(base: Base) -> None:
    """Raises UpcycleError if there is no plain MoE that computes the same, with what works on the base."""
    check_twin(base.folder, with_layers(base.config, base.layers))


def check_checkpoint(base: Base, first: Path, checkpoint: Path) -> None:
    """Refuse what cannot be an expert of the base.

    Raises:
        UpcycleError: it is an adapter, has another architecture or precision than the base, or transformers reads it
            otherwise.
    """
    if is_adapter(checkpoint):
        check_one(checkpoint)
        raise UpcycleError(f"{checkpoint} is an adapter; set prepare.train=lora to make experts of adapters")
    check_same_architecture(base, checkpoint)
    check_precision(base, first, checkpoint)
    reader = ModelReader(checkpoint)
    config = with_own_head(reader, read_config(checkpoint))
    check_agreement(reader, config)
    if _is_tied(config) != _is_tied(with_own_head(ModelReader(base.folder), base.config)):
        has, other = ("the base", checkpoint) if _is_tied(config) else (checkpoint, "the base")
        raise UpcycleError(
            f"{checkpoint}: {has} has a head of its own ({HEAD}), but {other} takes its embeddings as the head "
            "(tie_word_embeddings), so one of the two would be lost; checkpoints of one run are alike in this"
        )


def _is_tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings"))


def check_same_architecture(base: Base, checkpoint: Path) -> None:
    """Compare the fields that decide what the weights compute.

    Raises:
        UpcycleError: names the first field that differs.
    """
    expected, found = computed_fields(base.config), read_config(checkpoint)
    for field in expected:
        if expected[field] != found.get(field):
            raise UpcycleError(
                f"{checkpoint}: {field} is {found.get(field)!r}, but the base {base.folder} has "
                f"{expected.get(field)!r}; the checkpoints of one run have the base's architecture"
            )


def check_precision(base: Base, first: Path, checkpoint: Path) -> None:
    """Compare the dtypes of the FFN weights.

    Raises:
        UpcycleError: they are less precise than the base's, or not those of the first checkpoint: the rounding would be
            taken for what training changed.
    """
    readers = {folder: ModelReader(folder) for folder in (base.folder, first, checkpoint)}
    for name in ffn_names(base):
        dtypes = {folder: reader.spec(name).dtype for folder, reader in readers.items()}
        for other, wrong in (
            (base.folder, torch.finfo(dtypes[checkpoint]).eps > torch.finfo(dtypes[base.folder]).eps),
            (first, dtypes[checkpoint] != dtypes[first]),
        ):
            if wrong:
                raise UpcycleError(
                    f"{checkpoint}: {name} is {dtypes[checkpoint]}, that of {other} {dtypes[other]}; the rounding "
                    f"would look like a change by training; convert {other} to {dtypes[checkpoint]}, or save "
                    "checkpoints in its dtype"
                )


def ffn_names(base: Base) -> list[str]:
    """The names of the tensors that hold the base's FFN weights, of the layers that become sparse."""
    config = with_layers(base.config, base.layers)
    return ffn_tensors(family_of(config, str(base.folder)).layout, config)


def whole_model(base: Base, _lora: LoraSettings, _seed: int, devices: DevicesSettings) -> Model:
    """All of the model trains but the FFNs of layers that stay dense: a forced expert is its checkpoint then too."""
    model = load_dense(base.folder, torch.float32, **_dense_placement(devices)).train()
    if base.layers is not None:
        every, sparse = ffn_names(replace(base, layers=None)), ffn_names(base)
        for name in set(every) - set(sparse):
            model.get_parameter(in_memory(name)).requires_grad_(False)
    return model


def _dense_placement(devices: DevicesSettings) -> dict[str, Any]:
    return placement(devices.fsdp, 1, devices.replicate)


def ffn_alone(base: Base, _lora: LoraSettings, _seed: int, devices: DevicesSettings) -> Model:
    """Only the FFN weights train: the experts then differ in nothing else."""
    model = load_dense(base.folder, torch.float32, **_dense_placement(devices)).train()
    names = set(map(in_memory, ffn_names(base)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def finish_checkpoint(folder: Path, base: Base) -> None:
    """Training switches the cache off in the saved configuration; the architecture is the base's."""
    write_config(folder, {**base.config, "dtype": "float32"})


def compare(base: Base, folders: Sequence[Path], settings: ExpandSettings, seed: int) -> tuple[Gram, Measure | None]:
    """Inner products of the FFN task vectors, by streaming; those of children too where merging is not linear."""

    def measure(experts: Sequence[Expert]) -> Gram:
        sources = [base.folder if e.checkpoint is None else folders[e.checkpoint] for e in experts if e.kind != "child"]
        children = [Child(e.parents, e.weights) for e in experts if e.kind == "child"]
        return task_vector_gram(base, sources, children, settings.merge, settings.drop_rate, seed)

    gram = task_vector_gram(base, folders) if folders else np.zeros((0, 0))
    return gram, None if KERNELS[settings.merge].linear else measure


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
    base: Base,
    folders: Sequence[Path],
    plan: ExpansionPlan,
    settings: AssembleSettings,
    _lora: LoraSettings,
    routers: Routers,
    out_dir: Path,
    moments: bool = False,
) -> None:
    """Write the MoE as a Hugging Face folder with the names that save_pretrained writes.

    Raises:
        UpcycleError: unsupported base, a tensor with no place in the MoE, or what `write_moe` refuses.
    """
    sources = _open(base, folders, plan)
    slicing = Slicing(settings.granularity, settings.channels, plan.seed)
    mapping = map_model(base.folder, sources.base, len(plan.experts), slicing, base.layers)
    mapping = replace(mapping, config={**mapping.config, **base.special_ids})
    _check_tensors(sources, mapping)
    layout_down = mapping.family.layout.down.tensor
    dtype = storage_dtype(settings.dtype, sources.experts[0], mapping)
    computed_on = plan.spread != 1 or any(move.rewrite for move in mapping.ffn)
    parts = Parts(
        shared=sources.shared(settings.shared),
        experts=partial(_pieces, sources, plan, layout_down, torch.float32 if computed_on else dtype),
        expert=partial(_expert, sources, plan, layout_down),
        routers=routers,
        compared=[len(sources.experts) - 1],  # the last that exists as a dense model
        moments=moments,
        num_experts_per_tok=settings.num_experts_per_tok,
    )
    hint = "lower expand.num_experts or set assemble.dtype=bfloat16"
    config = write_moe(out_dir, mapping, parts, dtype, "assemble", hint)
    base.write_companions(out_dir)
    cut = {"granularity": settings.granularity, "channels": settings.channels}
    flops = mapping.flops_over_dense(settings.num_experts_per_tok)
    LINEAGE.write(out_dir, plan.model_copy(update={**cut, "flops_over_dense": flops}))
    for limit in limits(config):
        if limit.silent and not moments:
            warn(f"{CLIENTS[limit.client]} loads this {limit.moe} but {limit.what}: its output will be different")


def _open(base: Base, folders: Sequence[Path], plan: ExpansionPlan) -> _Sources:
    first, checkpoints = ModelReader(base.folder), [ModelReader(folder) for folder in folders]
    experts = [first if e.checkpoint is None else checkpoints[e.checkpoint] for e in plan.sources]
    return _Sources(first, checkpoints, experts)


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


def _pieces(sources: _Sources, plan: ExpansionPlan, down: str, made_in: torch.dtype, region: Region) -> Iterator[Piece]:
    """A weight of every expert: the checkpoints' and, made along the lineage, the children's; or perturbed copies.

    Args:
        made_in: the dtype that children are rounded to.
    """
    if plan.perturb != "none":
        for number in range(len(plan.experts)):
            yield number, 0, _expert(sources, plan, down, number, region)
        return
    width = region.shape[-1]
    rows = max(1, PIECE // width) * width
    for begin, count in pieces(region.count, region.count if KERNELS[plan.merge].whole_tensor else rows):
        start = region.element + begin
        theta, *experts = (r.elements(region.tensor, start, count) for r in (sources.base, *sources.experts))
        made = _children(plan, theta, experts, region.tensor, start, made_in)
        last = sources.checkpoints[-1].elements(region.tensor, start, count) if plan.spread != 1 else None
        for number, values in enumerate(chain(experts, made)):
            yield number, begin, values if last is None else spread(last, values, plan.spread_of(number))


def _children(
    plan: ExpansionPlan, theta: Tensor, experts: Sequence[Tensor], tensor: str, start: int, dtype: torch.dtype
) -> Tensor:
    """(children, elements): a piece that begins at `start`, block by block."""
    children = [Child(e.parents, e.weights) for e in plan.children]
    made = torch.empty(len(children), len(theta), dtype=dtype)
    rest = children, plan.merge, plan.drop_rate, plan.seed, tensor
    for begin, count in pieces(len(theta), len(theta) if KERNELS[plan.merge].whole_tensor else BLOCK):
        block = slice(begin, begin + count)
        values = materialise(theta[block], [expert[block] for expert in experts], *rest, start + begin)
        for row, child in zip(made, values, strict=True):
            row[block] = child
    return made


def _expert(sources: _Sources, plan: ExpansionPlan, down: str, number: int, region: Region) -> Tensor:
    """A weight of an expert that is a checkpoint, the base or a perturbed copy of one."""
    weight = read_region(sources.experts[number], region)
    if (scale := plan.spread_of(number)) != 1:
        return spread(read_region(sources.checkpoints[-1], region), weight, scale)
    if plan.perturb == "none":
        return weight
    channels = 1 if region.tensor.endswith(down) else 0
    key = (plan.seed, number, f"{region.tensor}.{region.row}")
    return perturbed(weight, channels, plan.perturb, plan.perturb_rate, plan.noise_std, key)


def spread(last: Tensor, expert: Tensor, scale: float) -> Tensor:
    """The expert at `scale` times its distance from the last checkpoint, in fp32."""
    return torch.lerp(last.float(), expert.float(), scale)


def load(how: Load) -> Model:
    """A dense model or a plain MoE."""
    model = load_dense(how.folder, how.dtype, **how.where)
    return (model if how.where else model.to(how.device)).eval()


def save(model: Model, folder: Path, initial: Path) -> None:
    """With the configuration, tokenizer and lineage of the initial MoE."""
    config = read_json(initial / "config.json")  # as written: training changes it
    dtype = getattr(torch, config["dtype"])
    if is_sharded(model):
        write_plain(model, folder, dtype)
    elif is_main():
        model.to(dtype).save_pretrained(folder)
    if is_main():
        write_config(folder, config)
        copy_companions(initial, folder)


def fix_constants(model: Model) -> None:
    """Leave those of a plain MoE as they are that training must not change."""
    config = model.config.to_dict()
    layout = moe_of(config).layout
    names = [constant.tensor for constant in layout.constants if not constant.trains]
    for name in (prefix(layout, layer) + name for layer in moe_layers(config) for name in names):
        model.get_parameter(in_memory(name)).requires_grad_(False)


def resume(model: Model, checkpoint: Path) -> None:
    """Load through from_pretrained, which maps the per-expert names on disk to the fused ones in memory."""
    if is_sharded(model):
        config = model.config.distributed_config
        take_over(model, load_dense(checkpoint, torch.float32, distributed_config=config))
    else:
        model.load_state_dict(load_dense(checkpoint, torch.float32).state_dict(), strict=True)


def router_keys(model: Model) -> list[str]:
    """As save_pretrained writes them."""
    config = model.config.to_dict()
    return router_tensors(moe_of(config).layout, config)


def no_fold(source: Path, _target: Path, _dtype: str, _base: str | None) -> None:
    """Raises UpcycleError: there is nothing to fold."""
    raise UpcycleError(f"{source} is already a plain model; leave out --fold")


def describe(folder: Path) -> Description:
    """From its configuration."""
    config = read_config(folder)
    experts, k = expert_counts(config)
    if not experts:
        return Description(f"A dense {config['model_type']} model{_beside(folder)}", plain=True)
    warnings = (f"{CLIENTS[limit.client]} and this {limit.moe}: {limit.what}." for limit in limits(config))
    lineage = LINEAGE.known(folder)
    slices = lineage.granularity if lineage else 1
    cut = f" of {slices} slices each, top-{k // slices} ({experts} experts, top-{k}, on disk)" if slices > 1 else ""
    what = f"A {config['model_type']} mixture of {counted(experts // slices, 'expert')}{cut or f', top-{k}'}"
    sizes = f": {_sizes(folder, config, experts, k, lineage.flops_over_dense)}" if lineage else ""
    return Description(what + _beside(folder) + sizes, plain=True, warnings=tuple(warnings))


def _beside(folder: Path) -> str:
    """What a multimodal folder has around the text model."""
    wrapper = wrapper_in(folder)
    if wrapper is None:
        return ""
    return f", the text part of a {wrapper.model_type} model ({ModelReader(folder).left_out / 1e6:,.1f}M beside it)"


def _sizes(folder: Path, config: Config, experts: int, active_experts: int, flops: float | None) -> str:
    """Parameters in all and for a token, and FLOPs over the dense model's, where the lineage has them."""
    reader, layers, hidden = ModelReader(folder), len(moe_layers(config)), config["hidden_size"]
    moe = moe_of(config)
    expert = layers * len(ffn(moe.layout)) * hidden * config[moe.size_field]
    total = reader.num_parameters
    active = total - (experts - active_experts) * expert
    over = f", {flops:.2f} times the dense FLOPs" if flops else ""
    return f"{total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M for a token{over}"


FFN = Kind(
    peft_types=(),
    frozen=frozenset(),
    check_base=check_base,
    read_base=checked_mapping,
    check_checkpoint=check_checkpoint,
    trainable=ffn_alone,
    num_saved=lambda model: model.num_parameters(),
    finish_checkpoint=finish_checkpoint,
    merge_rule=lambda _: None,
    compare=compare,
    assemble=assemble,
    load=load,
    save=save,
    save_checkpoint=None,
    resume=resume,
    router_keys=router_keys,
    fold=no_fold,
    active=active_ffns,
    describe=describe,
)
"""Only the FFNs are tuned."""
FULL = replace(FFN, trainable=whole_model)
"""All of the model is tuned; the FFNs become experts."""
