"""A run: a recipe and its folder, what it reads, and the hashes of what decides each stage."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.disk import digest, expanded, inside
from upcycle.distributed.world import on_main
from upcycle.errors import UpcycleError, command_line
from upcycle.pipeline.manifest import read_manifest, verified
from upcycle.pipeline.stage import Stage
from upcycle.recipe import Recipe, load_recipe
from upcycle.records.files import (
    ASSEMBLED,
    CHECKPOINTS,
    DELETED,
    MOVED,
    PLAN,
    POSTTRAIN,
    PREPARE,
    RECIPE,
    RESULT,
    ROUTE_REPORT,
    SCORES,
)
from upcycle.records.manifest import FORMAT, READING, ROWS
from upcycle.records.plan import Checkpoint, ExpansionPlan
from upcycle.records.route import RouteReport
from upcycle.records.scores import Scores

if TYPE_CHECKING:  # what imports torch; the annotations are whole names, which the checks of the tests can follow
    import upcycle.data.splits
    import upcycle.experts.kind
    import upcycle.records.manifest
    import upcycle.weights.base

SEED_DATA = ("seed_from", "seed_fraction", "min_samples_per_expert", "test_fraction")
"""Settings of `route` that decide which rows are held out of training."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's."""
    return RECIPE.of(folder).is_file()


def open_run(folder: str | Path, needs: Iterable[str] = (POSTTRAIN,)) -> "Run":
    """The run in a folder, by its own recipe.

    Raises:
        UpcycleError: the folder is no run, one that has not come as far as the stages that it `needs`, or one of which
            only the scores were kept; a file of these stages is damaged; or stages do not belong together.
    """
    folder = expanded(folder)
    if not is_run(folder):
        raise UpcycleError(f"{folder} is not a run: it has no {RECIPE.name}")
    if DELETED.of(folder).exists():
        raise UpcycleError(f"the models of {folder} were deleted after scoring (--no-keep-models)")
    for stage in needs:
        if verified(folder / stage) is None:
            raise UpcycleError(
                f"{folder} is not finished: stage {stage} is not complete; continue with "
                f"`{again(folder)}`; `{command_line('report', folder, '--watch', 30)}` shows how far it is"
            )
    run = Run(load_recipe(str(RECIPE.of(folder))), folder)
    _check_together(run)
    return run


def again(folder: Path, *more: str) -> str:
    """The command that goes on with a run."""
    return command_line("run", RECIPE.of(folder), "--run", folder, *more)


