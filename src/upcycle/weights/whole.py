"""A MoE of text put in the place of the text model that it came from, among the wrapper's other parts."""

from math import prod
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.reading import read_json
from upcycle.types import Config
from upcycle.weights.folders import copy_companions, copy_files, write_config
from upcycle.weights.names import HEAD
from upcycle.weights.safetensors_io import ModelReader, ModelWriter, pieces
from upcycle.weights.streaming import PIECE
from upcycle.weights.wrappers import OF_THE_WHOLE, TEXT_CONFIG, WRAPPERS, Wrapper, wrapper_in

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
NORM = "model.norm.weight"


def check_keeps(folder: Path, moe: str) -> None:
    """
    Args:
        moe: `model_type` of the MoE that the folder's text model becomes.

    Raises:
        UpcycleError: it cannot take the text model's place in transformers.
    """
    wrapper = wrapper_in(folder)
    if wrapper is None:
        raise UpcycleError(
            f"assemble.keep_vision: {folder} is a model of text alone, it has nothing to keep; leave the setting out"
        )
    if moe not in wrapper.keeps:
        able = ", ".join(f"{w.model_type} ({' or '.join(w.keeps)})" for w in WRAPPERS.values() if w.keeps)
        raise UpcycleError(
            f"assemble.keep_vision: {folder} is a {wrapper.model_type} model whose text model becomes {moe}, which "
            f"cannot take its place there; known: {able}. For a MoE of text leave the setting out"
        )


def write_whole(text: Path, base: Path, out_dir: Path) -> None:
    """Write the wrapper `base` with the MoE of text in `text` instead of its text model.

    Tensors of the other parts keep their names and bytes. Memory is that of a few pieces.
    """
    wrapper = wrapper_in(base)
    assert wrapper is not None
    moe, whole = ModelReader(text), ModelReader(base, whole=True)
    places = _places(wrapper, moe, whole)
    specs = {name: reader.spec(source) for name, (reader, source) in places.items()}
    with ModelWriter(out_dir, specs) as writer:
        for name, (reader, source) in places.items():
            for begin, count in pieces(prod(specs[name].shape), PIECE):
                writer.write(name, reader.elements(source, begin, count), begin)
    write_config(out_dir, _config(read_json(base / "config.json"), read_json(text / "config.json")))
    copy_companions(text, out_dir)
    copy_files(base, out_dir, PROCESSOR_FILES)


def _places(wrapper: Wrapper, moe: ModelReader, whole: ModelReader) -> dict[str, tuple[ModelReader, str]]:
    """Every tensor's name to where it is read; the text's have the prefix that they have in the base."""
    own = {wrapper.text_name(name): name for name in whole.names()}
    prefix = own[NORM].removesuffix(NORM.removeprefix("model."))
    head = own.get(HEAD, wrapper.heads[0] + "weight")

    def place(name: str) -> str:
        return head if name == HEAD else prefix + name.removeprefix("model.")

    others = [name for name in whole.names() if wrapper.text_name(name) is None]
    return {name: (whole, name) for name in others} | {place(name): (moe, name) for name in moe.names()}


def _config(whole: Config, text: Config) -> Config:
    """What transformers takes from the whole is the MoE's there too."""
    own = {name: text[name] for name in OF_THE_WHOLE if name in whole and name in text}
    tied = {"tie_word_embeddings": bool(text.get("tie_word_embeddings"))}  # or the wrapper's default would count
    return {**whole, **own, **tied, "dtype": text["dtype"], TEXT_CONFIG: text}
