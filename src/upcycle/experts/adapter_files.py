"""PEFT LoRA adapters of FFN weights, read without PEFT (which would need the whole model) and never unpickled."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from upcycle.disk import write_text
from upcycle.errors import UpcycleError
from upcycle.experts.linears import LINEARS, Shapes, weights_in
from upcycle.experts.structure import structure_in
from upcycle.merging.low_rank import LowRank
from upcycle.reading import brief, read_json
from upcycle.records.record import first_problem
from upcycle.types import Config
from upcycle.weights.folders import find_model
from upcycle.weights.safetensors_io import ADAPTER, DTYPE_CODES, plain_name

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = re.compile(rf"base_model\.model\.(model\.layers\.\d+\.mlp\.(?:{'|'.join(LINEARS)}))\.lora_(A|B)\.weight")
UNORDERED = ("target_modules", "exclude_modules")
HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
"""Fields of adapter_config.json that decide what its tensors add, as read here."""
INERT = {
    "arrow_config",
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "eva_config",
}
"""Fields that say nothing which the tensors do not say too; all others must be off, as PEFT has them by default."""
OFF: tuple[Any, ...] = (None, False, "none", {}, [], "")
SAME_BASE = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is; PiSSA, OLoRA, LoftQ, CorDA and others change it."""


Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]


