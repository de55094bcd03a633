"""Which dense models adapters can be experts of: by what their layers are made of, whatever the model's name.

A mixture of adapters is the dense model with its own attention, norms and embeddings, so it needs no MoE architecture;
only `upcycle export --fold` does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upcycle.architectures.agreement import check_agreement
from upcycle.architectures.check import check_source
from upcycle.architectures.families import family_of
from upcycle.architectures.family import Family
from upcycle.architectures.mapping import Mapping, looked_up, map_model, needed_tensors, with_own_head
from upcycle.architectures.slices import Slicing
from upcycle.errors import NoTwinError, UpcycleError
from upcycle.experts.linears import Structure, structure_of
from upcycle.reading import brief
from upcycle.recipe import Recipe
from upcycle.routing.routers import routers
from upcycle.types import Config, Model
from upcycle.weights.base import Base
from upcycle.weights.folders import BUILTIN_BASE, find_model, read_config
from upcycle.weights.safetensors_io import ModelReader

SIZES = ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")
"""Fields of config.json that are read here."""
WANTED = (
    "adapters as experts need in every layer an mlp of gate_proj, up_proj (or gate_up_proj) and down_proj, or of "
    "up_proj and down_proj alone (or c_fc and c_proj, or fc1 and fc2), of one size"
)


@dataclass(frozen=True)
class Dense:
    """A dense model as it lies in its folder."""

    config: Config
    """With every field written out."""
    num_dense: int
    """Parameters."""

    @property
    def lookup(self) -> int:
        """Entries of embeddings that are looked up and not multiplied."""
        return looked_up(self.config)


def read_dense(base: Base) -> Dense:
    """The model, by its configuration and the shapes in its files."""
    reader = ModelReader(base.folder)
    config = with_own_head(reader, base.config)
    return Dense(config, sum(prod(reader.spec(name).shape) for name in needed_tensors(reader, config)))


def checked_dense(base: Base) -> Dense:
    """The model, once transformers reads the same from its folder.

    Raises:
        UpcycleError: see `check_agreement`.
    """
    dense = read_dense(base)
    check_agreement(ModelReader(base.folder), dense.config)
    return dense


def mapping_of(base: Base, recipe: Recipe) -> Mapping:
    """From the base to the plain MoE of a recipe."""
    slicing = Slicing(recipe.assemble.granularity)
    return map_model(base.folder, ModelReader(base.folder), recipe.expand.num_experts, slicing, base.layers)


def checked_mapping(base: Base, recipe: Recipe) -> Mapping:
    """The mapping, once the MoE of a cut-down copy has the dense model's logits.

    Raises:
        UpcycleError: see `map_model` and `check_source`.
    """
    mapping = mapping_of(base, recipe)
    check_source(mapping, ModelReader(base.folder))
    return mapping


def check_base(base: Base) -> None:
    """Raises UpcycleError if adapters cannot be experts of a dense model, with what would work."""
    if (problem := problem_of(base.config)) is None:
        return
    try:
        family_of(base.config, str(base.folder))
        instead = "use prepare.train=ffn"
    except NoTwinError as error:
        instead = f"nor has it an exact plain MoE ({error.reason}), so use a different base"
    raise UpcycleError(f"{base.folder}: this {base.config.get('model_type')} model {problem}; {WANTED}; {instead}")


@contextmanager
def offering_adapters() -> Iterator[None]:
    """Say of a model that has no exact plain MoE whether adapters can be experts of it."""
    try:
        yield
    except NoTwinError as error:
        problem = problem_of(error.config)
        works = "LoRA experts work on it: prepare.train=lora (all but `upcycle export --fold`)"
        offer = works if problem is None else f"nor do LoRA experts work on it, as it {problem}; {WANTED}"
        raise NoTwinError(f"{error}; {offer}", error.reason, error.config) from None


def check_twin(folder: Path, config: Config) -> None:
    """Raises NoTwinError if a dense model has no exact plain MoE, with what works on it."""
    with offering_adapters():
        family_of(config, str(folder))


def check_routing(family: Family, config: Config, num_experts_per_tok: int) -> None:
    """Raises NoTwinError if the plain MoE of a dense model weighs a token's experts otherwise than a mixture does."""
    routing = family.moe.routing
    if routing == "softmax" or (routing == "sigmoid" and num_experts_per_tok == 1):  # the weight of one is 1
        return
    how = "normalises what it routes by" if routing == "normed" else "weighs experts by sigmoids"
    reason = f"{family.moe.model_type} {how}, the mixture by a softmax"
    raise NoTwinError(f"{family} would give different logits with several experts: {reason}", reason, config)


