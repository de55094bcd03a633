"""The form of a row of `kinds.KINDS`: everything that depends on what an expert is."""

from collections.abc import Callable, Sequence
from collections.abc import Mapping as Dictionary
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from upcycle.architectures.mapping import Mapping
from upcycle.experts.active import Active, Addition
from upcycle.experts.gram import Measure
from upcycle.experts.structure import Dense
from upcycle.recipe import Recipe
from upcycle.records.description import Description
from upcycle.records.plan import AdapterMerge, ExpansionPlan, Gram
from upcycle.settings import AssembleSettings, DevicesSettings, ExpandSettings, LoraSettings
from upcycle.types import Model
from upcycle.weights.base import Base

Routers = Sequence[torch.Tensor]
"""Routing vectors (E, H) of each layer."""


@dataclass(frozen=True)
class Load:
    """How a model folder is to be loaded."""

    folder: Path
    dtype: torch.dtype
    device: torch.device
    base: Path | None
    """The dense model of adapters; None: the one that they name."""
    four_bit: bool = False
    """Quantize the dense model of adapters (QLoRA, Dettmers et al. 2023, arXiv 2305.14314)."""
    where: Dictionary[str, Any] = field(default_factory=dict)
    """from_pretrained's `distributed_config` or `device_map`, which then take the place of `device`."""


@runtime_checkable
class Assemble(Protocol):
    """Writes a MoE, and says what it is; of optimizer moments in the place of weights nothing is said or compared."""

    def __call__(
        self,
        base: Base,
        folders: Sequence[Path],
        plan: ExpansionPlan,
        settings: AssembleSettings,
        lora: LoraSettings,
        routers: Routers,
        out_dir: Path,
        /,
        moments: bool = False,
    ) -> None: ...


@dataclass(frozen=True)
class Kind:
    """A kind of expert: what is done with it in each stage, and on disk.

    Functions raise UpcycleError for user-facing errors.
    """

    peft_types: tuple[str, ...]
    """`peft_type` in the adapter_config.json of folders of this kind; empty: plain model folders."""
    frozen: frozenset[str]
    """Parts of the MoE (`routing.routers.parts`) that no training changes."""

    # preparation
    check_base: Callable[[Base], None]
    """Refuses a base that cannot have such experts, by its configuration."""
    read_base: Callable[[Base, Recipe], Mapping | Dense]
    """Before hours of training: refuses a base whose files do not hold what they seem to, and says what cannot be done
    with what will be made of it."""
    check_checkpoint: Callable[[Base, Path, Path], None]
    """(base, the first checkpoint, a checkpoint): refuses what does not belong to the base."""
    trainable: Callable[[Base, LoraSettings, int, DevicesSettings], Model]
    """(base, settings, seed, how it is divided): the model with what is tuned, in training mode."""
    num_saved: Callable[[Model], int]
    """Parameters that a checkpoint of what `trainable` gives holds."""
    finish_checkpoint: Callable[[Path, Base], None]
    """Give a checkpoint of the Trainer's the configuration that others expect."""

    # expansion
    merge_rule: Callable[[ExpandSettings], AdapterMerge | None]
    """How adapters are merged; None for whole FFNs."""
    compare: Callable[[Base, Sequence[Path], ExpandSettings, int], tuple[Gram, Measure | None]]
    """(base, checkpoints, settings, seed): inner products of the task vectors, and how those of children are found if
    they are not linear in expectation."""

    # assembly, training, export
    assemble: Assemble
    """(base, every checkpoint, plan, settings, settings, routers, folder): write the MoE."""
    load: Callable[[Load], Model]
    """A model folder of this kind, in evaluation mode."""
    save: Callable[[Model, Path, Path], None]
    """(model, folder, the folder that it was loaded from): write a trained MoE as a standalone folder. Of
    several processes the first writes; all must come."""
    save_checkpoint: Callable[[Model, Path], None] | None
    """Write what a resume needs of the model; None: as the Trainer does."""
    resume: Callable[[Model, Path], None] | None
    """Put a checkpoint's weights into the model; None: as the Trainer does."""
    router_keys: Callable[[Model], list[str]]
    """The name on disk of every layer's routing vectors."""
    fold: Callable[[Path, Path, str, str | None], None]
    """(mixture, new folder, dtype, base or None): write it as a plain MoE."""
    active: Callable[[Base, Recipe], Active]
    """Parameters that multiply a token."""
    describe: Callable[[Path], Description]
    """What a folder with a MoE of this kind is, in words."""
    addition: Addition | None = None
    """Parameters of an expert, if it is an addition to the base's FFN; None: it is an FFN of its own."""
