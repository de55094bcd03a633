"""Adam's moments of a finished training, written as models whose weights they are, so that they go the same way."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from upcycle.training.checkpoints import strip_resume_files
from upcycle.types import Model

NAMES = ("exp_avg", "exp_avg_sq")
"""Mean of the gradients, and of their squares, as torch's AdamW calls them."""
Moments = Mapping[str, Mapping[str, Tensor]]
"""Parameter to its state in AdamW (`NAMES` and the number of steps); a parameter that is not named starts fresh."""


def save_moments(model: Model, optimizer: Optimizer, folder: Path, save: Callable[[str], None]) -> None:
    """Write a model folder for each of `NAMES`; what was not trained has zeros.

    Args:
        save: writes `model`, as it is at that moment, to a folder.
    """
    weights = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for name in NAMES:
            for parameter, weight in weights.items():
                state = optimizer.state.get(parameter)
                parameter.data = state[name].view_as(weight) if state else torch.zeros_like(weight)
            save(str(folder / name))
            strip_resume_files(folder / name)
    finally:
        for parameter, weight in weights.items():
            parameter.data = weight


def put_moments(model: Model, optimizer: Optimizer, moments: Moments) -> None:
    """Have the optimizer go on with these moments; its tensors are taken as they are."""
    for name, parameter in model.named_parameters():
        if name in moments and parameter.requires_grad:
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments[name].items()}
