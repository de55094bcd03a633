"""Model folders: find them, read their configuration, load dense and plain models, finish them for other programs."""

import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from upcycle.disk import check_name, expanded
from upcycle.errors import UpcycleError
from upcycle.reading import brief, hub_problem, read_json
from upcycle.records.files import LINEAGE
from upcycle.types import Config, Model
from upcycle.weights.safetensors_io import ADAPTER, COMPILED, ModelReader
from upcycle.weights.wrappers import wrapper_in, wrapper_of

BUILTIN_BASE = "builtin:tiny"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    TEMPLATE,
    TEMPLATES,
)
GENERATION = "generation_config.json"
SETTINGS_FILES = (GENERATION,)
COMPANIONS = (*TOKENIZER_FILES, *SETTINGS_FILES, LINEAGE.name)
"""What lies beside weights and configuration."""
FLOAT, NO_JSON_FLOATS = "__float__", ("Infinity", "-Infinity", "NaN")
MOST_LAYERS = 10_000
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")
HUB_OTHERS = ("consolidated*", *(f"*/*{ending}" for ending in (".safetensors", ".json", ".txt", ".model", ".md")))
"""The same weights for other programs, and what lies in folders but templates."""
HUB: dict[str, Any] = {"allow_patterns": list(HUB_FILES), "ignore_patterns": list(HUB_OTHERS)}
Loaded = tuple[Model, dict[str, Any]]
"""A model, and the keys that did not fit."""