def _check_together(run: "Run") -> None:
    """Raises UpcycleError for a stage that was made from another one than is there, or with other settings."""
    from upcycle.pipeline.stages import STAGES

    made = run.manifests()
    for stage in STAGES:
        if (manifest := made[stage.name]) is None:
            continue
        others = [n for n in stage.needs if (need := made[n]) and manifest.inputs.get(n) != need.content]
        said = [f"from another {name} than is there now" for name in others]
        now = json.loads(json.dumps({**run.settings(stage), "seed": run.recipe.seed}))
        said += [f"with {c}" for c in _changes({**manifest.settings, "seed": manifest.seed}, now)]
        if said:
            raise UpcycleError(
                f"{run.folder}: stage {stage.name} was made {', '.join(said)}; make it again with "
                f"`{again(run.folder, '--update')}`"
            )


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that both have and that differ; newer versions may have more."""
    found = []
    for name in before.keys() & now.keys():
        one, other = before[name], now[name]
        if isinstance(one, dict) and isinstance(other, dict):
            found += _changes(one, other, f"{prefix}{name}.")
        elif one != other:
            found.append(f"{prefix}{name}={one} (recipe.yaml has {other})")
    return sorted(found)


def shards_evenly(config: Mapping[str, Any], fsdp: int) -> bool:
    """Whether tied embeddings can be divided: both uses are shards of their own, of which one alone is trained where
    they are padded."""
    return not config.get("tie_word_embeddings") or config["vocab_size"] % fsdp == 0


class Run:
    """A recipe, or the name of one, and its run folder."""

    def __init__(self, recipe: Recipe | str | Path, folder: str | Path) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
        self.folder = expanded(folder)
        self.verified: set[str] = set()
        self.asked: tuple[str, ...] = ()
        """The stages that this process was asked for."""

    def forget(self) -> None:
        """Read anew, when it is asked for, what may have changed since."""
        for name in [name for name, value in vars(type(self)).items() if isinstance(value, cached_property)]:
            vars(self).pop(name, None)

    @cached_property
    def kind(self) -> "upcycle.experts.kind.Kind":
        """What an expert is."""
        from upcycle.experts.kinds import KINDS

        return KINDS[self.recipe.prepare.train]

    @cached_property
    def base(self) -> "upcycle.weights.base.Base":
        """The base, refused here and now if nothing can be made of it."""
        from upcycle.architectures.families import family_of
        from upcycle.architectures.layouts import channels
        from upcycle.architectures.mapping import with_layers
        from upcycle.weights.safetensors_io import ModelReader
        from upcycle.weights.whole import check_keeps

        base = self.given_base
        ModelReader(base.folder)
        self._check_shards(base)
        self.kind.check_base(base)
        if self.recipe.assemble.keep_vision:
            config = with_layers(base.config, base.layers)
            family = family_of(config, str(base.folder))
            size = channels(family.layout, config) // self.recipe.assemble.granularity
            check_keeps(base.folder, family.moe.model_type, size)
        return base

    @cached_property
    def given_base(self) -> "upcycle.weights.base.Base":
        """The base as it is given: its tokenizer reads data also where nothing can be made of it."""
        from upcycle.architectures.layouts import ffn_layers
        from upcycle.weights.base import Base, template_text
        from upcycle.weights.folders import base_name, find_model

        folder, template = find_model(self.recipe.base), self.recipe.data.chat_template
        text = template_text(template) if template else None
        base = Base(folder, base_name(self.recipe.base), text, self._last_checkpoint)
        try:
            layers = self.recipe.assemble.chosen_layers(ffn_layers(base.config), base.config["num_hidden_layers"])
        except ValueError as error:
            raise UpcycleError(str(error)) from None
        return replace(base, layers=layers)

    def find_base(self, name: str | None = None) -> Path | None:
        """The base's folder, or that of another `name`; None if it is gone, or would have to be downloaded."""
        from upcycle.weights.folders import find_model, is_here

        name = name or self.recipe.base
        try:
            return find_model(name) if is_here(name) else None
        except UpcycleError:
            return None

    def _check_shards(self, base: "upcycle.weights.base.Base") -> None:
        fsdp, vocabulary = self.recipe.devices.fsdp, base.vocabulary
        if not shards_evenly(base.config, fsdp):
            raise UpcycleError(
                f"devices.fsdp is {fsdp}, which does not divide the {vocabulary} rows of {base.folder}'s embeddings; "
                "they are tied to its head, and transformers would compute with an old copy of them; set devices.fsdp "
                f"to one of {', '.join(str(n) for n in range(1, 65) if vocabulary % n == 0)}, with devices.replicate"
            )

    @property
    def _last_checkpoint(self) -> Path | None:
        """The user's last checkpoint if the MoE has its tokenizer; the MoE itself if the checkpoints are gone."""
        from upcycle.stages.expert_preparation.checkpoints import checkpoint_folders

        recipe = self.recipe
        if not recipe.prepares or not recipe.prepare.checkpoints or recipe.assemble.shared != "last":
            return None
        try:
            return checkpoint_folders(recipe.prepare.checkpoints)[-1]
        except UpcycleError:
            if self.assembled_moe.is_dir():
                return self.assembled_moe
            raise

    @cached_property
    def splits(self) -> "upcycle.data.splits.Splits":
        from upcycle.data.splits import load_splits

        found: list[upcycle.data.splits.Splits] = []

        def load() -> None:
            base = self.base
            found.append(load_splits(self.recipe, base.tokenizer, base.context_length, base.vocabulary))

        on_main(load)  # the others find everything encoded
        if not found:
            load()
        if self.format < READING and found[0].has_system_messages:
            raise UpcycleError(
                f"{self.folder} was begun by an earlier version, which split rows with system messages in another way; "
                "start anew with a new --run"
            )
        return found[0]

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        return CHECKPOINTS.read_of(self.folder)

    @cached_property
    def checkpoint_folders(self) -> list[Path]:
        # a relative path is one of ours and stays inside; an absolute one is the user's own
        prepared = self.folder / CHECKPOINTS.stage
        return [Path(c.path) if Path(c.path).is_absolute() else inside(prepared, c.path) for c in self.checkpoints]

    @property
    def assembled_moe(self) -> Path:
        return ASSEMBLED.of(self.folder)

    @property
    def routed_moe(self) -> Path:
        """The MoE that the router belongs to: the assembled one, unless its experts moved with the router's start."""
        moved = MOVED.of(self.folder)
        return moved if moved.exists() else self.assembled_moe

    @property
    def result(self) -> Path:
        """The finished model."""
        return RESULT.of(self.folder)

    @property
    def route_report(self) -> RouteReport:
        return ROUTE_REPORT.read_of(self.folder)

    @property
    def scores(self) -> Scores:
        return SCORES.read_of(self.folder)

    @cached_property
    def plan(self) -> ExpansionPlan:
        return PLAN.read_of(self.folder)

    @cached_property
    def format(self) -> int:
        """Of its manifests: a folder goes on with the hashes that it began with."""
        try:
            first = read_manifest(self.folder / PREPARE)
        except UpcycleError:
            return FORMAT  # damaged: refused, or with --update made anew
        return first.format if first else FORMAT

    @cached_property
    def base_hash(self) -> str:
        from upcycle.weights.hashing import hash_model

        return hash_model(self.base.folder, self.format)

    @cached_property
    def data_hash(self) -> str:
        from upcycle.data.sources import hash_sources

        data = self.recipe.data
        validation = hash_sources(data.sources(data.validation)) if data.validation else ""
        others = [hash_sources(data.sources(name)) for name in data.decontaminate_with]
        return digest([hash_sources(data.sources(data.train)), validation, *others])

    @cached_property
    def given_checkpoints(self) -> list[tuple[Path, str]]:
        """The user's checkpoint folders, in order, with the hash of each: read once."""
        from upcycle.stages.expert_preparation.checkpoints import checkpoint_folders
        from upcycle.weights.hashing import hash_models

        folders = checkpoint_folders(self.recipe.prepare.checkpoints)
        return list(zip(folders, hash_models(folders, self.format), strict=True))

    @property
    def given_hashes(self) -> dict[str, str]:
        """The user's checkpoints as an input."""
        return (
            {"checkpoints": digest([sha256 for _, sha256 in self.given_checkpoints])} if self.given_checkpoints else {}
        )

    def manifests(self) -> "dict[str, upcycle.records.manifest.Manifest | None]":
        """Of every stage; None of one that is not complete."""
        from upcycle.pipeline.stages import stage_names

        return {name: read_manifest(self.folder / name) for name in stage_names()}

    def check_unchanged(self, *names: str) -> None:
        """Look at what stages were made from: `base`, `data`, the `checkpoints` that were given.

        Raises:
            UpcycleError: one of them is not what it was.
        """
        now = {"base": lambda: self.base_hash, "data": lambda: self.data_hash}
        now["checkpoints"] = lambda: self.given_hashes.get("checkpoints", "")
        made = self.manifests()
        for name in names:
            for stage, manifest in made.items():
                if manifest and name in manifest.inputs and manifest.inputs[name] != now[name]():
                    raise UpcycleError(
                        f"{self.folder}: stage {stage} was made from another {name} than is there now; put back what "
                        f"it was made from, or make the stages again with `{again(self.folder, '--update')}`"
                    )

    def inputs(self, stage: Stage) -> dict[str, str] | None:
        """Name to hash of everything that decides what the stage makes; None while an earlier one is missing."""
        found = {
            "settings": digest(self.settings(stage)),
            "seed": str(self.recipe.seed),
            "base": self.base_hash,
        }
        if stage.reads_data(self.recipe):
            found["data"] = self.data_hash
            if self.format >= READING:
                found["reading"] = str(ROWS)
        if stage.reads_data(self.recipe) or stage.reads_template:
            found["chat_template"] = digest(self.base.chat_template)
        found |= stage.more_inputs(self)
        for need in stage.needs:
            manifest = read_manifest(self.folder / need)
            if manifest is None:
                return None
            found[need] = manifest.content
        return found

    def settings(self, stage: Stage) -> dict[str, Any]:
        """The settings that decide what the stage makes."""
        recipe = self.recipe
        sections: dict[str, Any] = stage.settings(recipe)
        if stage.reads_data(recipe):
            only_validation = set() if stage.reads_validation else {"max_validation"}
            elsewhere = {"train", "validation", "chat_template"}  # hashed by content
            sections["data"] = recipe.data.model_dump(exclude=elsewhere | only_validation)
        if stage.held_out(recipe):
            sections["seed_data"] = recipe.route.model_dump(include=set(SEED_DATA))
            sections["seed_data"]["num_experts"] = recipe.expand.num_experts
        return sections
