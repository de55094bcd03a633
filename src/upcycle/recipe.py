"""A recipe: the sections of `settings`, what must hold between them, and how it is read.

A recipe is a YAML file (or the name of a shipped one) plus `section.field=value` overrides. It is parsed
before torch is imported, so a misspelt field costs no waiting.
"""

import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from upcycle.errors import UpcycleError, expected, nearest
from upcycle.idle import without_effect
from upcycle.reading import brief, parse_yaml, read_text
from upcycle.settings import (
    MOST_EXPERTS,
    AssembleSettings,
    DataSettings,
    DevicesSettings,
    EvaluateSettings,
    ExpandSettings,
    LoraSettings,
    PosttrainSettings,
    PrepareSettings,
    RouteSettings,
    Settings,
    Source,
)

MOST_BYTES = 1 << 20
"""Of a recipe."""


class Recipe(Settings):
    """Everything that determines the result of a run."""

    base: str = Field(min_length=1)
    """The dense pre-trained model: a hub name, a folder, or `builtin:tiny`."""
    data: DataSettings
    prepare: PrepareSettings = PrepareSettings()
    lora: LoraSettings = LoraSettings()
    expand: ExpandSettings = ExpandSettings()
    assemble: AssembleSettings = AssembleSettings()
    route: RouteSettings = RouteSettings()
    posttrain: PosttrainSettings = PosttrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    devices: DevicesSettings = DevicesSettings()
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of every random draw of the run."""

    @property
    def prepares(self) -> bool:
        """Whether anything is taken from a checkpoint; copies of the base alone need none."""
        return not (self.expand.copies_of == "base" and (self.prepare.shares_base or self.assemble.shared == "base"))

    @property
    def tunes(self) -> bool:
        """Whether preparation trains."""
        return self.prepares and not self.prepare.checkpoints

    @property
    def dense_share(self) -> float:
        """The part of its learning-rate schedule that preparation takes; post-training takes the rest."""
        if not self.tunes or self.posttrain.schedule == "restart":
            return 1.0
        return self.prepare.epochs / (self.prepare.epochs + self.posttrain.epochs)

    @property
    def carries(self) -> bool:
        """Whether post-training goes on with preparation's optimizer state."""
        return self.posttrain.optimizer_state == "carry"

    @property
    def kind_settings(self) -> dict[str, Any]:
        """What decides the kind of the experts besides `prepare`: nothing for whole FFNs of all layers."""
        lora = {"lora": {**self.lora.model_dump(), "kind": self.prepare.train}} if self.prepare.shares_base else {}
        if self.assemble.layers == "all":
            return lora
        return lora | {"layers": self.assemble.model_dump()["layers"]}

    @model_validator(mode="after")
    def _enough_checkpoints(self) -> "Recipe":
        if self.prepares and (n := self.prepare.num_checkpoints) is not None:
            self.expand.num_chosen(n)
        return self

    @model_validator(mode="after")
    def _one_schedule_has_one_shape(self) -> "Recipe":
        if self.posttrain.schedule == "continue" and self.prepare.checkpoints:
            raise ValueError(
                "posttrain.schedule is continue, but given checkpoints (prepare.checkpoints) do not say how far their "
                "schedule had come; leave it out, or set posttrain.schedule=restart"
            )
        for field in ("lr_scheduler", "warmup_fraction") if self.dense_share < 1 else ():
            before, after = getattr(self.prepare, field), getattr(self.posttrain, field)
            if before != after:
                raise ValueError(
                    f"posttrain.{field} is {after} and prepare.{field} {before}, but one schedule spans both stages; "
                    "set both alike, or posttrain.schedule=restart"
                )
        kwargs = [stage.trainer.get("lr_scheduler_kwargs") for stage in (self.prepare, self.posttrain)]
        if self.dense_share < 1 and kwargs[0] != kwargs[1]:
            raise ValueError(
                f"posttrain.trainer.lr_scheduler_kwargs is {kwargs[1]} and prepare's {kwargs[0]}, but one schedule "
                "spans both stages; set both alike, or posttrain.schedule=restart"
            )
        return self

    @model_validator(mode="after")
    def _there_is_a_state_to_carry(self) -> "Recipe":
        for stage in ("prepare", "posttrain") if self.carries else ():
            optim = str(getattr(self, stage).trainer.get("optim", "adamw_torch"))
            if not optim.startswith("adamw_torch"):
                raise ValueError(
                    f"posttrain.optimizer_state is carry, but {stage}.trainer.optim is {optim}, which has no moments "
                    "of torch's AdamW; set posttrain.optimizer_state=fresh"
                )
        nothing = not self.tunes or self.prepare.by_domain or self.expand.copies_of == "base"
        if self.carries and nothing:
            raise ValueError(
                "posttrain.optimizer_state is carry, but there is no one training to carry it from "
                "(prepare.checkpoints, prepare.by_domain or copies of the base); set posttrain.optimizer_state=fresh"
            )
        if self.carries and self.assemble.shared == "base" and not self.prepare.shares_base:
            raise ValueError(
                "posttrain.optimizer_state is carry, but with assemble.shared=base the shared weights are not those "
                "that were trained; set assemble.shared=last, or posttrain.optimizer_state=fresh"
            )
        return self

    @model_validator(mode="after")
    def _no_domain_is_the_last(self) -> "Recipe":
        """A training for each domain has no last checkpoint: that would be the domain at the end of the alphabet."""
        expand, shared = self.expand, self.assemble.shared
        uses = (
            (expand.copies_of == "last", "expand.copies_of is last", "leave it out"),
            (expand.spread != 1, f"expand.spread is {expand.spread}", "leave it out"),
            (
                self.prepare.train == "full" and shared == "last",
                "assemble.shared is last",
                "set assemble.shared=mean or base",
            ),
        )
        for is_set, named, remedy in uses if self.tunes and self.prepare.by_domain else ():
            if is_set:
                raise ValueError(
                    f"{named}, which needs a last checkpoint, but with prepare.by_domain there is one for each domain; "
                    f"{remedy}"
                )
        return self

    @model_validator(mode="after")
    def _copies_alone_are_perturbed(self) -> "Recipe":
        expand = self.expand
        if expand.perturb != "none" and (expand.copies_of == "none" or self.prepare.shares_base):
            raise ValueError(
                f"expand.perturb is {expand.perturb}, which makes copies of an FFN different; set "
                "expand.copies_of=last or base (adapters differ already)"
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_alone_are_spread(self) -> "Recipe":
        if self.expand.spread != 1 and (self.expand.copies_of != "none" or self.prepare.shares_base):
            raise ValueError(
                f"expand.spread is {self.expand.spread}, which moves whole FFNs of several checkpoints; leave it out "
                "with expand.copies_of or adapters"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> "Recipe":
        if self.prepare.shares_base and self.assemble.shared == "mean":
            raise ValueError("assemble.shared is mean, but adapters share the base's weights; leave it out")
        if self.expand.adapters != "average" and not self.prepare.shares_base:
            raise ValueError(
                f"expand.adapters is {self.expand.adapters}, which has no effect: experts are whole FFNs with this "
                "prepare.train, not adapters; leave it out"
            )
        if self.prepare.starts_as_base and self.expand.copies_of != "base":
            raise ValueError(
                "prepare.train is bottleneck: such experts start as copies of the base and are trained only in the "
                "mixture; set expand.copies_of=base"
            )
        if self.lora.four_bit and not self.prepare.shares_base:
            raise ValueError(
                f"lora.four_bit needs prepare.train=lora; prepare.train={self.prepare.train} trains the FFN"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_sharded(self) -> "Recipe":
        devices, m = self.devices, self.expand.num_experts * self.assemble.granularity
        if devices.fsdp == 1 or self.prepare.shares_base:
            return self
        if self.carries:
            raise ValueError(
                "posttrain.optimizer_state is carry, which needs whole tensors, but devices.fsdp shards them; set "
                "posttrain.optimizer_state=fresh"
            )
        if m % devices.ep or devices.fsdp // devices.ep > m // devices.ep:
            raise ValueError(
                f"devices.fsdp is {devices.fsdp} and devices.ep {devices.ep}, but a layer's {m} experts can be divided "
                f"among {m} processes at most, and ep must divide them; set devices.fsdp={min(m, devices.fsdp)} with "
                "devices.replicate, or raise expand.num_experts or assemble.granularity"
            )
        return self

    @model_validator(mode="after")
    def _every_setting_has_an_effect(self) -> "Recipe":
        if problem := next(without_effect(self), None):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _fewer_active_than_experts(self) -> "Recipe":
        k, m = self.assemble.num_experts_per_tok, self.expand.num_experts
        if k > m:
            raise ValueError(f"assemble.num_experts_per_tok is {k}, more than expand.num_experts, {m}")
        if k == 1 and m > 1 and self.assemble.granularity == 1 and self.posttrain.freeze != "router":
            raise ValueError(
                "assemble.num_experts_per_tok is 1: weights are renormalised over the chosen experts, so that of one "
                "is always 1 and the language-model loss gives the router no gradient; take 2 or more, cut experts "
                "into slices (assemble.granularity=4), or keep the router as it starts with posttrain.freeze=router"
            )
        return self

    @model_validator(mode="after")
    def _whole_ffns_alone_are_sliced_or_left_out(self) -> "Recipe":
        granularity, m = self.assemble.granularity, self.expand.num_experts
        if self.assemble.keep_vision and self.prepare.shares_base:
            raise ValueError(
                "assemble.keep_vision writes a plain MoE beside the base's vision part, but adapters stay beside their "
                "base; leave it out, or set prepare.train=ffn or full"
            )
        if self.assemble.layers != "all" and self.prepare.shares_base:
            raise ValueError(
                "assemble.layers leaves layers without experts, but adapters are experts in all layers; leave it out, "
                "or set prepare.train=ffn or full"
            )
        if granularity == 1:
            return self
        if self.prepare.shares_base:
            raise ValueError(
                f"assemble.granularity is {granularity}, but adapters cannot be cut into slices; leave it out, or "
                "set prepare.train=ffn or full"
            )
        if self.carries:
            raise ValueError(
                f"posttrain.optimizer_state is carry, but the optimizer state of whole FFNs does not fit slices "
                f"(assemble.granularity is {granularity}); set posttrain.optimizer_state=fresh"
            )
        if granularity * m > MOST_EXPERTS:
            raise ValueError(
                f"assemble.granularity {granularity} times expand.num_experts {m} is more than {MOST_EXPERTS} experts"
            )
        return self


def shipped_recipes() -> dict[str, str]:
    """Name to YAML text of the recipes in the package."""
    folder = files("upcycle") / "recipes"
    return {Path(f.name).stem: f.read_text() for f in folder.iterdir() if f.name.endswith(".yaml")}


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in file `name` (or shipped under that name) with `section.field=value` overrides.

    Raises:
        UpcycleError: no such recipe, not YAML, an unknown field, a value of the wrong type or range.
    """
    values = read_values(str(name))
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, str(name), overrides)


def parse_recipe(values: Any, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain values, with errors that name the field and the nearest known one.

    Args:
        overrides: what was typed and is in `values` already; what is wrong of it is named so.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = _problems(error)
    typed = {override.partition("=")[0]: override for override in overrides}
    lines = [_named(where, said, typed) for where, said in problems.items()]
    if all(line.startswith("override ") for line in lines):
        raise UpcycleError("\n".join(lines))
    name = f"{where} with the overrides {' '.join(overrides)}" if overrides else where
    raise UpcycleError("\n  ".join([f"recipe {name} is not valid:", *lines]))


def _problems(error: ValidationError) -> dict[str, str]:
    """Setting to what is wrong with it; where it may be one of several types, of the one that fits best."""
    found: dict[str, str] = {}
    for entry in error.errors():
        where, said = _explain(entry)
        before = found.get(where, "").partition(" (found ")[0]
        found[where] = f"{before} or {said.removeprefix('expected ')}" if before else said
    return {w: said for w, said in found.items() if not any(other.startswith(f"{w}.") for other in found)}


def _named(where: str, said: str, typed: Mapping[str, str]) -> str:
    """What is wrong, after the override that did it or after the setting."""
    if where in typed:
        return f"override {brief(typed[where])}: {said}"
    near = [override for key, override in typed.items() if where and _within(where, key)]
    place = f"{where}: {said}" if where else said
    return f"override {' '.join(near)}: {place}" if near else place


def _within(one: str, other: str) -> bool:
    """Whether one of two places is in the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every setting resolved."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, width=110)


def is_dump(text: str) -> bool:
    """Whether `dump_recipe` may have written it, of this version or another: no comments, and all stages are there."""
    values = parse_yaml(text, "recipe.yaml")
    stages = ("data", "prepare", "expand", "assemble", "route", "posttrain", "evaluate")
    same = yaml.safe_dump(values, sort_keys=False, width=110) == text
    return same and isinstance(values, dict) and values.keys() >= set(stages)


def chosen_settings(recipe: Recipe) -> list[str]:
    """`section.field=value` of base, data and every setting that is not at its default."""
    defaults = dict(_flat(Recipe(base="-", data=DataSettings(train="-")).model_dump()))
    found = {key: value for key, value in _flat(recipe.model_dump()) if key not in defaults or value != defaults[key]}
    return [f"{key}={written(value)}" for key, value in found.items()]


def written(value: Any) -> str:
    """The value of an override as it is typed: text as it is, anything else as YAML on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_override(name: str, value: str | Sequence[str]) -> str:
    """`section.field=value` of a name or of several, whatever characters they have."""
    names = value if isinstance(value, str) else list(value)
    text = yaml.safe_dump(names, default_style='"', default_flow_style=True, width=math.inf)
    return f"{name}={text.strip()}"


def describe_settings() -> str:
    """Every setting with its type, default and meaning, a block per section."""
    blocks = [_describe_section("", Recipe)]
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            blocks.append(_describe_section(f"{name}.", field.annotation))
    return "\n".join(blocks)


def _describe_section(prefix: str, section: type[Settings]) -> str:
    lines = [f"# {(section.__doc__ or '').splitlines()[0]}"]
    for name, field in section.model_fields.items():
        if field.description:
            default = "required" if field.is_required() else f"default {field.default}"
            kind = str(field.annotation).removeprefix("<class '").removesuffix("'>").replace("typing.", "")
            heading = f"{prefix}{name}: {kind.replace('upcycle.settings.', '')}, {default}"
            lines += textwrap.wrap(heading, 120, subsequent_indent="  ", break_long_words=False)
            lines += textwrap.wrap(field.description, 116, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`section.field: old -> new` for every setting that differs and decides what a run makes."""
    before, after = (dict(_flat(recipe.model_dump(exclude={"devices"}))) for recipe in (old, new))
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every setting of every section, by `section.field`; one that is a mapping is one setting."""
    for section, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{section}.{field}", one) for field, one in value.items())
        else:
            yield section, value


def read_values(name: str) -> dict[str, Any]:
    """What a recipe says, as plain values: of a YAML file, or of a recipe in the package.

    Raises:
        UpcycleError: no such recipe, or not YAML of sections.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.exists():
            raise UpcycleError(f"recipe file {path} does not exist{nearest(name, _files_beside(path), 0.7)}")
        text = read_text(path, MOST_BYTES)
    else:
        shipped = shipped_recipes()
        if name not in shipped:
            raise UpcycleError(
                f"'{name}' is neither a YAML file nor a recipe in the package ({', '.join(sorted(shipped))})"
                + nearest(name, [*shipped, *_files_beside(path)])
            )
        text = shipped[name]
    values = parse_yaml(text, f"recipe {name}")
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds {brief(values)}"
        raise UpcycleError(f"recipe {name} {what}, expected sections with settings")
    return values


def _files_beside(path: Path) -> list[str]:
    """YAML files in its folder."""
    return [str(path.with_name(file.name)) for file in path.parent.glob("*.y*ml") if file.is_file()]


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UpcycleError(f"override {brief(override)} is not of the form section.field=value")
    *sections, field = key.split(".")
    for section in sections:
        inner = values.get(section) or {}
        if not isinstance(inner, dict):
            raise UpcycleError(f"override {brief(override)}: '{section}' is a value, not a section")
        values[section] = dict(inner)  # a copy: a YAML alias may name the same section twice
        values = values[section]
    try:
        values[field] = _number(parse_yaml(text, f"override {brief(override)}: the value"))
    except UpcycleError as error:
        raise UpcycleError(f"{error}; quote it in the shell") from None


def _number(value: Any) -> Any:
    # YAML 1.1 reads 2e-5 (no point) as a string; on a command line it is a number
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: Any) -> tuple[str, str]:
    """The setting, and what is wrong with it."""
    location = [str(part) for part in error["loc"] if not _is_union_branch(part)]
    where = ".".join(location)
    if error["type"] == "extra_forbidden":
        return where, f"unknown setting{_meant(location)}"
    if error["type"] == "missing":
        return where, f"missing; add it to the recipe, or give {where}=... on the command line"
    found = "" if error["type"] == "value_error" else f" (found {brief(error['input'])})"
    return where, f"{expected(error)}{found}"


def _meant(location: Sequence[str]) -> str:
    """What an unknown setting may be: one of that name in other sections, or the nearest of its own."""
    *sections, name = location
    if sections == ["data"] and name in Source.model_fields:
        return f"; it is a source's: data.train={{path: ..., {name}: ...}}"
    if elsewhere := [full for full in _settings() if full.rpartition(".")[2] == name]:
        *others, last = elsewhere
        return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"
    near = nearest(name, _known_fields(sections)) or nearest(name, _settings(), 0.6)
    return near or "; `upcycle settings` lists all"


def _settings() -> list[str]:
    """`section.field` of every setting of a section."""
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return [
        f"{name}.{field}"
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, Settings)
        for field in section.model_fields
    ]


def _is_union_branch(part: Any) -> bool:
    return isinstance(part, str) and (part in ("str", "none") or part.startswith("list["))


def _known_fields(sections: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for section in sections:
        annotation = model.model_fields[section].annotation
        candidates = [annotation, *get_args(annotation)] if get_origin(annotation) else [annotation]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