def find_model(name: str) -> Path:
    """The local folder of a model: given as a folder, `builtin:tiny`, or a hub name (downloaded once).

    Raises:
        UpcycleError: none of these, or a name that is not UTF-8.
    """
    if name == BUILTIN_BASE:
        return Path(__file__).parents[1] / "assets" / "tiny_base"
    path = expanded(name)
    if path.is_dir():
        return check_name(path)
    if not _on_hub(name):
        raise UpcycleError(f"model folder {name} does not exist (nor is it a hub name, owner/model)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, **HUB))
    except Exception as error:
        raise UpcycleError(f"model '{name}': no such folder here, and not from the hub: {hub_problem(error)}") from None


def _on_hub(name: str) -> bool:
    """Whether a name that is no folder here may be one there."""
    path = expanded(name)
    return not (path.is_dir() or path.is_absolute() or name.startswith(".") or name.count("/") != 1)


def is_here(name: str) -> bool:
    """Whether `find_model` would download nothing: for hub names, whether a copy is in the cache."""
    if name == BUILTIN_BASE or not _on_hub(name):
        return True
    from huggingface_hub import snapshot_download

    try:
        return bool(snapshot_download(name, **HUB, local_files_only=True))
    except Exception:
        return False


def read_config(folder: Path) -> Config:
    """The decoded config.json; of a multimodal wrapper its text model's.

    Raises:
        UpcycleError: it is missing or not a JSON object, or that of a wrapper of which nothing is known.
    """
    path = folder / "config.json"
    if not path.exists():
        adapter = ", but an adapter: name the base that it was trained on" * (folder / ADAPTER).is_file()
        raise UpcycleError(f"{folder} is not a model folder: it has no config.json{adapter}")
    try:
        config = _with_floats(read_json(path))
        _check_language_model(config, path)
        if config.get("model_type") == "mistral" and "layer_types" in config:
            config = {**config, "model_type": "ministral"}  # as AutoConfig takes it
        return _resolved(config, path)
    except RecursionError:
        raise UpcycleError(f"{path}: not JSON that can be read (nested too deeply)") from None


def _check_language_model(config: Config, path: Path) -> None:
    names = config.get("architectures")
    if isinstance(names, list) and any("Classification" in str(name) for name in names):
        raise UpcycleError(
            f"{path}: architectures is {brief(names)}, a classifier (reward models are) without a head for tokens; "
            "take the language model that it was made from"
        )


def _with_floats(value: Any) -> Any:
    """A decoded JSON value, with the floats that JSON lacks: transformers writes Infinity as `{FLOAT: "Infinity"}`."""
    if isinstance(value, dict):
        tag = value.get(FLOAT) if len(value) == 1 else None
        return float(tag) if tag in NO_JSON_FLOATS else {name: _with_floats(part) for name, part in value.items()}
    return [_with_floats(part) for part in value] if isinstance(value, list) else value


def _resolved(config: Config, path: Path) -> Config:
    """With the architecture's own defaults for what the file leaves out, in the fields of transformers 5.

    A MoE's defaults differ from its dense twin's, so every field must be known to be written out.
    """
    from transformers import CONFIG_MAPPING

    if quantized := config.get("quantization_config"):
        raise UpcycleError(
            f"{path}: quantization_config is {brief(quantized)}; a quantized model has to be dequantized first, and if "
            "its weights are 16 or 32 bits already, the field is a leftover: remove it"
        )
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:  # before a list of that many is made
        raise UpcycleError(f"{path}: num_hidden_layers is {layers}, expected at most {MOST_LAYERS:,}")
    wrapper, model_type = wrapper_of(config, path), config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return config
    try:
        known = CONFIG_MAPPING[model_type].from_dict(config)
        resolved: Config = known.to_dict()
    except Exception as error:  # the strict dataclasses of huggingface_hub raise their own kinds
        raise UpcycleError(f"{path} is not a valid {model_type} configuration: {error}") from None
    if wrapper is not None:
        return _of_text_alone(_resolved(wrapper.text_config(resolved), path))
    resolved = without_null_switches(resolved)
    # some do not write what they imply
    return {"num_hidden_layers": getattr(known, "num_hidden_layers", None), **resolved}


def without_null_switches(config: Config) -> Config:
    """With false for a switch that is null, and 0 for a dropout: what they are taken for, but not by every class."""
    from transformers import CONFIG_MAPPING

    off: dict[str, bool | float] = {
        name: 0.0 if name.endswith("dropout") else False
        for name, default in CONFIG_MAPPING[config["model_type"]]().to_dict().items()
        if isinstance(default, bool) or name.endswith("dropout")
    }
    return {name: off.get(name) if value is None else value for name, value in config.items()}


def _of_text_alone(config: Config) -> Config:
    """With the name of the class that loads the text model: a wrapper's configuration has it for the whole alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    name = CLASSES.get(config["model_type"])
    return {**config, "architectures": [name]} if name else config


def four_bit_config(dtype: torch.dtype) -> Any:
    """4-bit weights (NF4) that compute in `dtype`.

    Raises:
        UpcycleError: there is no GPU, or no bitsandbytes.
    """
    from importlib.util import find_spec

    missing = "a GPU" if not torch.cuda.is_available() else "the package bitsandbytes"
    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        raise UpcycleError(f"lora.four_bit needs {missing}, which is not available; set lora.four_bit=false")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_dense(folder: Path, dtype: torch.dtype, four_bit: bool = False, **where: Any) -> Model:
    """A model of its own, no adapters, on the CPU (in 4 bits: on the GPU); of a wrapper its text model.

    From safetensors; never unpickles, runs no remote code.

    Args:
        where: from_pretrained's `distributed_config` or `device_map`; without one the model is on the CPU.

    Raises:
        UpcycleError: it cannot be loaded; or keys are missing or left over, so that it would be partly random.
    """
    from transformers import AutoModelForCausalLM

    how = {**where, "quantization_config": four_bit_config(dtype)} if four_bit else where
    load = _from_text_part if wrapper_in(folder) else partial(_from_folder, AutoModelForCausalLM)
    model, info = _loaded(load, folder, dtype=dtype, **how)
    return _with_valid_generation(_complete(model, info, str(folder)))


def load_as_others_do(folder: Path, dtype: torch.dtype) -> tuple[Config, dict[str, torch.Tensor]]:
    """Configuration and tensors of the dense model in a folder, as transformers alone reads and would write them.

    Of a wrapper those of its text model, cut out of the whole that transformers loads.

    Raises:
        UpcycleError: see `load_dense`.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    wrapper = wrapper_in(folder)
    if wrapper is None:
        model = load_dense(folder, dtype)
        return without_null_switches(model.config.to_dict()), revert_weight_conversion(model, model.state_dict())
    whole, _ = _loaded(partial(_from_folder, AutoModelForImageTextToText), folder, dtype=dtype)
    written = revert_weight_conversion(whole, whole.state_dict())
    named = ((wrapper.text_name(name), tensor) for name, tensor in written.items())
    config = _resolved(whole.config.to_dict(), folder / "config.json")
    return config, {name: tensor for name, tensor in named if name is not None}


def _loaded(load: Callable[..., Loaded], folder: Path, **how: Any) -> Loaded:
    read_json(folder / "config.json")  # with errors that name the place
    try:
        return load(folder, **how)
    except UpcycleError:
        raise
    except Exception as error:  # what is damaged surfaces as any kind
        raise UpcycleError(f"the model in {folder} cannot be loaded: {type(error).__name__}: {error}") from error


def _from_folder(loader: Any, folder: Path, **how: Any) -> Loaded:
    found: Loaded = loader.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        key_mapping={COMPILED: ""},
        output_loading_info=True,
        trust_remote_code=False,
        **how,
    )
    return found


