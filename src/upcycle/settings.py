"""The sections of a recipe, in stage order: every setting with its default and meaning."""

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from upcycle.errors import nearest

MOST_EXPERTS = 4096
"""Per layer."""


class Settings(BaseModel):
    """A frozen section; unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


COLUMNS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "history", "system"),
    *("tools", "domain"),
)
"""Columns of rows that mean something."""
AnyFormat = Literal["auto", "messages", "sharegpt", "prompt_completion", "alpaca"]


class Source(Settings):
    """Rows of one place, and what to make of them."""

    path: str
    """JSON or JSONL (plain, .gz, .zst, .xz, .bz2), CSV, Parquet or Arrow; a folder or a pattern of such files; a folder
    of `save_to_disk`; a hub dataset (owner/name:config[split]); builtin:train."""
    weight: float = Field(1.0, gt=0, le=100)
    """How often its rows count: 2: each twice; 0.5: half of them, chosen by the hash of the question."""
    domain: str | None = None
    """The domain of all its rows; `{file}` is the name of the file."""
    format: AnyFormat = "auto"
    """How its rows spell a chat; auto: found by their columns."""
    columns: dict[str, str] = {}
    """Our name of a column to its name there: {domain: category}."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, values: dict[str, str]) -> dict[str, str]:
        return known_columns(values)


Sources = str | Source | list[str | Source]


def known_columns(values: dict[str, str]) -> dict[str, str]:
    """Raises ValueError for a name that is not one of ours."""
    for name in values:
        if name not in COLUMNS:
            raise ValueError(f"{name} is no column, expected some of {', '.join(COLUMNS)}{nearest(name, COLUMNS)}")
    return values


