"""mergekit's own merges of two models, in its environment: FOLDER/in.safetensors (base, a, b) -> OUT."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.slerp import slerp
from safetensors.torch import load_file, save_file

WEIGHTS = {"a": 0.3, "b": 0.7}


def merge(method: str, tensors: dict[str, torch.Tensor], density: float, normalize: bool) -> torch.Tensor:
    entries = [SimpleNamespace(id=name, tensor=tensors[name]) for name in WEIGHTS]
    group = SimpleNamespace(base=SimpleNamespace(tensor=tensors["base"]), non_base=entries)
    parameters = {
        "weight": WEIGHTS,
        "density": dict.fromkeys(WEIGHTS, density),
        "normalize": normalize,
        "rescale": False,
        "lambda": 1.0,
        "int8_mask": False,
    }
    return registry.get(method).merge_group(group, **parameters)


def main() -> None:
    tensors = load_file(Path(sys.argv[1]) / "in.safetensors")
    base, a, b = (tensors[name] for name in ("base", "a", "b"))
    arc = slerp(torch.tensor([WEIGHTS["b"]]), (a - base)[None], (b - base)[None])[0]
    found = {
        "linear": merge("task_arithmetic", tensors, 1.0, normalize=False),
        "ties": merge("ties", tensors, 0.4, normalize=True),
        "dare_ties": merge("dare_ties", tensors, 1.0, normalize=False),
        "slerp": base + arc,
    }
    save_file(found, sys.argv[2])


main()
