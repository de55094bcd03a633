"""What a training step holds at most, found by running it on tensors without values.

The model is the real one, of one and of two layers: every further layer adds the same. torch counts each tensor from
when it is made until it is freed.
"""

import json
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary
from trl.kernels import chunked_logprob
from trl.trainer import utils

from upcycle.experts import grouped, on_cpu
from upcycle.experts.grouped import use_own_products
from upcycle.types import Config, Model

CACHED = 64
"""Bytes that allocators round up to."""


@dataclass(frozen=True)
class Step:
    """How a model is trained, as far as it decides what a forward and a backward pass hold."""

    rows: int
    """Of a micro-batch."""
    length: int
    """Tokens of the longest row."""
    bf16: bool = False
    """Whether it computes in bf16, with weights in fp32: under autocast, or as FSDP gathers them."""
    sharded: bool = False
    """Whether weights are gathered a layer at a time, and gradients divided."""
    checkpointing: bool = False


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that live."""

    def __init__(self, known: Iterable[Any]) -> None:
        """
        Args:
            known: storages that are not counted.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known = WeakIdKeyDictionary()
        for storage in known:
            self._known[storage] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = -(-storage.nbytes() // CACHED) * CACHED
        self._known[storage] = size
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


def activations(config: Config, step: Step, trained: frozenset[str]) -> tuple[int, int]:
    """Bytes that a forward and a backward pass hold at most besides weights, gradients and optimizer.

    Args:
        trained: names of the parameters that get a gradient.

    Returns:
        Those of a model of one layer, and what the other layers add.
    """
    written = json.dumps(config, sort_keys=True)
    one, two = (_of_layers(written, layers, step, trained) for layers in (1, 2))
    return one, (two - one) * (int(config["num_hidden_layers"]) - 1)


# another optimizer, or another method on the same base, holds the same
@lru_cache(maxsize=128)
def _of_layers(written: str, layers: int, step: Step, trained: frozenset[str]) -> int:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = json.loads(written)
    cut = {**config, "num_hidden_layers": layers}
    if isinstance(cut.get("layer_types"), list):
        cut["layer_types"] = cut["layer_types"][:layers]
    if isinstance(cut.get("per_layer_config"), dict):
        cut["per_layer_config"] = {n: own for n, own in cut["per_layer_config"].items() if int(n) < layers}
    if "num_kv_shared_layers" in cut:  # those whose keys they share may be cut away
        cut["num_kv_shared_layers"] = 0
    made = CONFIG_MAPPING[cut["model_type"]](**cut)
    dtype = torch.bfloat16 if step.bf16 and step.sharded else torch.float32
    head = _head(step.bf16, config["vocab_size"])
    with FakeTensorMode(allow_non_fake_inputs=True), _experts_without_values(step.bf16), head:
        model: Model = AutoModelForCausalLM.from_config(made, dtype=dtype, trust_remote_code=False)
        model.train()
        use_own_products(model)
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if step.checkpointing:
            model.activation_checkpointing_enable()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        ids = torch.zeros(step.rows, step.length, dtype=torch.long)
        labels = ids.clone()
        held = _Held(parameter.untyped_storage() for parameter in model.parameters())
        with held:
            for parameter in model.parameters():  # those of earlier micro-batches, which new ones are added to
                if parameter.requires_grad:
                    parameter.grad = torch.empty_like(parameter)
            static = held.now
            with torch.autocast("cpu", torch.bfloat16) if step.bf16 and not step.sharded else nullcontext():
                output = model(input_ids=ids, labels=labels, use_cache=False, fused_lm_head=True)
                loss = -output.log_probs.sum()
            del output
            loss.backward()
        return held.most - static


@contextmanager
def _head(on_accelerator: bool, vocabulary: int) -> Iterator[None]:
    """TRL's head as it is on an accelerator (one kernel, no tensors between) or on a CPU, whose pages are taken when
    they are written."""
    if not on_accelerator:
        with mock.patch.object(
            utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", min(vocabulary, utils._CHUNKED_LOGPROB_CHUNK_SIZE)
        ):
            yield
        return
    kernel = mock.MagicMock()  # what is written is of no interest
    with mock.patch.multiple(chunked_logprob, _forward_tile=kernel, _backward_tile=kernel):
        yield


@contextmanager
def _experts_without_values(on_accelerator: bool) -> Iterator[None]:
    """Experts that nobody can ask how many tokens they have, and grouped products in any dtype: torch's own rule for
    tensors without values knows bf16 alone."""
    product: Any = _Product.apply
    with (
        mock.patch.object(grouped, "expert_ffns", grouped.grouped_ffns if on_accelerator else _equal_ffns),
        mock.patch.object(on_cpu, "each_run", lambda compute, runs: [compute(*run) for run in runs]),
        mock.patch.object(torch.nn.functional, "grouped_mm", lambda a, b, offs: product(a, b)),
    ):
        yield


def _equal_ffns(hidden: Tensor, up: Tensor, down: Tensor, weights: Tensor, order: Tensor, _ends: Tensor) -> Tensor:
    """Experts with equal shares of the slots; those that threads compute at once are one, which holds as much."""
    apply: Any = on_cpu.ExpertFfns.apply
    runs = -(-len(up) // torch.get_num_threads())
    output: Tensor = apply(hidden, up, down, weights, order, [len(order) * (n + 1) // runs for n in range(runs)])
    return output


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, matrices: Tensor) -> Tensor:
        ctx.save_for_backward(values, matrices)
        return values.new_empty(values.shape[0], matrices.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        values, matrices = ctx.saved_tensors
        return torch.empty_like(values), torch.empty_like(matrices)
