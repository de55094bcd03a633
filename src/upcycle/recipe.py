"""Every setting, a section per stage in stage order.

A recipe is a YAML file (or the name of a shipped one) plus `section.field=value` overrides. It is parsed
before torch is imported, so a misspelt field costs no waiting.
"""

import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from upcycle.errors import UpcycleError, nearest


class Settings(BaseModel):
    """A frozen section; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataSettings(Settings):
    """The instruction data D: chat rows with `messages` and, if there is one, a `domain` label."""

    train: str | list[str] = Field(min_length=1)
    """JSONL files (plain or .gz) with `messages`, a hub dataset name, or `builtin:train`."""
    validation: str | list[str] | None = None
    """Held-out rows for the evaluation; without them a share of `train` is held out."""
    validation_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Share of `train` held out for evaluation when `validation` is not given."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training rows that is used, chosen by the hash of the question (nested across values)."""
    max_validation: int | None = Field(None, ge=1)
    """At most this many validation rows, chosen by the hash of the question."""
    max_length: int = Field(1024, ge=8)
    """Longest sample in tokens; longer ones are left out, counted and reported."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template, or `chatml` for the plain one shipped here."""


class TrainingSettings(Settings):
    """What both training stages share; the Trainer's own meanings."""

    epochs: float = Field(2.0, gt=0)
    """Passes over the training rows. The paper halves a budget of 4 epochs between the two stages."""
    checkpoint_every: float = Field(0.25, gt=0)
    """Epochs between two checkpoints (paper: 0.25). In preparation each one becomes an expert."""
    learning_rate: float = Field(2.0e-5, gt=0)
    """Peak learning rate (paper: 2e-5 for full fine-tuning)."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step."""
    micro_batch_size: int = Field(4, ge=1)
    """Rows per forward pass and device; must divide batch_size."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule over the stage."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Share of the steps with a linearly rising learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "TrainingSettings":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class PrepareSettings(TrainingSettings):
    """Stage 1, expert preparation: one instruction-tuning run, or checkpoints that exist already."""

    checkpoints: str | list[str] | None = None
    """Existing checkpoints (models or adapters): a list, or a Trainer folder with checkpoint-*. No training then."""
    train: Literal["ffn", "full", "lora", "bottleneck"] = "ffn"
    """What is tuned and becomes an expert: FFN blocks, alone or with all else; LoRA adapters; bottlenecks (PESC)."""
    by_domain: bool = False
    """One training for each domain label of the data; the end of each is a checkpoint (Self-MoE, Branch-Train-MiX)."""

    @property
    def num_checkpoints(self) -> int | None:
        """Checkpoints that there will be; None for a Trainer folder, where only looking tells."""
        if isinstance(self.checkpoints, list):
            return len(self.checkpoints)
        if self.checkpoints or self.by_domain:
            return None
        return math.ceil(self.epochs / self.checkpoint_every - 1e-9)

    @property
    def adapters(self) -> bool:
        """Whether an expert is an addition to the base's FFN, which all share, and not an FFN of its own."""
        return self.train in ("lora", "bottleneck")


