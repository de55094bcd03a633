"""A MoE of text put in the place of the text model that it came from, among the wrapper's other parts."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from upcycle.errors import UpcycleError
from upcycle.reading import read_json
from upcycle.types import Config
from upcycle.weights.folders import copy_companions, copy_files, read_config, write_config
from upcycle.weights.names import HEAD
from upcycle.weights.safetensors_io import ModelReader, ModelWriter, TensorSpec, pieces
from upcycle.weights.streaming import PIECE
from upcycle.weights.wrappers import OF_THE_WHOLE, TEXT_CONFIG, WRAPPERS, Wrapper, wrapper_in

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
"""Not chat_template.json: processors read it before the template that the MoE has."""
NORM = "model.norm.weight"
FURTHER_TOKENS = "mtp."
"""What predicts them from the dense model; the programs that read it do without."""
EXPERT = re.compile(r"(.+\.experts\.)(\d+)\.(\w+)\.weight")
STACKS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
"""Of an expert's weight the tensor that has it where a layer's experts are one (`Wrapper.stacks`), in this order."""


@dataclass(frozen=True)
class _Source:
    """A tensor of the whole, with its values from the first to the last in runs."""

    spec: TensorSpec
    runs: Callable[[], Iterator[Tensor]]


def check_keeps(folder: Path, moe: str, expert_size: int) -> None:
    """
    Args:
        moe: `model_type` of the MoE that the folder's text model becomes.
        expert_size: channels of one of its experts.

    Raises:
        UpcycleError: it cannot take the text model's place.
    """
    wrapper = wrapper_in(folder)
    if wrapper is None:
        raise UpcycleError(
            f"assemble.keep_vision: {folder} is a text-only model, so there is nothing to keep; leave the setting out"
        )
    if moe not in wrapper.keeps:
        able = ", ".join(f"{w.model_type} ({' or '.join(w.keeps)})" for w in WRAPPERS.values() if w.keeps)
        raise UpcycleError(
            f"assemble.keep_vision: {folder} is a {wrapper.model_type} model whose text model becomes {moe}, which "
            f"cannot take its place there; known: {able}. For a text-only MoE leave the setting out"
        )
    whole, hidden = WRAPPERS[wrapper.keeps[moe]], read_config(folder)["hidden_size"]
    if whole.stacks and hidden in (expert_size, 2 * expert_size):
        raise UpcycleError(
            f"assemble.keep_vision: experts of {expert_size} channels beside hidden_size={hidden} make square "
            f"tensors, whose orientation transformers cannot detect in a {whole.model_type} model; change "
            "assemble.granularity"
        )


def source_of_others(base: Path, last: Path | None) -> Path:
    """The folder whose other parts are kept: the last checkpoint, if it has them all, or the base."""
    wrapper = wrapper_in(base)
    if last is None or wrapper is None or wrapper_in(last) != wrapper:
        return base
    there, wanted = (set(_others(wrapper, ModelReader(folder, whole=True))) for folder in (last, base))
    return last if wanted <= there else base


def more_bytes(text: Path, base: Path) -> int:
    """What the whole takes beside the MoE of text that it is written from: a copy of that, and the other parts."""
    wrapper, moe, whole = wrapper_in(base), ModelReader(text), ModelReader(base, whole=True)
    assert wrapper is not None
    copied = sum(moe.spec(name).num_bytes for name in moe.names())
    return copied + sum(whole.spec(name).num_bytes for name in _others(wrapper, whole))


def write_whole(text: Path, base: Path, out_dir: Path) -> None:
    """Write the wrapper `base` with the MoE of text in `text` instead of its text model.

    Tensors of the other parts keep their names and bytes. Memory is that of a few pieces.
    """
    wrapper, config = wrapper_in(base), read_json(text / "config.json")
    assert wrapper is not None
    made = WRAPPERS[wrapper.keeps[config["model_type"]]]
    sources = _sources(wrapper, ModelReader(text), ModelReader(base, whole=True), made.stacks)
    with ModelWriter(out_dir, {name: source.spec for name, source in sources.items()}) as writer:
        for name, source in sources.items():
            begin = 0
            for run in source.runs():
                writer.write(name, run, begin)
                begin += run.numel()
    write_config(out_dir, _config(made.model_type, wrapper, read_json(base / "config.json"), config))
    copy_companions(text, out_dir)
    copy_files(base, out_dir, PROCESSOR_FILES)


def _sources(wrapper: Wrapper, moe: ModelReader, whole: ModelReader, stacks: bool) -> dict[str, _Source]:
    """Every tensor, by name; the text's have the prefix that they have in the base."""
    own = {wrapper.text_name(name): name for name in whole.names()}
    prefix = own[NORM].removesuffix(NORM.removeprefix("model."))
    head = own.get(HEAD, wrapper.heads[0] + "weight")

    def place(name: str) -> str:
        return head if name == HEAD else prefix + name.removeprefix("model.")

    experts = _stacks(moe.names()) if stacks else {}
    lone = set(moe.names()) - {name for stack in experts.values() for parts in stack for name in parts}
    return {
        **{name: _copied(whole, name) for name in _others(wrapper, whole)},
        **{place(name): _copied(moe, name) for name in sorted(lone)},
        **{place(name): _stacked(moe, stack) for name, stack in experts.items()},
    }


