"""Upcycle: from a dense LLM and the checkpoints of its fine-tuning to a mixture of experts (UpIT).

The names below are imported when they are first used, so `import upcycle` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upcycle.errors import UpcycleError
    from upcycle.pipeline import run_stages
    from upcycle.recipe import Recipe, load_recipe
    from upcycle.run import Run

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "UpcycleError", "__version__", "load_recipe", "run_stages"]

_HOMES = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Run": "run",
    "run_stages": "pipeline",
    "UpcycleError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'upcycle' has no attribute '{name}'")
    return getattr(import_module(f"upcycle.{_HOMES[name]}"), name)
