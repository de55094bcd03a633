"""Model folders: find them, read their configuration, load them, finish them for other programs."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UpcycleError
from upcycle.models.adapters import is_adapter, read_adapter_config
from upcycle.models.families import MOES, moe_of
from upcycle.models.layouts import Config, router_tensors
from upcycle.models.mixture import (
    BOTTLENECK,
    LORA,
    ROUTER_MODULE,
    MixtureConfig,
    attach,
    load_tensors,
    mixture_of,
    router_names,
    save_mixture,
)

BUILTIN_BASE = "builtin:tiny"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
LINEAGE = "upcycle_plan.json"
"""The expansion plan that a MoE carries with it."""
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md")


def find_model(name: str) -> Path:
    """The local folder of a model: given as a folder, `builtin:tiny`, or a hub name (downloaded once).

    Raises:
        UpcycleError: none of these.
    """
    if name == BUILTIN_BASE:
        return Path(__file__).parents[1] / "assets" / "tiny_base"
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise UpcycleError(f"model folder {name} does not exist (nor is it a hub name, owner/model)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:
        raise UpcycleError(f"'{name}' is neither a folder nor a hub model that can be read: {error}") from None


def read_config(folder: Path) -> Config:
    """The decoded config.json.

    Raises:
        UpcycleError: it is missing or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UpcycleError(f"{folder} is not a model folder: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UpcycleError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UpcycleError(f"{path} holds {type(config).__name__}, expected an object")
    return _resolved(config, path)


def _resolved(config: Config, path: Path) -> Config:
    """With the architecture's own defaults for what the file leaves out, in the fields of transformers 5.

    A MoE's defaults differ from its dense twin's, so every field must be known to be written out.
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return config
    try:
        resolved: Config = CONFIG_MAPPING[model_type].from_dict(config).to_dict()
    except Exception as error:  # the strict dataclasses of huggingface_hub raise their own kinds
        raise UpcycleError(f"{path} is not a valid {model_type} configuration: {error}") from None
    return resolved


def pick_device() -> torch.device:
    """The accelerator, if there is one."""
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator() or "cpu")
    return torch.device("cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16 on an accelerator; fp32 on a CPU, where bf16 products can be a hundred times slower."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    base: Path | None = None,
    four_bit: bool = False,
) -> Any:
    """A causal language model from safetensors, in evaluation mode; never unpickles, runs no remote code.

    A folder with a mixture of adapters, or with one LoRA adapter, is loaded on its dense model.

    Args:
        base: the dense model of adapters; none given: the one that they name.
        four_bit: quantize a mixture's dense model (QLoRA, Dettmers et al. 2023, arXiv 2305.14314).

    Raises:
        UpcycleError: keys are missing or left over, so the model would be partly random.
    """
    if not is_adapter(folder):
        return load_dense(folder, dtype).to(device).eval()
    config = read_adapter_config(folder)
    base = base or find_model(str(config.get("base_model_name_or_path")))
    if config.get("peft_type") in (LORA, BOTTLENECK):
        model = attach(load_dense(base, dtype, four_bit), MixtureConfig.load(folder))
        load_tensors(model, folder)
        return (model if four_bit else model.to(device=device, dtype=dtype)).eval()
    from peft import PeftModel

    adapted: Any = PeftModel.from_pretrained(load_dense(base, dtype), str(folder))
    return adapted.merge_and_unload().to(device).eval()


def four_bit_config(dtype: torch.dtype) -> Any:
    """4-bit weights (NF4) that compute in `dtype`.

    Raises:
        UpcycleError: there is no GPU, or no bitsandbytes.
    """
    from importlib.util import find_spec

    missing = "a GPU" if not torch.cuda.is_available() else "the package bitsandbytes"
    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None:
        raise UpcycleError(f"lora.four_bit needs {missing}, which is not here; set lora.four_bit=false")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def load_dense(folder: Path, dtype: torch.dtype, four_bit: bool = False) -> Any:
    """A model of its own, no adapters, on the CPU (in 4 bits: on the GPU); see `load_model`."""
    from transformers import AutoModelForCausalLM

    quantized = {"quantization_config": four_bit_config(dtype)} if four_bit else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **quantized
    )
    return _complete(model, info, str(folder))


def base_name(name: str) -> str:
    """What an adapter calls its dense model: a hub name as it is, a folder by its whole path."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def save_model(model: Any, folder: Path, initial: Path) -> None:
    """Write a trained MoE, or a mixture of adapters, so that its folder stands alone like the `initial` one."""
    if mixture_of(model):
        save_mixture(model, folder)
        copy_companions(initial, folder)
    else:
        config = json.loads((initial / "config.json").read_text())  # as written: training changes it
        model.to(getattr(torch, config["dtype"])).save_pretrained(folder)
        write_config(folder, config)
        copy_companions(initial, folder)
    if (initial / LINEAGE).is_file():
        shutil.copyfile(initial / LINEAGE, folder / LINEAGE)


def load_state(config: Config, tensors: dict[str, torch.Tensor], what: str) -> Any:
    """A causal language model in fp32 from a configuration and tensors named as on disk.

    Raises:
        UpcycleError: keys are missing or left over.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    resolved = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(resolved)].from_pretrained(
        None, config=resolved, state_dict=tensors, dtype=torch.float32, output_loading_info=True
    )
    return _complete(model, info, what).eval()


def _complete(model: Any, info: dict[str, Any], what: str) -> Any:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise UpcycleError(f"{what}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[:3]}")
    return model


def copy_companions(source: Path, folder: Path, chat_template: str | None = None) -> None:
    """Tokenizer, chat template and generation settings as they are; `chat_template` replaces the tokenizer's."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)


def require_space(folder: Path, needed: int, what: str, hint: str) -> None:
    """Refuse work whose result would not fit on the disk.

    Raises:
        UpcycleError: says how many bytes are needed and how many are free.
    """
    free = shutil.disk_usage(folder).free
    written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())  # by a run that is being resumed
    if needed - written > free:
        raise UpcycleError(
            f"{what} needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; make room, take "
            f"another --run, or {hint}"
        )


def write_config(folder: Path, config: Config) -> None:
    """config.json, indented like transformers' own."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def routers(model: Any) -> list[tuple[Any, str]]:
    """(parent module, attribute) of every layer's router, in layer order."""
    module = ROUTER_MODULE if mixture_of(model) else moe_of(model.config.to_dict()).layout.module
    parent, _, attribute = module.rpartition(".")
    return [(layer.get_submodule(parent), attribute) for layer in model.model.layers]


def router_modules(model: Any) -> list[Any]:
    """The router of every layer, in layer order."""
    return [getattr(parent, attribute) for parent, attribute in routers(model)]


def num_experts(model: Any) -> int:
    """Experts per layer of a MoE or a mixture of adapters; 0 for a dense model."""
    if mixture_of(model) is None and model.config.model_type not in MOES:
        return 0
    return int(router_modules(model)[0].weight.shape[0])


def router_keys(model: Any) -> list[str]:
    """The name on disk of every layer's routing vectors."""
    config = model.config.to_dict()
    if mixture_of(model):
        return router_names(config["num_hidden_layers"])
    return router_tensors(moe_of(config).layout, config)


def load_routers(model: Any, path: Path) -> None:
    """Put the routing vectors of a router file into the model."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    with torch.no_grad():
        for name, router in zip(router_keys(model), router_modules(model), strict=True):
            router.weight.copy_(tensors[name])
