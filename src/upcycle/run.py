"""A run: a recipe and its folder, what it reads, and the hashes of what decides each stage."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from upcycle.artifacts import (
    MANIFEST,
    Checkpoint,
    ExpansionPlan,
    digest,
    hash_model,
    inside,
    read_manifest,
)
from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe, load_recipe

MOE_INIT = "MoE before post-training"
MOE = "MoE"
DELETED = "models-deleted"
"""A file that says that only the scores of a run were kept."""
SEED_DATA = ("seed_from", "seed_fraction", "min_samples_per_expert", "test_fraction")
"""Settings of `route` that decide which rows are held out of training."""


def open_run(folder: Path, needs: Sequence[str] = ("posttrain",)) -> "Run":
    """The run in a folder, by its own recipe.

    Raises:
        UpcycleError: the folder is no run, one that has not come as far as the stages that it `needs`, or one of which
            only the scores were kept.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UpcycleError(f"{folder} is not a run: it has no recipe.yaml")
    if (folder / DELETED).exists():
        raise UpcycleError(f"the models of {folder} were deleted once they were measured (--no-keep-models)")
    for stage in needs:
        if read_manifest(folder / stage) is None:
            raise UpcycleError(f"{folder} is not finished: it has no {stage}/{MANIFEST}; go on with `upcycle run`")
    return Run(load_recipe(str(folder / "recipe.yaml")), folder)


@dataclass(frozen=True)
class Stage:
    """One row of the flow."""

    name: str
    needs: tuple[str, ...]
    """Earlier stages whose artifact it reads."""
    data: bool
    """Whether it reads the instruction data."""
    run: Callable[["Run", Path], None]


class Run:
    """A recipe and its run folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self.verified: set[str] = set()

    @cached_property
    def base(self) -> Path:
        """The base's folder, refused here and now if nothing can be made of it."""
        from upcycle.models.adapters import check_base
        from upcycle.models.families import family_of
        from upcycle.models.folders import find_model, read_config
        from upcycle.models.safetensors_io import ModelReader

        folder = find_model(self.recipe.base)
        family = family_of(config := read_config(folder), str(folder))
        ModelReader(folder)
        if self.recipe.prepare.adapters:
            check_base(family.layout, config, str(folder))
        return folder

    @cached_property
    def tokenizer(self) -> Any:
        from upcycle.data.chat import load_tokenizer

        return load_tokenizer(self.base, self.recipe.data.chat_template)

    @cached_property
    def template_hash(self) -> str:
        from upcycle.data.chat import template_text

        name = self.recipe.data.chat_template
        return digest(template_text(name) if name else None)

    @property
    def chat_template(self) -> str | None:
        """The template that replaces the base's own, to be written into every model folder."""
        return str(self.tokenizer.chat_template) if self.recipe.data.chat_template else None

    @cached_property
    def splits(self) -> Any:
        from upcycle.data.splits import load_splits
        from upcycle.models.folders import read_config

        return load_splits(self.recipe, self.tokenizer, read_config(self.base)["max_position_embeddings"])

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        values = json.loads((self.folder / "prepare" / "checkpoints.json").read_text())
        return [Checkpoint(**value) for value in values]

    @cached_property
    def checkpoint_folders(self) -> list[Path]:
        # a relative path is one of ours and stays inside; an absolute one is the user's own
        prepared = self.folder / "prepare"
        return [Path(c.path) if Path(c.path).is_absolute() else inside(prepared, c.path) for c in self.checkpoints]

    @property
    def routed_moe(self) -> Path:
        """The MoE that the router belongs to: the assembled one, unless its experts moved with the router's start."""
        from upcycle.router_initialization.route import MOVED

        moved = self.folder / "route" / MOVED
        return moved if moved.exists() else self.folder / "assemble"

    @cached_property
    def plan(self) -> ExpansionPlan:
        return ExpansionPlan.load(self.folder / "expand" / "plan.json")

    @cached_property
    def base_hash(self) -> str:
        return hash_model(self.base)

    @cached_property
    def data_hash(self) -> str:
        from upcycle.data.sources import hash_sources

        data = self.recipe.data
        validation = hash_sources(data.validation) if data.validation else ""
        return digest([hash_sources(data.train), validation])

    @cached_property
    def given_checkpoints(self) -> list[tuple[Path, str]]:
        """The user's checkpoint folders, in order, with the hash of each: read once."""
        from upcycle.expert_preparation.checkpoints import checkpoint_folders

        return [(folder, hash_model(folder)) for folder in checkpoint_folders(self.recipe.prepare.checkpoints)]

    def inputs(self, stage: Stage) -> dict[str, str] | None:
        """Name to hash of everything that decides what the stage makes; None while an earlier one is missing."""
        found = {
            "settings": digest(self.settings(stage)),
            "seed": str(self.recipe.seed),
            "base": self.base_hash,
        }
        if self.reads_data(stage):
            found["data"] = self.data_hash
        if self.reads_data(stage) or stage.name == "assemble":
            found["chat_template"] = self.template_hash
        if stage.name == "prepare" and self.recipe.prepare.checkpoints:
            found["checkpoints"] = digest([sha256 for _, sha256 in self.given_checkpoints])
        for need in stage.needs:
            manifest = read_manifest(self.folder / need)
            if manifest is None:
                return None
            found[need] = manifest.content
        return found

    def reads_data(self, stage: Stage) -> bool:
        """Whether a change of the data concerns the stage."""
        given = self.recipe.prepare.checkpoints or not self.recipe.prepares
        return stage.data and not (stage.name == "prepare" and given)

    def settings(self, stage: Stage) -> dict[str, Any]:
        """The settings that decide what the stage makes."""
        recipe = self.recipe
        sections = {stage.name: getattr(recipe, stage.name).model_dump()}
        if self.reads_data(stage):
            only_evaluation = set() if stage.name == "evaluate" else {"max_validation"}
            elsewhere = {"train", "validation", "chat_template"}  # hashed by content
            sections["data"] = recipe.data.model_dump(exclude=elsewhere | only_evaluation)
            if stage.name == "route" or (stage.name != "evaluate" and recipe.route.seed_from == "held_out"):
                sections["seed_data"] = recipe.route.model_dump(include=set(SEED_DATA))
                sections["seed_data"]["num_experts"] = recipe.expand.num_experts
        if stage.name == "assemble":
            sections["init_std"] = recipe.route.init_std
        if recipe.prepare.adapters:
            sections["lora"] = {**recipe.lora.model_dump(), "kind": recipe.prepare.train}
        return sections