class LoraSettings(Settings):
    """Adapters as experts, if `prepare.train` says so; PEFT's meanings."""

    rank: int = Field(16, ge=1)
    """r, of adapters that are trained or start here; a bottleneck's width."""
    alpha: int = Field(32, ge=1)
    """An adapter adds alpha / r times B A."""
    rslora: bool = False
    """alpha / sqrt(r) instead."""
    targets: list[Literal["gate_proj", "up_proj", "down_proj"]] = Field(
        ["gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Which FFN weights are adapted in preparation."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on an adapter's input in preparation; the mixture has none."""
    four_bit: bool = False
    """Train on a base in 4 bits (QLoRA): needs a GPU and bitsandbytes."""

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class ExpandSettings(Settings):
    """Stage 2, expert expansion: from the n checkpoints to any number of experts."""

    num_experts: int = Field(8, ge=1)
    """Experts per MoE layer, m; 1 is a dense model in the same machinery."""
    copies_of: Literal["none", "last", "base"] = "none"
    """Instead of different experts, m copies of the last checkpoint or of the base (vanilla upcycling)."""
    perturb: Literal["none", "noise", "drop"] = "none"
    """How copies are made different: noise on weights, or channels drawn anew (Drop-Upcycling)."""
    perturb_rate: float = Field(0.5, gt=0, le=1)
    """Share of the weights that get noise, or of the channels that are drawn anew."""
    noise_std: float = Field(0.02, gt=0)
    """Standard deviation of the noise."""
    num_checkpoints: int | None = Field(None, ge=1)
    """How many checkpoints become experts, n; none given: all, or as many as there are experts."""
    select: Literal["uniform", "last", "farthest"] = "uniform"
    """Which, if there are more: evenly spaced, the last n, or greedily those least similar to the chosen."""
    keep_base: bool = False
    """Whether the base itself is an expert too (with cosine similarity it has no direction and is no parent)."""
    similarity: Literal["cosine", "l2"] = "cosine"
    """How alike two experts are: cosine, or negative squared L2 distance, of their FFN task vectors."""
    parents: Literal["most_dissimilar", "random"] = "most_dissimilar"
    """Which two experts a child is merged from (random: the paper's ablation)."""
    repeat_pairs: Literal["avoid", "allow"] = "avoid"
    """Whether a pair may have more than one child. `allow` tends to pick the same pair for ever."""
    weights: Literal["uniform", "fixed"] = "uniform"
    """The child's weight alpha: drawn from (0, 1), or 1/2. beta = 1 - alpha."""
    merge: Literal["dare", "linear", "slerp", "ties", "dare_ties"] = "dare"
    """How parents become a child (paper: dare); see docs/paper.md for the formula of each."""
    drop_rate: float = Field(0.2, ge=0, le=0.95)
    """Share p of each parent's task vector that dare drops (the rest is multiplied by 1/(1-p)) or ties trims."""
    adapters: Literal["average", "apart", "product"] = "average"
    """Merge adapters' A and B each for itself (average; apart: as PEFT), or their product, cut to rank by an SVD."""

    def num_chosen(self, n: int) -> int:
        """How many of `n` checkpoints become experts.

        Raises:
            ValueError: there are too few of them, or too few experts.
        """
        if self.copies_of != "none":
            return n
        room = self.num_experts - self.keep_base
        chosen = min(n, room) if self.num_checkpoints is None else self.num_checkpoints
        if chosen > min(n, room):
            base = " besides the base" if self.keep_base else ""
            raise ValueError(
                f"expand.num_checkpoints is {chosen}, but there are {n} checkpoints (prepare.checkpoints, or "
                f"prepare.epochs over prepare.checkpoint_every) and room for {room} experts{base} (expand.num_experts)"
            )
        if chosen < 2 and chosen < room:
            raise ValueError(
                f"{chosen} checkpoint of {n} (prepare.checkpoints, or prepare.epochs over prepare.checkpoint_every; "
                "expand.num_checkpoints) cannot be expanded: expected 2 or more, as a child is merged from two"
            )
        return chosen


class AssembleSettings(Settings):
    """The MoE before any training of its own."""

    num_experts_per_tok: int = Field(2, ge=1)
    """Experts active for a token, k."""
    shared: Literal["last", "mean", "base"] = "last"
    """Where attention, norms and embeddings come from: last checkpoint, mean of all, base (adapters: always base)."""
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Storage dtype of the assembled MoE; `source` keeps the checkpoints'."""


class RouteSettings(Settings):
    """Stage 3, router initialization."""

    start: Literal["upit", "contrastive", "ridge", "kmeans", "mean_hidden", "random"] = "contrastive"
    """How the router starts, a row of docs/paper.md's table of starts (paper: upit, its pre-optimisation)."""
    seed_from: Literal["held_out", "train"] = "held_out"
    """Seed data: held out of all training (default, see docs/paper.md) or from the training set (paper)."""
    seed_fraction: float = Field(0.01, gt=0, lt=1)
    """Share of the training rows that becomes seed data (paper: 1%)."""
    min_samples_per_expert: int = Field(20, ge=1)
    """Seed data are at least this many samples times the number of experts."""
    test_fraction: float = Field(0.25, ge=0, lt=1)
    """Share of the seed data kept apart to measure how well the router ranks the assigned expert first."""
    assignment: Literal["balanced", "lowest_loss", "centred", "domain"] = "balanced"
    """Sample to expert: equal buckets of least total loss; lowest loss (paper); lowest but for its mean; by domain."""
    expert_learning_rate: float | None = Field(None, gt=0)
    """Let the experts move too in the start `upit`, with this learning rate; null: they stay (paper)."""
    equal_steps: bool = False
    """Repeat the samples of small buckets, so that every expert counts the same in what is trained or averaged."""
    equal_norms: bool = False
    """Give the vectors of a layer one norm (starts mean_hidden, kmeans and ridge)."""
    logit_std: float | None = Field(1.0, gt=0)
    """Standard deviation over experts of the logits that mean_hidden, kmeans and ridge start with; null: unscaled."""
    ridge: float = Field(0.01, gt=0)
    """Penalty of the start `ridge`, in units of the mean square of a router input's entries."""
    epochs: int = Field(4, ge=1)
    """Passes over the seed data in the pre-optimisation (paper: 4)."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the language-model loss; the auxiliary loss has 1 - alpha (paper: 0.5)."""
    learning_rate: float = Field(1.0e-3, gt=0)
    """AdamW's learning rate for the routing vectors; the paper gives none."""
    tokens: Literal["answer", "all"] = "all"
    """Which tokens of a sample pull its expert's routing vector: all but padding, or the answer's."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the random router (and of the assembled MoE before routing)."""
    tokens_per_batch: int = Field(4096, ge=1)
    """Most tokens, padding included, in one batch of scoring and pre-optimisation."""

    @model_validator(mode="after")
    def _experts_move_in_upit_alone(self) -> "RouteSettings":
        if self.expert_learning_rate is not None and self.start != "upit":
            raise ValueError(f"expert_learning_rate is for start=upit; start={self.start} trains no experts")
        return self


class PosttrainSettings(TrainingSettings):
    """Stage 4, model upcycling: the whole MoE is trained on D."""

    router_aux_loss_coef: float = Field(0.01, ge=0)
    """Weight of the per-layer load-balancing loss; 0: none."""
    router_z_loss_coef: float = Field(0.0, ge=0)
    """Weight of the router z-loss, which keeps logits small (ST-MoE: 0.001)."""
    balance_bias_rate: float = Field(0.0, ge=0)
    """Step of the loss-free balancing bias (Wang et al.: 0.001); it fades out before the end. 0: none."""
    freeze: Literal["none", "router", "experts", "shared"] = "none"
    """What post-training leaves as it is; `shared` is attention, norms and embeddings."""
    report_to: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    """Where the training log goes besides log.json (the package must be installed)."""


class EvaluateSettings(Settings):
    """The first evaluation: held-out loss, and exact match where answers are short."""

    models: Literal["all", "ends"] = "all"
    """Base, every checkpoint and the MoE; or base, last checkpoint and the MoE only."""
    exact_match: bool = True
    """Also generate greedily and compare with the answer, for rows whose answer is short."""
    max_answer_tokens: int = Field(16, ge=1)
    """Rows with longer answers are left out of the exact match."""
    max_generated: int = Field(500, ge=1)
    """Most rows per model for the exact match."""
    tokens_per_batch: int = Field(8192, ge=1)
    """Most tokens, padding included, in one forward pass."""


class Recipe(Settings):
    """Everything that decides what a run makes."""

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
    seed: int = Field(0, ge=0, lt=2**32)
    """Every random draw of the run follows from it."""

    @property
    def prepares(self) -> bool:
        """Whether anything is taken from a checkpoint; copies of the base alone need none."""
        return not (self.expand.copies_of == "base" and (self.prepare.adapters or self.assemble.shared == "base"))

    @model_validator(mode="after")
    def _enough_checkpoints(self) -> "Recipe":
        if self.prepares and (n := self.prepare.num_checkpoints) is not None:
            self.expand.num_chosen(n)
        return self

    @model_validator(mode="after")
    def _copies_alone_are_perturbed(self) -> "Recipe":
        expand = self.expand
        if expand.perturb != "none" and (expand.copies_of == "none" or self.prepare.adapters):
            raise ValueError(
                f"expand.perturb is {expand.perturb}, which makes copies of an FFN different; set "
                "expand.copies_of=last or base (adapters differ already)"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> "Recipe":
        if self.prepare.adapters and self.assemble.shared == "mean":
            raise ValueError("assemble.shared is mean, but adapters share the base's weights; leave it out")
        if self.prepare.train == "bottleneck" and self.expand.copies_of != "base":
            raise ValueError(
                "prepare.train is bottleneck: such experts start as copies of the base and are trained in the mixture "
                "alone; set expand.copies_of=base"
            )
        if self.lora.four_bit and not self.prepare.adapters:
            raise ValueError(
                f"lora.four_bit needs prepare.train=lora; prepare.train={self.prepare.train} trains the FFN"
            )
        return self

    @model_validator(mode="after")
    def _fewer_active_than_experts(self) -> "Recipe":
        k, m = self.assemble.num_experts_per_tok, self.expand.num_experts
        if k > m:
            raise ValueError(f"assemble.num_experts_per_tok is {k}, more than expand.num_experts, {m}")
        if k == 1 and m > 1 and self.posttrain.freeze != "router":
            raise ValueError(
                "assemble.num_experts_per_tok is 1: weights are renormalised over the chosen experts, so that of one "
                "is always 1 and the language-model loss gives the router no gradient; take 2 or more, or keep the "
                "router as it starts with posttrain.freeze=router"
            )
        return self


def shipped_recipes() -> dict[str, str]:
    """Name to YAML text of the recipes in the package."""
    folder = files("upcycle") / "recipes"
    return {Path(f.name).stem: f.read_text() for f in folder.iterdir() if f.name.endswith(".yaml")}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in file `name` (or shipped under that name) with `section.field=value` overrides.

    Raises:
        UpcycleError: no such recipe, not YAML, an unknown field, a value of the wrong type or range.
    """
    values = _read(name)
    for override in overrides:
        _apply(values, override)
    return parse_recipe(values, where=name)


def parse_recipe(values: Any, where: str) -> Recipe:
    """A recipe from plain values, with errors that name the field and the nearest known one."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(e)}" for e in error.errors())
        raise UpcycleError(f"recipe {where} is not valid:\n{lines}") from None


def dump_recipe(recipe: Recipe) -> str:
    """YAML with every setting resolved."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, width=110)


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
            lines += [f"{prefix}{name}: {kind}, {default}", f"    {field.description}"]
    return "\n".join(lines) + "\n"


def differences(old: Recipe, new: Recipe) -> list[str]:
    """`section.field: old -> new` for every setting that differs."""
    before, after = dict(_flat(old.model_dump())), dict(_flat(new.model_dump()))
    return [f"{key}: {before[key]} -> {after[key]}" for key in before if before[key] != after[key]]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise UpcycleError(f"recipe file {path} does not exist")
        text = path.read_text()
    else:
        shipped = shipped_recipes()
        if name not in shipped:
            raise UpcycleError(
                f"'{name}' is neither a YAML file nor a shipped recipe ({', '.join(sorted(shipped))})"
                + nearest(name, shipped)
            )
        text = shipped[name]
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UpcycleError(f"recipe {name} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise UpcycleError(f"recipe {name} holds {type(values).__name__}, expected sections with settings")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UpcycleError(f"override '{override}' is not of the form section.field=value")
    *sections, field = key.split(".")
    for section in sections:
        inner = values.get(section) or {}
        if not isinstance(inner, dict):
            raise UpcycleError(f"override '{override}': '{section}' is a value, not a section")
        values[section] = dict(inner)  # a copy: a YAML alias may name the same section twice
        values = values[section]
    try:
        values[field] = _number(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise UpcycleError(f"override '{override}': the value is not YAML ({error}); quote it in the shell") from None


def _number(value: Any) -> Any:
    # YAML 1.1 reads 2e-5 (no point) as a string; on a command line it is a number
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"] if not _is_union_branch(part)]
    where = ".".join(location) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown setting{nearest(location[-1], _known_fields(location[:-1]))}"
    if error["type"] == "missing":
        return f"{where}: missing"
    found = "" if error["type"] == "value_error" else f" (found {error['input']!r})"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{found}"


def _is_union_branch(part: Any) -> bool:
    return isinstance(part, str) and (part in ("str", "none") or part.startswith("list["))


def _known_fields(sections: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for section in sections:
        annotation = model.model_fields[section].annotation
        candidates = [annotation, *get_args(annotation)] if get_origin(annotation) else [annotation]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
