"""Upcycle: from a dense LLM and the checkpoints of its fine-tuning to a mixture of experts (UpIT).

The names below are imported when they are first used, so `import upcycle` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcycle.api import assemble, evaluate, expand, export, make_recipe, posttrain, prepare, report, route, run
    from upcycle.errors import UpcycleError
    from upcycle.pipeline.resume import run_stages
    from upcycle.pipeline.run import Run, open_run
    from upcycle.recipe import Recipe, load_recipe

__version__ = "0.2.0"
_HOMES = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Run": "pipeline.run",
    "open_run": "pipeline.run",
    "run_stages": "pipeline.resume",
    "UpcycleError": "errors",
    **dict.fromkeys(("make_recipe", "run", "prepare", "expand", "assemble", "route", "posttrain"), "api"),
    **dict.fromkeys(("evaluate", "report", "export"), "api"),
}
__all__ = [
    "Recipe",
    "Run",
    "UpcycleError",
    "__version__",
    "assemble",
    "evaluate",
    "expand",
    "export",
    "load_recipe",
    "make_recipe",
    "open_run",
    "posttrain",
    "prepare",
    "report",
    "route",
    "run",
    "run_stages",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'upcycle' has no attribute '{name}'")
    return getattr(import_module(f"upcycle.{_HOMES[name]}"), name)