def _source(value: Any) -> Any:
    """A name, or a `Source`.

    Raises:
        ValueError: it is neither, or a setting of it is wrong.
    """
    if value is None or isinstance(value, Source) or (isinstance(value, str) and value):
        return value
    if not isinstance(value, dict):
        raise ValueError("expected a file, folder, pattern or hub dataset, {path: ..., ...}, or a list of these")
    if unknown := next((name for name in value if name not in Source.model_fields), None):
        raise ValueError(f"{unknown} is no setting of a source{nearest(str(unknown), Source.model_fields)}")
    try:
        return Source.model_validate(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg'].removeprefix('Value error, ')}") from None


class DataSettings(Settings):
    """The instruction data D: chats, in whatever format, and perhaps a `domain` label."""

    train: Sources
    """Files, folders, patterns, hub datasets or `builtin:train`: one, a list, or with settings of their own: {path:
    ..., weight: ..., domain: ..., format: ..., columns: ...}"""
    validation: Sources | None = None
    """Held-out rows for the evaluation; without them a share of `train` is held out."""
    validation_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Share of `train` held out for evaluation when `validation` is not given."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training rows that is used, chosen by the hash of the question (nested across values)."""
    max_validation: int | None = Field(None, ge=1)
    """At most this many validation rows, chosen by the hash of the question."""
    max_length: int = Field(1024, ge=8)
    """Longest sample in tokens; `too_long` says what becomes of longer ones."""
    too_long: Literal["leave_out", "truncate", "refuse"] = "leave_out"
    """Leave longer rows out, counted and reported; cut them from the left; or stop."""
    decontaminate: Literal["exact", "ngram"] = "exact"
    """Which training rows are left out for a held-out question: those that ask the same, or also those that share 13
    words in a row with one (a shorter question: all its words)."""
    decontaminate_with: list[str] = []
    """Further files whose questions must not be trained on: benchmarks (`question` or `prompt`) or chats."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a chat are learned: all (but those with `weight: 0` or `train: false`), or the last."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template, or `chatml` for the plain one shipped here."""
    format: AnyFormat = "auto"
    """How rows spell a chat, where their source does not say; auto: found by their columns."""
    columns: dict[str, str] = {}
    """Our name of a column to its name in the data, where their source does not say: {domain: category}."""
    max_bad: float = Field(0.0, ge=0, le=1)
    """Share of the rows that may be unusable; they are counted by reason and left out."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        return [_source(one) for one in value] if isinstance(value, list) and value else _source(value)

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, values: dict[str, str]) -> dict[str, str]:
        return known_columns(values)

    def sources(self, given: Sources) -> list[Source]:
        """`train` or `validation`, with what all have alike."""
        listed = given if isinstance(given, list) else [given]
        found = [Source(path=one) if isinstance(one, str) else one for one in listed]
        return [
            one.model_copy(
                update={
                    "format": self.format if one.format == "auto" else one.format,
                    "columns": {**self.columns, **one.columns},
                }
            )
            for one in found
        ]


_INSTEAD = {
    "set epochs": "num_train_epochs max_steps",
    "set learning_rate": "learning_rate",
    "set micro_batch_size, and batch_size for the rows of a step on all devices": "per_device_train_batch_size",
    "it is batch_size over micro_batch_size and the number of processes": "gradient_accumulation_steps",
    "set lr_scheduler": "lr_scheduler_type",
    "set warmup_fraction": "warmup_steps",
    "set weight_decay": "weight_decay",
    "set gradient_checkpointing": "activation_checkpointing gradient_checkpointing",
    "set the recipe's seed": "seed data_seed",
    "set pack_rows": "packing packing_strategy eval_packing padding_free",
    "set data.max_length": "max_length truncation_mode",
    "set posttrain.report_to": "report_to",
    "set posttrain.router_aux_loss_coef": "router_aux_loss_coef",
    "set checkpoint_every; what a resume needs is always saved": "save_strategy save_steps save_total_limit "
    "save_only_model save_on_each_node",
    "every step is logged": "logging_strategy logging_steps logging_first_step",
    "training computes in bf16 on an accelerator and in fp32 on a CPU": "bf16 fp16",
    "every row counts once": "train_sampling_strategy shuffle_dataset dataloader_drop_last",
    "rows and their answers are read by the section `data`": "completion_only_loss assistant_only_loss "
    "dataset_text_field dataset_kwargs chat_template_path",
    "they are the base's": "eos_token pad_token",
    "start several processes instead": "fsdp fsdp_config deepspeed parallelism_config",
    "use `upcycle export --push`": "push_to_hub",
    "remote code never runs": "trust_remote_code",
    "upcycle decides it; leave it out": "output_dir resume_from_checkpoint load_best_model_at_end auto_find_batch_size "
    "ignore_data_skip remove_unused_columns average_tokens_across_devices use_cpu do_train do_eval do_predict "
    "restore_callback_states_from_checkpoint accelerator_config disable_tqdm logging_nan_inf_filter",
}
OWNED = {name: instead for instead, names in _INSTEAD.items() for name in names.split()}
"""Fields of SFTConfig that settings of ours, or what a run promises, decide; and what to do instead."""


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
    lr_scheduler: Literal["cosine", "linear", "constant", "cosine_with_min_lr", "warmup_stable_decay"] = "cosine"
    """Shape of the learning-rate schedule; over which stages it goes, posttrain.schedule says. The last two take
    trainer.lr_scheduler_kwargs, such as {min_lr_rate: 0.1}."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Share of the schedule's steps with a linearly rising learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    pack_rows: bool = True
    """Rows of a micro-batch side by side in lines as long as its longest row: the same loss with less padding."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trainer: dict[str, Any] = Field({})
    """Anything else that TRL's SFTConfig takes, by its own names: {optim: adamw_8bit, max_grad_norm: 0.5, ...}."""

    def micro_batch(self, processes: int) -> int:
        """Rows of a forward pass in each process: the most that divide its part of a step, and not more than asked."""
        own = max(1, self.batch_size // processes)
        return max(n for n in range(1, min(self.micro_batch_size, own) + 1) if own % n == 0)

    @field_validator("trainer")
    @classmethod
    def _not_what_a_setting_says(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name in values:
            if name in OWNED:
                raise ValueError(f"{name} is not for SFTConfig here; {OWNED[name]}")
        return values

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "TrainingSettings":
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


SHARES_BASE = ("lora", "bottleneck")
STARTS_AS_BASE = ("bottleneck",)
"""Kinds of experts (`prepare.train`), as far as settings that must fit together ask; `experts.kinds` has all else."""


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
    def shares_base(self) -> bool:
        """Whether an expert is an addition to the base's FFN, which all share, and not an FFN of its own."""
        return self.train in SHARES_BASE

    @property
    def starts_as_base(self) -> bool:
        """Whether experts start as copies of the base, so that preparation has nothing to do."""
        return self.train in STARTS_AS_BASE


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
    """Which FFN weights are adapted in preparation; all three mean all that the base has."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on an adapter's input in preparation; the mixture has none."""
    four_bit: bool = False
    """Train on a base in 4 bits (QLoRA): needs a GPU and bitsandbytes."""

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class ExpandSettings(Settings):
    """Stage 2, expert expansion: from the n checkpoints to any number of experts."""

    num_experts: int = Field(8, ge=1, le=MOST_EXPERTS)
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
    select: Literal["uniform", "first", "last", "farthest"] = "uniform"
    """Which, if there are more: evenly spaced, the first or last n, or greedily those least similar to the chosen."""
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
    spread: float = Field(1.0, ge=-1, le=2)
    """How far experts are from the last checkpoint L, in units of how far they were: L + spread (E - L). 0: copies of
    it; 1: as they are; whole FFNs only."""
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


class EveryLayer(Settings):
    """Every N-th layer, from the N-th on: transformers' `decoder_sparse_step`."""

    every: int = Field(ge=1)
    """N."""


class AssembleSettings(Settings):
    """The MoE before any training of its own."""

    num_experts_per_tok: int = Field(2, ge=1)
    """Experts active for a token, k."""
    granularity: Literal[1, 2, 4, 8] = 1
    """Cut every expert's FFN into G smaller experts, of which a token gets k G. With k = 1 and G > 1 the MoE has the
    dense model's FLOPs, and its router still learns; whole FFNs only."""
    layers: Literal["all"] | EveryLayer | list[int] = "all"
    """Which layers get experts: all, `{every: N}`, or a list of places from 0. The others keep one FFN, that of
    `shared`, which preparation leaves as it is. Only where the MoE's architecture has such layers, and whole FFNs."""
    channels: Literal["contiguous", "strided", "random"] = "contiguous"
    """Which channels of an FFN go into one slice."""
    shared: Literal["last", "mean", "base"] = "last"
    """Where attention, norms and embeddings come from: last checkpoint, mean of all, base (adapters: always base).
    With `last` tokenizer, template, special tokens and generation settings come from it too, if it has them."""
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Storage dtype of the assembled MoE; `source` keeps the checkpoints'."""
    keep_vision: bool = False
    """Write the finished MoE into the base's folder of more than text, with its vision part as it is there (Mistral3,
    Qwen3-VL, Qwen3.5); otherwise the MoE reads text alone. Whole FFNs only."""

    @field_validator("layers", mode="before")
    @classmethod
    def _one_of_three_forms(cls, value: Any) -> Any:
        every = value.get("every") if isinstance(value, dict) and set(value) == {"every"} else None
        places = value if isinstance(value, list) else []
        if (
            value == "all"
            or isinstance(value, EveryLayer)
            or (type(every) is int and every > 0)
            or (places and all(type(place) is int for place in places))
        ):
            return value
        raise ValueError("expected all, {every: N} with a whole number N, or a list of layers such as [1, 3]")

    def chosen_layers(self, layers: Sequence[int], count: int) -> tuple[int, ...] | None:
        """The layers with experts out of `layers`, those with an FFN; None: all `count` of the model.

        Raises:
            ValueError: one is none of them or there twice, or none is left.
        """
        if isinstance(self.layers, EveryLayer):
            found = tuple(layers[self.layers.every - 1 :: self.layers.every])
        else:
            found = tuple(layers) if self.layers == "all" else tuple(self.layers)
        if len(set(found)) < len(found) or not set(found) <= set(layers) or not found:
            run = list(layers) == list(range(len(layers)))
            have = f"0 to {len(layers) - 1}" if run else ", ".join(map(str, layers))
            raise ValueError(
                f"assemble.layers is {self.model_dump()['layers']}, but the model has FFNs in the layers {have}; name "
                "one or more of them, each once"
            )
        return None if len(found) == count else tuple(sorted(found))


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
    assignment: Literal["balanced", "lowest_loss", "centred", "domain", "random"] = "balanced"
    """Sample to expert: equal buckets of least total loss; lowest loss (paper); lowest but for its mean; by domain;
    equal buckets at random (the paper's ablation)."""
    expert_learning_rate: float | None = Field(None, gt=0)
    """Let the experts move too in the start `upit`, with this learning rate; null: they stay (paper)."""
    equal_steps: bool = False
    """Repeat the samples of small buckets, so that every expert counts the same in what is trained or averaged."""
    equal_norms: bool = False
    """Give the vectors of a layer one norm."""
    logit_std: float | None = Field(2.0, gt=0)
    """Standard deviation over experts of the logits that the router starts with; null: as the start makes them."""
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
    slice_noise: float = Field(0.0, ge=0)
    """Noise that makes the vectors of an expert's slices different, in standard deviations of a layer's vectors."""
    tokens_per_batch: int = Field(4096, ge=1)
    """Most tokens, padding included, in one batch of scoring and pre-optimisation."""

    @model_validator(mode="after")
    def _experts_move_in_upit_alone(self) -> "RouteSettings":
        if self.expert_learning_rate is not None and self.start != "upit":
            raise ValueError(f"expert_learning_rate is for start=upit; start={self.start} trains no experts")
        return self


class PosttrainSettings(TrainingSettings):
    """Stage 4, model upcycling: the whole MoE is trained on D."""

    schedule: Literal["continue", "restart"] | None = None
    """Go on with preparation's learning-rate schedule, which then spans the epochs of both stages, or start one with a
    warm-up of its own. Null: continue, unless the checkpoints are given."""
    optimizer_state: Literal["carry", "fresh"] = "fresh"
    """Adam's moments at the start: those of the last checkpoint, each expert with those of its FFN, or none."""
    experts_rate: float = Field(1.0, gt=0)
    """Learning rate of the experts, in units of learning_rate; see also shared_rate and router_rate."""
    shared_rate: float = Field(1.0, gt=0)
    """Of attention, norms and embeddings."""
    router_rate: float = Field(1.0, gt=0)
    """Of the routing vectors."""
    router_aux_loss_coef: float = Field(0.01, ge=0)
    """Weight of the per-layer load-balancing loss; 0: none."""
    balance_over: Literal["slices", "experts"] = "slices"
    """What the load-balancing loss makes even where experts are cut into slices (assemble.granularity)."""
    balance_scope: Literal["step", "micro_batch"] = "step"
    """What the loss counts an expert's share over: a step's rows so far, of all micro-batches and processes, which lets
    experts specialise (arXiv 2501.11873); or each micro-batch for itself."""
    router_z_loss_coef: float = Field(0.0, ge=0)
    """Weight of the router z-loss, which keeps logits small (ST-MoE: 0.001)."""
    balance_bias_rate: float = Field(0.0, ge=0)
    """Step of the loss-free balancing bias (Wang et al.: 0.001); it fades out before the end. 0: none."""
    freeze: Literal["none", "router", "experts", "shared"] = "none"
    """What post-training leaves as it is; `shared` is attention, norms and embeddings."""
    report_to: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    """Where the training log goes besides log.json (the package must be installed)."""

    @property
    def rates(self) -> dict[str, float]:
        """Of each part of the MoE (`routing.routers.parts`), in units of learning_rate."""
        return {"experts": self.experts_rate, "shared": self.shared_rate, "router": self.router_rate}


class DevicesSettings(Settings):
    """How a model is divided among processes that train it (torchrun); what a run makes does not depend on it."""

    fsdp: int = Field(1, ge=1)
    """Processes that each hold a part of every weight, gradient and optimizer state (FSDP2). 1: each holds all."""
    ep: int = Field(1, ge=1)
    """Of these, processes that each hold whole experts of their own (expert parallelism)."""
    replicate: int = Field(1, ge=1)
    """Groups of `fsdp` processes, each with the whole model: a group for each machine keeps traffic on the machine."""

    @property
    def processes(self) -> int | None:
        """That must be started; None: any number."""
        return self.fsdp * self.replicate if self.fsdp > 1 else None

    @model_validator(mode="after")
    def _parts_fit(self) -> "DevicesSettings":
        if self.fsdp % self.ep:
            raise ValueError(f"ep {self.ep} does not divide fsdp {self.fsdp}")
        if self.replicate > 1 and self.fsdp == 1:
            raise ValueError("replicate is for groups of fsdp processes; without fsdp each process has the whole model")
        return self


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