class Scale(BaseModel):
    """The fields that decide how much an adapter adds; PEFT's defaults."""

    model_config = ConfigDict(strict=True, frozen=True)

    lora_alpha: Alpha = 8
    use_rslora: bool | None = False
    alpha_pattern: dict[str, Alpha] | None = None
    """By a regular expression that ends the module's name."""

    @field_validator("alpha_pattern")
    @classmethod
    def _are_expressions(cls, patterns: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{brief(pattern)} is not a regular expression ({error})") from None
        return patterns

    def of(self, name: str) -> float:
        """Alpha of a module; as PEFT, that of the first pattern that ends its name."""
        patterns = (self.alpha_pattern or {}).items()
        return next((alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", name)), self.lora_alpha)


def base_of(folder: Path, base: Path | None = None) -> Path:
    """The dense model that a folder's adapters add to: `base`, or the one that they name."""
    return base or find_model(str(read_adapter_config(folder).get("base_model_name_or_path")))


MERGE = "merge the adapter into a separate model and use that as a checkpoint (prepare.train=full)"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / CONFIG).is_file()


def read_adapter_config(folder: Path) -> Config:
    """The decoded adapter_config.json.

    Raises:
        UpcycleError: it is missing or not a JSON object.
    """
    return read_json(folder / CONFIG)


def read_adapter(folder: Path, base: Config) -> dict[str, LowRank]:
    """The updates of a LoRA adapter of FFN weights, by `model.layers.0.mlp.gate_proj`.

    Weights that lie in one linear layer have its A, and their rows of its B.

    Args:
        base: the dense model's configuration.

    Raises:
        UpcycleError: another kind of adapter, one of other weights than the FFN's or of another model, a damaged file,
            or values that are not finite.
    """
    config = read_adapter_config(folder)
    _check_kind(folder, config)
    scale = _scale_in(folder, config)
    structure = structure_in(base)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(folder).items():
        match = NAME.fullmatch(plain_name(name).replace(".default.weight", ".weight"))
        if match is None:
            raise UpcycleError(
                f"{folder / WEIGHTS}: {name} is not a LoRA factor of {' or '.join(structure.linears)}; an expert is an "
                "FFN block, so an adapter that changes anything else cannot be one: train it with "
                f"target_modules={list(structure.linears)}, or {MERGE}"
            )
        if tensor.dtype not in DTYPE_CODES or tensor.dim() != 2 or not tensor.numel():
            raise UpcycleError(
                f"{folder / WEIGHTS}: {name} is {str(tensor.dtype).removeprefix('torch.')} of shape "
                f"{tuple(tensor.shape)}, expected a matrix of floats; under DeepSpeed ZeRO-3 adapters are empty unless "
                "stage3_gather_16bit_weights_on_model_save is set"
            )
        if not tensor.isfinite().all():
            raise UpcycleError(f"{folder / WEIGHTS}: {name} holds NaN or Inf; leave this adapter out")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    if not pairs:
        raise UpcycleError(f"{folder / WEIGHTS} holds no tensor: nothing was trained, or it was saved without weights")
    shapes = _in_every_layer(base, structure.shapes(base["hidden_size"], base["intermediate_size"]))
    updates: dict[str, LowRank] = {}
    for name, pair in sorted(pairs.items()):
        updates |= _updates(folder, name, pair, scale, shapes.get(name))
    return updates


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of an adapter's file.

    Raises:
        UpcycleError: it is not there, or damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise UpcycleError(f"{folder} has no {WEIGHTS}: adapters must be safetensors")
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UpcycleError(f"{path} is not a readable safetensors file: {error}") from None


def name_base(folder: Path, name: str) -> None:
    """Write the dense model's name into an adapter's configuration; PEFT writes where it was loaded from.

    PEFT keeps some lists as sets, whose order differs from process to process: they are sorted.
    """
    config = {**read_adapter_config(folder), "base_model_name_or_path": name}
    for field in UNORDERED:
        if isinstance(config.get(field), list):
            config[field] = sorted(config[field])
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def ffn_shapes(base: Config) -> Shapes:
    """Of every FFN weight of a dense model, by the name of its module."""
    return _in_every_layer(base, structure_in(base).weight_shapes(base["hidden_size"], base["intermediate_size"]))


def _in_every_layer(base: Config, shapes: Shapes) -> Shapes:
    layers = range(base["num_hidden_layers"])
    return {f"model.layers.{layer}.mlp.{name}": shape for layer in layers for name, shape in shapes.items()}


def _check_kind(folder: Path, config: Config) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise UpcycleError(f"{folder / CONFIG}: peft_type is {kind!r}, expected 'LORA'")
    for field, found in config.items():
        if field not in HONOURED | INERT and found not in OFF:
            raise UpcycleError(
                f"{folder / CONFIG}: {field} is {brief(found)}, which Upcycle does not support: what it adds would "
                f"be lost; {MERGE}"
            )
    if (start := config.get("init_lora_weights", True)) not in SAME_BASE:
        raise UpcycleError(
            f"{folder / CONFIG}: init_lora_weights is {brief(start)}, which changed the base too, so the adapter "
            "belongs to a different model; convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _scale_in(folder: Path, config: Config) -> Scale:
    try:
        return Scale.model_validate(config)
    except ValidationError as error:
        raise UpcycleError(f"{folder / CONFIG}: {first_problem(error)}; restore the file as PEFT wrote it") from None


def _updates(
    folder: Path, name: str, pair: dict[str, Tensor], scale: Scale, expected: tuple[int, int] | None
) -> dict[str, LowRank]:
    """Of the weights in the linear layer `name`, which is `expected` (outputs, inputs), from its factors."""
    if pair.keys() != {"A", "B"}:
        raise UpcycleError(f"{folder / WEIGHTS}: {name} has only lora_{next(iter(pair))}, expected lora_A and lora_B")
    a, b = pair["A"], pair["B"]
    if expected is None or (b.shape[0], a.shape[1]) != expected or b.shape[1] != a.shape[0]:
        raise UpcycleError(
            f"{folder / WEIGHTS}: {name} has factors {tuple(b.shape)} and {tuple(a.shape)}, the base's weight is "
            f"{expected or 'not there'}; the adapter belongs to a different model"
        )
    weights = weights_in(name)
    scaling = scale.of(name) / (math.sqrt(len(a)) if scale.use_rslora else len(a))
    return {weight: LowRank(a, rows, scaling) for weight, rows in zip(weights, b.chunk(len(weights)), strict=True)}


def merged_weight(weight: Tensor, update: LowRank | None) -> Tensor:
    """W + s B A in fp32; W as it is without an update."""
    return (
        weight
        if update is None
        else torch.addmm(weight.float(), update.b.float(), update.a.float(), alpha=update.scaling)
    )
