"""The MoE from the plan, in one streaming pass: n dense models are read, one MoE is written.

Each expert's FFN goes straight into the MoE's shards; no child is ever a dense model on disk, and memory is that of a
few pieces of tensors.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from upcycle.artifacts import ExpansionPlan
from upcycle.console import say, track
from upcycle.errors import UpcycleError
from upcycle.merging.lineage import Child, materialise
from upcycle.models.families import family_of, ffn_names, moe_config, router_names
from upcycle.models.folders import copy_companions, read_config, require_space, write_config
from upcycle.models.routers import random_routers
from upcycle.models.safetensors_io import DTYPES, ModelReader, ModelWriter, TensorSpec, pieces
from upcycle.recipe import AssembleSettings

PIECE = 1 << 20
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


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
    """Write the MoE as a Hugging Face folder with the names that save_pretrained writes.

    Its router is random until the routing stage gives it a better one.

    Raises:
        UpcycleError: unsupported base, a tensor with no place in the MoE, or not enough disk space.
    """
    config = read_config(base)
    family = family_of(config, str(base))
    source, readers = ModelReader(base), [ModelReader(f) for f in folders]
    ffn = ffn_names(family, config)
    shared = _shared_names(source, readers, {dense for dense, _ in ffn}, bool(config.get("tie_word_embeddings")))
    dtype = _storage_dtype(readers[-1], ffn[0][0], settings)
    routers = random_routers(config["num_hidden_layers"], len(plan.experts), config["hidden_size"], router_std, seed)
    specs = {name: TensorSpec(source.spec(name).shape, dtype) for name in shared}
    for (dense, moe), expert in ((pair, e) for pair in ffn for e in range(len(plan.experts))):
        specs[moe.format(expert=expert)] = TensorSpec(source.spec(dense).shape, dtype)
    for name, router in zip(router_names(family, config), routers, strict=True):
        specs[name] = TensorSpec(tuple(router.shape), dtype)
    hint = "lower expand.num_experts or set assemble.dtype=bfloat16"
    require_space(out_dir, sum(spec.num_bytes for spec in specs.values()), "the MoE", hint)
    with ModelWriter(out_dir, specs) as writer:
        for name in track(shared, "assemble: shared weights"):
            _write_shared(writer, name, source, readers, settings.shared)
        for dense, moe in track(ffn, "assemble: experts"):
            _write_experts(writer, dense, moe, source, readers, plan)
        for name, router in zip(router_names(family, config), routers, strict=True):
            writer.write(name, router)
    dtype_name = str(dtype).removeprefix("torch.")
    write_config(out_dir, moe_config(config, len(plan.experts), settings.num_experts_per_tok, dtype_name))
    copy_companions(base, out_dir, chat_template)
    total = sum(torch.Size(spec.shape).numel() for spec in specs.values())
    say(f"assemble: {family.moe} with {len(plan.experts)} experts, {total / 1e6:.1f}M parameters in {dtype_name}")


def _write_experts(
    writer: ModelWriter,
    dense: str,
    moe: str,
    source: ModelReader,
    readers: Sequence[ModelReader],
    plan: ExpansionPlan,
) -> None:
    children = [Child(e.parents, e.weights) for e in plan.experts if e.kind == "child"]
    for begin, end, element in pieces(source.spec(dense).shape, PIECE):
        piece = source.rows(dense, begin, end).float().view(-1)
        checkpoints = [r.rows(dense, begin, end).float().view(-1) for r in readers]
        experts = materialise(piece, checkpoints, children, plan.drop_rate, plan.seed, dense, element)
        for expert, values in enumerate(experts):
            writer.write(moe.format(expert=expert), values, element)


def _write_shared(
    writer: ModelWriter, name: str, source: ModelReader, readers: Sequence[ModelReader], origin: str
) -> None:
    readers_of = {"last": [readers[-1]], "mean": list(readers), "base": [source]}[origin]
    for begin, end, element in pieces(source.spec(name).shape, PIECE):
        values: list[Tensor] = [reader.rows(name, begin, end).float() for reader in readers_of]
        writer.write(name, torch.stack(values).mean(dim=0) if len(values) > 1 else values[0], element)


def _shared_names(source: ModelReader, readers: Sequence[ModelReader], ffn: set[str], tied: bool) -> list[str]:
    """Every weight that is not an expert's; what some files carry without need is left aside."""
    names = _needed(source, tied)
    for reader in readers:
        if _needed(reader, tied) != names:
            odd = sorted(_needed(reader, tied) ^ names)[0]
            raise UpcycleError(f"{reader.folder}: tensor {odd} is in only one of this checkpoint and the base")
        for name in names:
            found, expected = reader.spec(name).shape, source.spec(name).shape
            if found != expected:
                raise UpcycleError(f"{reader.folder}: {name} has shape {found}, the base has {expected}")
    strange = [n for n in names - ffn if ".mlp." in n]
    if strange:
        raise UpcycleError(f"{source.folder}: {sorted(strange)[0]} has no place in the mixture of experts")
    return sorted(names - ffn)


def _needed(reader: ModelReader, tied: bool) -> set[str]:
    # older files repeat the tied head, and a table of rotary frequencies that is computed anyway
    return {n for n in reader.names() if not n.endswith("rotary_emb.inv_freq") and not (tied and n == "lm_head.weight")}


def _storage_dtype(reader: ModelReader, name: str, settings: AssembleSettings) -> torch.dtype:
    return reader.spec(name).dtype if settings.dtype == "source" else DTYPE_NAMES[settings.dtype]