def _others(wrapper: Wrapper, whole: ModelReader) -> list[str]:
    """The tensors of the wrapper's other parts."""
    return [name for name in whole.names() if wrapper.text_name(name) is None and not name.startswith(FURTHER_TOKENS)]


def _copied(reader: ModelReader, name: str) -> _Source:
    """As it is."""
    spec = reader.spec(name)
    return _Source(spec, lambda: (reader.elements(name, *run) for run in pieces(prod(spec.shape), PIECE)))


def _stacks(names: Sequence[str]) -> dict[str, list[list[str]]]:
    """Of the tensors that hold the experts of a layer: by expert, which weights they are made of."""
    stacks: dict[str, dict[int, list[str]]] = {}
    for match in filter(None, map(EXPERT.fullmatch, sorted(names))):
        before, expert, weight = match.groups()
        stacks.setdefault(before + STACKS[weight], {}).setdefault(int(expert), []).append(match[0])
    return {name: [stack[expert] for expert in sorted(stack)] for name, stack in stacks.items()}


def _stacked(reader: ModelReader, experts: list[list[str]]) -> _Source:
    """Of every expert its weights (rows, columns) below each other, transposed: (E, columns, rows)."""
    shapes = [reader.spec(name).shape for name in experts[0]]
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    spec = TensorSpec((len(experts), columns, rows), reader.spec(experts[0][0]).dtype)
    return _Source(spec, partial(_transposed, reader, experts, columns, max(PIECE // rows, 1)))


def _transposed(reader: ModelReader, experts: list[list[str]], columns: int, step: int) -> Iterator[Tensor]:
    for names in experts:
        weights = [reader.tensor(name) for name in names]
        for begin, count in pieces(columns, step):
            yield torch.cat([weight[:, begin : begin + count] for weight in weights]).T.flatten()


def _config(model_type: str, wrapper: Wrapper, whole: Config, text: Config) -> Config:
    """What transformers takes from the whole is the MoE's there too; positions have the axes of images again."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

    own = {name: text[name] for name in OF_THE_WHOLE if name in whole and name in text}
    tied = {"tie_word_embeddings": bool(text.get("tie_word_embeddings"))}  # or the wrapper's default would count
    if wrapper.text is not None:
        rope = CONFIG_MAPPING[wrapper.model_type].from_dict(whole).text_config.rope_parameters
        text = {**text, "rope_parameters": rope}
    kinds = CONFIG_MAPPING[model_type].sub_configs
    given = {name: part for name, part in {**whole, TEXT_CONFIG: text}.items() if name in kinds and part is not None}
    parts = {name: _of_kind(kinds[name], part) for name, part in given.items()}
    named = {"model_type": model_type, "architectures": [CLASSES[model_type]]}
    return {**whole, **own, **tied, **named, "dtype": text["dtype"], **parts}


def _of_kind(kind: type, part: Config) -> Config:
    """A part of a configuration, of the type that the whole wants; some take any."""
    wanted = getattr(kind, "model_type", None)
    return {**part, "model_type": wanted} if wanted else part
