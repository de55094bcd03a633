"""The finished model as a folder that stands alone: a mixture of LoRA experts is folded into a plain MoE."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from upcycle.artifacts import INPUTS, MANIFEST, hash_model, read_manifest
from upcycle.console import say
from upcycle.errors import UpcycleError
from upcycle.merging.low_rank import Adapter
from upcycle.model_upcycling.assemble import write_shared
from upcycle.models.adapters import is_adapter, merged_weight, read_tensors
from upcycle.models.families import moe_config
from upcycle.models.folders import LINEAGE, copy_companions, find_model, require_space, write_config
from upcycle.models.identity import check_identity
from upcycle.models.layouts import FfnMove, Region, router_tensors
from upcycle.models.mapping import Mapping, map_model, read_region
from upcycle.models.mixture import BOTTLENECK, MixtureConfig, expert_updates, router_names
from upcycle.models.safetensors_io import DTYPE_NAMES, ModelReader, ModelWriter
from upcycle.models.streaming import map_tensors

NOT_EXPORTED = (MANIFEST, INPUTS, "log.json")


def export(source: Path, target: Path, fold: bool, dtype: str, base: str | None = None) -> None:
    """Write the MoE or mixture in `source` to `target`, which must not hold anything yet.

    Args:
        fold: write a mixture of LoRA experts as a plain MoE, expert i having the weights W + s_i B_i A_i.
        dtype: of a folded MoE; `source` is the base's.
        base: the dense model of a mixture; none given: the one that it names.

    Raises:
        UpcycleError: nothing to export, a target that is not empty, a mixture that cannot be folded, or logits that are
            not the mixture's.
    """
    if target.exists() and any(target.iterdir()):
        raise UpcycleError(f"{target} is not empty; give --to a new folder")
    if not is_adapter(source) and not (source / "config.json").is_file():
        raise UpcycleError(f"{source} holds no model; expected a finished run, its folder posttrain, or a model folder")
    if fold and not is_adapter(source):
        raise UpcycleError(f"{source} is a plain model already; leave out --fold")
    partial_target = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial_target, ignore_errors=True)  # of an export that was interrupted
    partial_target.mkdir(parents=True)
    if fold:
        fold_mixture(source, partial_target, dtype, base)
    else:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in NOT_EXPORTED:
                shutil.copyfile(path, partial_target / path.name)
    if target.exists():
        target.rmdir()
    partial_target.rename(target)
    needs = " (compact: it needs its base and upcycle; --fold makes a plain MoE)"
    say(f"export: {target}{needs if is_adapter(target) else ''}")


def fold_mixture(source: Path, target: Path, dtype: str, base_name: str | None = None) -> None:
    """Stream a mixture of LoRA experts into a plain MoE, and compare the logits of every expert.

    Memory is that of the adapters and a few pieces of tensors.

    Raises:
        UpcycleError: bottleneck experts, another base than the mixture was trained on, not enough disk space, or an
            expert whose logits are not the mixture's.
    """
    config = MixtureConfig.load(source)
    if config.peft_type == BOTTLENECK:
        raise UpcycleError(
            f"{source} has bottleneck experts (PESC), which are not linear: no weights of a plain MoE compute the "
            "same; export it without --fold, or use LoRA experts"
        )
    base = find_model(base_name or config.base_model_name_or_path)
    check_same_base(source, base)
    reader = ModelReader(base)
    mapping = map_model(base, reader, config.num_experts)
    experts = expert_updates(source, config)
    stored = reader.spec(mapping.ffn[0].dense.tensor).dtype if dtype == "source" else DTYPE_NAMES[dtype]
    require_space(target, mapping.num_parameters() * stored.itemsize, "the plain MoE", "take --dtype bfloat16")
    with ModelWriter(target, mapping.specs(stored)) as writer:
        map_tensors(lambda move: write_shared(writer, move, [reader]), mapping.shared, "export: shared weights")
        map_tensors(partial(_write_experts, writer, reader, experts), mapping.ffn, "export: folding experts")
        for name, tensor in _small_tensors(mapping, read_tensors(source)).items():
            writer.write(name, tensor)
    dtype_name = str(stored).removeprefix("torch.")
    k, m = config.num_experts_per_tok, config.num_experts
    write_config(target, moe_config(mapping.family, mapping.config, m, k, dtype_name))
    copy_companions(source, target)
    if (source / LINEAGE).is_file():
        shutil.copyfile(source / LINEAGE, target / LINEAGE)
    made = ModelReader(target)
    difference = max(
        check_identity(mapping, partial(_folded, reader, expert, stored), partial(read_region, made), number)
        for number, expert in enumerate(experts)
    )
    millions = mapping.num_parameters() / 1e6
    say(f"export: {mapping.family.moe.model_type} with {m} experts, {millions:.1f}M parameters in {dtype_name}")
    say(f"export: logits of a cut-down copy with each expert are those of its adapter (difference {difference:.0e})")


def check_same_base(source: Path, base: Path) -> None:
    """Raises UpcycleError if a run trained the mixture on another base than `base`."""
    manifest = read_manifest(source)
    if manifest is not None and manifest.inputs["base"] != hash_model(base):
        raise UpcycleError(
            f"{base} is not the base that {source} was trained on (its files have other hashes); give --base"
        )


def _small_tensors(mapping: Mapping, kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """The routers, and what the architecture insists on and that holds nothing."""
    names = router_tensors(mapping.family.moe.layout, mapping.config)
    routers = {name: kept[old] for name, old in zip(names, router_names(len(names)), strict=True)}
    return routers | {name: torch.zeros(shape) for name, shape in mapping.zeros.items()}


def _write_experts(writer: ModelWriter, reader: ModelReader, experts: Sequence[Adapter], move: FfnMove) -> None:
    for expert, target in zip(experts, move.experts, strict=True):
        writer.write(target.tensor, _updated(reader, expert, move.dense), target.element)


def _updated(reader: ModelReader, expert: Adapter, region: Region) -> Tensor:
    return merged_weight(read_region(reader, region), expert.get(region.tensor.removesuffix(".weight")))


def _folded(reader: ModelReader, expert: Adapter, dtype: torch.dtype, region: Region) -> Tensor:
    return _updated(reader, expert, region).to(dtype)
