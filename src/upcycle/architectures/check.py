"""What a dense model would become, before anything is spent on it."""

from collections.abc import Iterator
from functools import partial

from upcycle.architectures.agreement import check_agreement
from upcycle.architectures.clients import served_by
from upcycle.architectures.families import moe_config
from upcycle.architectures.identity import check_identity
from upcycle.architectures.mapping import Mapping, map_model, read_region
from upcycle.console import say, table
from upcycle.weights.folders import find_model
from upcycle.weights.safetensors_io import DTYPE_NAMES, ModelReader

TRAINING_BYTES = 16
"""Per parameter in fp32 with AdamW: weight, gradient, two moments; activations come on top."""


def check(name: str, num_experts: int, num_experts_per_tok: int, dtype: str) -> Mapping:
    """Say what MoE a model would become and what that needs, once its logits with equal experts are the dense ones.

    Raises:
        UpcycleError: it cannot become one exactly, with the reason and what would work.
    """
    folder = find_model(name)
    reader = ModelReader(folder)
    mapping = map_model(folder, reader, num_experts)
    difference = check_source(mapping, reader)
    source = reader.spec(mapping.ffn[0].dense.tensor).dtype
    stored = source if dtype == "source" else DTYPE_NAMES[dtype]
    title = f"{folder.name}: {mapping.family}, {num_experts} experts, top-{num_experts_per_tok}, {stored}"
    table(title, ("", ""), _rows(mapping, num_experts_per_tok, stored.itemsize))
    config = moe_config(mapping.family, mapping.config, num_experts, num_experts_per_tok, str(stored))
    table("read by", ("", ""), [("transformers", "yes"), *served_by(config)])
    say("read: every tensor is what transformers reads from the folder")
    say(f"exact: logits with equal experts are the dense model's (difference {difference:.0e} of the largest)")
    return mapping


def check_source(mapping: Mapping, reader: ModelReader) -> float:
    """The folder is read as transformers reads it, and the logits of a cut-down copy are the same, before all else."""
    check_agreement(reader, mapping.config)
    return check_identity(mapping, partial(read_region, reader), None, 0)


def _rows(mapping: Mapping, active: int, itemsize: int) -> Iterator[tuple[str, str]]:
    total = mapping.num_parameters()
    yield "parameters, dense", f"{mapping.num_dense / 1e6:,.1f} M"
    yield "parameters, total", f"{total / 1e6:,.1f} M"
    yield "parameters, active per token", f"{mapping.num_parameters(active) / 1e6:,.1f} M"
    yield "disk for the assembled MoE", f"{total * itemsize / 1e9:,.2f} GB"
    yield "memory for its weights, to serve it", f"{total * itemsize / 1e9:,.2f} GB"
    yield "memory to route it on a CPU (fp32)", f"{total * 4 / 1e9:,.2f} GB"
    yield "memory to post-train all of it (fp32, AdamW)", f"{total * TRAINING_BYTES / 1e9:,.2f} GB and activations"
