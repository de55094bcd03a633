"""What a dense model would become, before anything is spent on it."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from upcycle.architectures.agreement import check_agreement
from upcycle.architectures.clients import CLIENTS, served_by
from upcycle.architectures.families import expert_counts
from upcycle.architectures.identity import check_identity
from upcycle.architectures.layouts import channels, ffn_layers
from upcycle.architectures.mapping import SLICE_MULTIPLE, Mapping, map_model, read_region
from upcycle.architectures.slices import Slicing
from upcycle.console import say, table, tell
from upcycle.errors import UpcycleError
from upcycle.weights.folders import find_model, read_config
from upcycle.weights.safetensors_io import DTYPE_NAMES, ModelReader
from upcycle.weights.wrappers import wrapper_in

CHOICE = ("experts", "layers", "k", "G", "M parameters", "active", "FLOPs / dense", "GB in bf16", "GB to post-train")
CHOICE_NOTE = (
    "k: experts that each token uses; G: slices that every expert is cut into; active: M parameters that a token uses; "
    "FLOPs / dense: a token's, over the dense model's; GB to post-train: fp32 with AdamW, without activations"
)
TRAINED = torch.float32
"""Of checkpoints that a run trains, and so of a MoE with assemble.dtype=source."""
TRAINED_NOTE = (
    "the MoE has the dtype of its checkpoints: float32 where the run trains them, unless assemble.dtype says otherwise"
)
TRAINING_BYTES = 16
"""Per parameter in fp32 with AdamW: weight, gradient, two moments; activations come on top."""


# six parameters: the options of the verb
def check(
    name: str, num_experts: int, num_experts_per_tok: int, dtype: str, granularity: int = 1, as_json: bool = False
) -> Mapping:
    """Say what MoE a model would become and what that needs, once its logits with equal experts are the dense ones.

    Raises:
        UpcycleError: it cannot become one exactly, with the reason and what would work.
    """
    folder = find_model(name)
    reader = ModelReader(folder)
    if not as_json:
        say_text_part(reader)
    mapping = map_model(folder, reader, num_experts, Slicing(granularity))
    difference = check_source(mapping, reader)
    stored = mapping.widest(reader) if dtype == "source" else DTYPE_NAMES[dtype]
    if as_json:
        print(json.dumps(_facts(mapping, num_experts_per_tok, stored, difference), indent=2))
        return mapping
    sliced = f" of {granularity} slices" if granularity > 1 else ""
    title = f"{folder.name}: {mapping.family}, {num_experts} experts{sliced}, top-{num_experts_per_tok}"
    wider = dtype == "source" and stored.itemsize < TRAINED.itemsize
    table(title, ("", ""), _rows(mapping, num_experts_per_tok, stored, wider), note=TRAINED_NOTE * wider)
    title = "choices (expand.num_experts, assemble.layers, assemble.num_experts_per_tok, assemble.granularity)"
    table(title, CHOICE, _choices(mapping, reader), note=CHOICE_NOTE)
    config = mapping.moe_config(num_experts_per_tok, str(stored))
    table("programs that can load the MoE", ("", ""), [("transformers", "yes"), *served_by(config)])
    tell("read: Upcycle and transformers read the same tensors from the folder")
    tell(f"exact: logits with equal experts are the dense model's (difference {difference:.0e} of the largest)")
    return mapping


def _facts(mapping: Mapping, active: int, stored: torch.dtype, difference: float) -> dict[str, Any]:
    """What `check` says, for scripts; sizes in bytes."""
    total, served = mapping.num_parameters(), served_by(mapping.moe_config(active, str(stored)))
    return {
        "model": str(mapping.where),
        "dense": mapping.family.dense,
        "moe": mapping.family.moe.model_type,
        "num_experts": mapping.num_experts,
        "num_experts_per_tok": active,
        "granularity": mapping.granularity,
        "dtype": str(stored).removeprefix("torch."),
        "dense_parameters": mapping.num_dense,
        "parameters": total,
        "active_parameters": mapping.num_parameters(active),
        "flops_over_dense": mapping.flops_over_dense(active),
        "stored_bytes": total * stored.itemsize,
        "float32_bytes": total * TRAINED.itemsize,
        "training_bytes": total * TRAINING_BYTES,
        "logit_difference": difference,
        "programs": {"transformers": "yes", **dict(zip(CLIENTS, (said for _, said in served), strict=True))},
    }


def _choices(mapping: Mapping, reader: ModelReader) -> Iterator[tuple[str, ...]]:
    """What other settings would cost: as many experts as were asked for, and half; all layers, and every second one."""
    size, m = channels(mapping.family.layout, mapping.config), mapping.num_experts
    fine = [g for g in (2, 4, 8) if size % (g * SLICE_MULTIPLE) == 0]
    for count, (layers, made) in product(dict.fromkeys((m, max(2, m // 2))), _by_layers(mapping, reader)):
        for k, granularity in ((2, 1), *((1, g) for g in fine)):
            chosen = replace(made, num_experts=count, slicing=Slicing(granularity))
            total = chosen.num_parameters()
            sizes = f"{total / 1e6:,.1f}", f"{chosen.num_parameters(k) / 1e6:,.1f}", f"{chosen.flops_over_dense(k):.2f}"
            memory = f"{total * 2 / 1e9:,.2f}", f"{total * TRAINING_BYTES / 1e9:,.2f}"
            yield str(count), layers, str(k), str(granularity), *sizes, *memory


def _by_layers(mapping: Mapping, reader: ModelReader) -> Iterator[tuple[str, Mapping]]:
    yield "all", mapping
    every_second = ffn_layers(mapping.config)[1::2]
    with suppress(UpcycleError):  # its MoEs have experts in all layers
        yield "every: 2", map_model(mapping.where, reader, mapping.num_experts, layers=every_second)


def check_source(mapping: Mapping, reader: ModelReader) -> float:
    """The folder is read as transformers reads it, and the logits of a cut-down copy are the same, before all else."""
    check_agreement(reader, mapping.config)
    return check_identity(mapping, partial(read_region, reader), None, 0)


def say_text_part(reader: ModelReader, keeps: bool = False) -> None:
    """Which part of a multimodal wrapper is taken, and what is left out or, if the MoE keeps it, stays as it is."""
    wrapper = wrapper_in(reader.folder)
    if wrapper is None:
        return
    taken, others = (f"{count / 1e6:,.1f} M" for count in (reader.num_parameters, reader.left_out))
    what = f"text part of a {wrapper.model_type} model"
    if expert_counts(read_config(reader.folder))[0]:
        say(f"{what}: {taken} parameters, beside {others} of vision and the like")
        return
    able = "assemble.keep_vision=true keeps them" if wrapper.keeps else "the MoE reads text alone"
    fate = "kept as they are" if keeps else f"left out; {able}"
    say(f"{what}: {taken} parameters are taken, {others} of vision and the like are {fate}")


def _rows(mapping: Mapping, active: int, stored: torch.dtype, wider: bool) -> Iterator[tuple[str, str]]:
    """
    Args:
        wider: the MoE has more bits where its checkpoints do.
    """
    total, name = mapping.num_parameters(), str(stored).removeprefix("torch.")
    yield "parameters, dense", f"{mapping.num_dense / 1e6:,.1f} M"
    yield "parameters, total", f"{total / 1e6:,.1f} M"
    yield "parameters, active per token", f"{mapping.num_parameters(active) / 1e6:,.1f} M"
    yield "FLOPs per token, over the dense model's", f"{mapping.flops_over_dense(active):.2f}"
    yield f"disk, and memory to serve it, in {name}", f"{total * stored.itemsize / 1e9:,.2f} GB"
    if wider:
        yield "the same in float32", f"{total * TRAINED.itemsize / 1e9:,.2f} GB"
    yield "memory to route it on a CPU (fp32)", f"{total * 4 / 1e9:,.2f} GB"
    yield "memory to post-train all of it (fp32, AdamW)", f"{total * TRAINING_BYTES / 1e9:,.2f} GB and activations"