def _from_text_part(folder: Path, **how: Any) -> Loaded:
    """A wrapper's text model, from its tensors: with a mapping of names it would be saved under the wrapper's."""
    from transformers import GenerationConfig

    reader, config, wrapper = ModelReader(folder), read_config(folder), wrapper_in(folder)
    tensors = {name: reader.tensor(name) for name in reader.names()}
    if wrapper and wrapper.stacks:
        tensors = {name: _as_in_memory(name, tensor, config["hidden_size"]) for name, tensor in tensors.items()}
    model, info = _from_tensors(config, tensors, **how)
    model.name_or_path = ""  # else PEFT would look there for the text model's configuration
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model, info


def _as_in_memory(name: str, tensor: torch.Tensor, hidden: int) -> torch.Tensor:
    """Stacked experts, which lie one way or the other on disk, as (E, 2 I, H) and (E, H, I); any other as it is."""
    axis = {"gate_up_proj": -1, "down_proj": -2}.get(name.rpartition(".experts.")[2])
    return tensor if axis is None or tensor.shape[axis] == hidden else tensor.mT.contiguous()


def _from_tensors(config: Config, tensors: dict[str, torch.Tensor], **how: Any) -> Loaded:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    resolved = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    found: Loaded = MODEL_FOR_CAUSAL_LM_MAPPING[type(resolved)].from_pretrained(
        None, config=resolved, state_dict=tensors, output_loading_info=True, **how
    )
    return found


def _with_valid_generation(model: Model) -> Model:
    """Sampling settings without `do_sample` (older models have them) would refuse to be saved, after the training."""
    settings = model.generation_config
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            settings.do_sample = True
    return model


def base_name(name: str) -> str:
    """What an adapter calls its dense model: a hub name as it is, a folder by its whole path."""
    path = expanded(name)
    return str(path.resolve()) if path.is_dir() else name


def load_state(config: Config, tensors: dict[str, torch.Tensor], what: str) -> Model:
    """A causal language model in fp32 from a configuration and tensors named as on disk.

    Raises:
        UpcycleError: keys are missing or left over.
    """
    model, info = _from_tensors(config, tensors, dtype=torch.float32)
    return _complete(model, info, what).eval()


def _complete(model: Model, info: dict[str, Any], what: str) -> Model:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise UpcycleError(f"{what}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[:3]}")
    return model


def copy_companions(source: Path, folder: Path, chat_template: str | None = None) -> None:
    """Tokenizer, template, generation settings and lineage as they are; `chat_template` replaces the tokenizer's."""
    copy_files(source, folder, COMPANIONS)
    if chat_template is not None:
        (folder / TEMPLATE).write_text(chat_template)


def with_end(ends: int | list[int] | None, end: int | None) -> int | list[int] | None:
    """`eos_token_id` with one more token that ends a text."""
    known = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return ends if end is None or end in known else [*known, end]


def copy_files(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Those of the files that there are; of a folder the chat templates in it."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
        elif templates := sorted((source / name).glob("*.jinja")):
            (folder / name).mkdir(exist_ok=True)
            for path in templates:
                shutil.copyfile(path, folder / name / path.name)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def require_space(folder: Path, needed: int, what: str, hint: str) -> None:
    """Refuse work whose result would not fit on the disk.

    Raises:
        UpcycleError: says how many bytes are needed and how many are free.
    """
    free = shutil.disk_usage(folder).free
    written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())  # by a run that is being resumed
    if needed - written > free:
        raise UpcycleError(
            f"{what} needs {_size(needed)} in {folder}, where {_size(free)} are free; make room, "
            f"use a different --run, or {hint}"
        )


def write_config(folder: Path, config: Config) -> None:
    """config.json, indented like transformers' own."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