def may_have_twin(name: str, num_experts_per_tok: int) -> bool:
    """Whether a mixture on a dense model has an exact plain MoE; one that is not on this machine may have."""
    if name != BUILTIN_BASE and not Path(name).is_dir():
        return True
    folder = find_model(name)
    try:
        config = read_config(folder)
        check_routing(family_of(config, name), config, num_experts_per_tok)
    except UpcycleError:
        return False
    return True


def problem_of(config: Config) -> str | None:
    """What stands against adapters as experts of a (resolved) dense model, or None.

    It is built without values, and every layer's FFN must compute what a mixture takes it to compute.
    """
    if "text_config" in config:
        return "is multimodal"
    try:
        model = without_values(config)
    except UpcycleError as error:
        return str(error)
    if routers(model):
        return "is a mixture of experts already"
    layers = getattr(getattr(model, "model", None), "layers", ())
    if not layers or len(layers) != config.get("num_hidden_layers"):
        return "keeps its layers elsewhere than in model.layers"
    for field in SIZES:
        if not isinstance(config.get(field), int):
            return f"has {field} {brief(config.get(field))} in its config.json, expected a number"
    first = structure_of(getattr(layers[0], "mlp", None))
    problems = (_problem(layer, first, config["hidden_size"], config["intermediate_size"]) for layer in layers)
    return next((f"has in layer {number} {problem}" for number, problem in enumerate(problems) if problem), None)


def structure_in(config: Config) -> Structure:
    """That of the FFNs of a (resolved) dense model, in which `problem_of` finds no problem."""
    found = structure_of(without_values(config).model.layers[0].mlp)
    assert found is not None
    return found


def without_values(config: Config) -> Model:
    """A causal language model on the meta device.

    Raises:
        UpcycleError: transformers has none for the configuration.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UpcycleError("is not a causal language model that transformers knows")
    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config), trust_remote_code=False)
    except Exception as error:  # what is inconsistent surfaces as any kind
        raise UpcycleError(f"cannot be built by transformers ({type(error).__name__}: {error})") from None
    model: Model = made
    return model


def _problem(layer: nn.Module, structure: Structure | None, hidden: int, channels: int) -> str | None:
    """What a layer has instead of an FFN of a structure."""
    ffn = getattr(layer, "mlp", None)
    if not isinstance(ffn, nn.Module):
        return f"no mlp but {', '.join(name for name, _ in layer.named_children())}"
    found = {name: tuple(parameter.shape) for name, parameter in ffn.named_parameters()}
    if structure is None or structure_of(ffn) is not structure or not _fits(found, structure, hidden, channels):
        return f"an mlp of {', '.join(f'{name} {shape}' for name, shape in found.items())}"
    if not callable(getattr(ffn, structure.act, None)) or not _computes(ffn, structure):
        return f"an mlp that computes something else than {structure.formula}"
    return None


def _fits(found: dict[str, tuple[int, ...]], structure: Structure, hidden: int, channels: int) -> bool:
    """Whether parameters are the weights of the linear layers, perhaps their biases, and the activation's own."""
    shapes = structure.shapes(hidden, channels)
    weights = {f"{name}.weight": shape for name, shape in shapes.items()}
    biases = {f"{name}.bias": (outputs,) for name, (outputs, _) in shapes.items()}
    rest = {name: shape for name, shape in found.items() if not name.startswith(f"{structure.act}.")}
    return weights.items() <= rest.items() <= {**weights, **biases}.items()


@torch.no_grad()
def _computes(ffn: nn.Module, structure: Structure) -> bool:
    """Whether the module's own forward is the structure's formula: run with small values in the place of its own."""
    small: Any = deepcopy(ffn).eval()
    draw = torch.Generator().manual_seed(0)
    for name, (outputs, inputs) in structure.shapes(4, 6).items():
        linear = nn.Linear(inputs, outputs, bias=ffn.get_submodule(name).bias is not None, device="meta")
        setattr(small, name, linear)
    small = small.to_empty(device="cpu")
    x = torch.randn(1, 3, 4, generator=draw)
    try:
        for values in (*small.parameters(), *small.buffers()):
            values.normal_(generator=draw)
        return torch.allclose(small(x), structure.output(small, getattr(small, structure.act), x))
    except (RuntimeError, TypeError):  # it takes more than x, or more tensors of its own
        return False
