"""The sections of a recipe, in stage order: every setting with its default and meaning."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from upcycle.errors import expected, nearest

MOST_EXPERTS = 4096
"""Per layer."""
Dtype = Literal["source", "float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
"""What a MoE may be stored in; `source` is what it is made from."""


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
    """Rows from one place, and how to read them."""

    path: str
    """JSON or JSONL (plain, .gz, .zst, .xz, .bz2), CSV, Parquet or Arrow; a folder or a pattern of such files; a folder
    of `save_to_disk`; a hub dataset (owner/name:config[split]); builtin:train."""
    weight: float = Field(1.0, gt=0, le=100)
    """How often its rows count. 2: each row twice. 0.5: half of the rows, chosen by the hash of the question."""
    domain: str | None = None
    """The domain of all its rows; `{file}` stands for the name of the file."""
    format: AnyFormat = "auto"
    """Format of its rows; `auto` detects it from their columns."""
    columns: dict[str, str] = {}
    """Maps Upcycle's column names to the source's: {domain: category}."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, values: dict[str, str]) -> dict[str, str]:
        return known_columns(values)


Sources = str | Source | list[str | Source]


def known_columns(values: dict[str, str]) -> dict[str, str]:
    """The values; raises ValueError for a name that is not in COLUMNS."""
    for name in values:
        if name not in COLUMNS:
            raise ValueError(f"{name} is not a column, expected some of {', '.join(COLUMNS)}{nearest(name, COLUMNS)}")
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
        raise ValueError(f"{unknown} is not a setting of a source{nearest(str(unknown), Source.model_fields)}")
    try:
        return Source.model_validate(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, wrong['loc']))}: {expected(wrong)}") from None


class DataSettings(Settings):
    """The instruction data D: chats in any supported format, with an optional `domain` label."""

    train: Sources
    """A file, folder, pattern, hub dataset or `builtin:train`; or a list of these. A source with settings of its own is
    an object: {path: ..., weight: ..., domain: ..., format: ..., columns: ...}."""
    validation: Sources | None = None
    """Held-out rows for the evaluation. If null, a share of `train` is held out."""
    validation_fraction: float = Field(0.02, gt=0, lt=0.5)
    """Share of `train` held out for evaluation when `validation` is not given."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the training rows to use, chosen by the hash of the question. Smaller shares are subsets of larger
    ones."""
    max_validation: int | None = Field(None, ge=1)
    """At most this many validation rows, chosen by the hash of the question."""
    max_length: int = Field(1024, ge=8)
    """Longest sample, in tokens; `too_long` says what happens to longer ones."""
    too_long: Literal["leave_out", "truncate", "refuse"] = "leave_out"
    """What happens to longer rows: leave them out and report how many, cut them from the left, or stop."""
    decontaminate: Literal["exact", "ngram"] = "exact"
    """Which training rows are removed because of a held-out question. `exact`: rows with the same question. `ngram`:
    also rows that share 13 consecutive words with one, or have all words of one with 6 to 12."""
    decontaminate_with: list[str] = []
    """More files whose questions must not be trained on: benchmarks (`question` or `prompt`) or chats."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a chat are learned: all of them, or only the last. Answers with `weight: 0` or `train: false`
    are never learned."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template, or `chatml` for the plain one shipped here."""
    format: AnyFormat = "auto"
    """Format of the rows of sources that do not set their own; `auto` detects it from the columns."""
    columns: dict[str, str] = {}
    """Maps Upcycle's column names to the data's, for sources that do not set their own: {domain: category}."""
    max_bad: float = Field(0.0, ge=0, le=1)
    """Largest share of unusable rows that is tolerated. They are counted by reason and left out."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        return [_source(one) for one in value] if isinstance(value, list) and value else _source(value)

    @field_validator("train", mode="before")  # runs first, as it stands last
    @classmethod
    def _not_null(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, values: dict[str, str]) -> dict[str, str]:
        return known_columns(values)

    def sources(self, given: Sources) -> list[Source]:
        """`train` or `validation` as a list, with the settings that all sources share filled in."""
        listed = given if isinstance(given, list) else [given]
        found = [Source(path=one) if isinstance(one, str) else one for one in listed]
        return [
            one.model_copy(
                update={
                    "format": self.format if one.format == "auto" else one.format,
                    "columns": one.columns or self.columns,
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
    "rows of a micro-batch are padded to the longest": "pad_to_multiple_of",
    "set checkpoint_every; what a resume needs is always saved": "save_strategy save_steps save_total_limit "
    "save_only_model save_on_each_node",
    "every step is logged": "logging_strategy logging_steps logging_first_step",
    "training computes in bf16 on an accelerator and in fp32 on a CPU": "bf16 fp16",
    "every row counts once": "train_sampling_strategy shuffle_dataset dataloader_drop_last",
    "rows and their answers are read by the section `data`": "completion_only_loss assistant_only_loss "
    "dataset_text_field dataset_kwargs chat_template_path",
    "they are the base's": "eos_token pad_token",
    "routers are watched in one forward pass of the plain loss": "label_smoothing_factor",
    "the base and every checkpoint are evaluated at the end (evaluate.models)": "eval_on_start",
    "start several processes instead": "fsdp fsdp_config deepspeed parallelism_config",
    "use `upcycle export --push`": "push_to_hub",
    "remote code never runs": "trust_remote_code",
    "upcycle decides it; leave it out": "output_dir resume_from_checkpoint load_best_model_at_end auto_find_batch_size "
    "ignore_data_skip remove_unused_columns average_tokens_across_devices use_cpu do_train do_eval do_predict "
    "restore_callback_states_from_checkpoint accelerator_config disable_tqdm logging_nan_inf_filter "
    "enable_jit_checkpoint",
}
OWNED = {name: instead for instead, names in _INSTEAD.items() for name in names.split()}
"""Fields of SFTConfig that Upcycle's own settings or guarantees decide; and what to do instead."""


class TrainingSettings(Settings):
    """Settings of both training stages, with the Trainer's meanings."""

    epochs: float = Field(2.0, gt=0)
    """Passes over the training rows. The paper splits a budget of 4 epochs evenly between the two stages."""
    checkpoint_every: float = Field(0.25, gt=0)
    """Epochs between two checkpoints (paper: 0.25). In preparation each checkpoint becomes an expert."""
    learning_rate: float = Field(2.0e-5, gt=0)
    """Peak learning rate (paper: 2e-5 for full fine-tuning)."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step."""
    micro_batch_size: int = Field(4, ge=1)
    """Rows per forward pass and device; must divide batch_size."""
    lr_scheduler: Literal["cosine", "linear", "constant", "cosine_with_min_lr", "warmup_stable_decay"] = "cosine"
    """Shape of the learning-rate schedule; posttrain.schedule says which stages it spans. The last two take
    trainer.lr_scheduler_kwargs, such as {min_lr_rate: 0.1}."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Share of the schedule's steps spent on linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    pack_rows: bool = True
    """Pack the rows of a micro-batch side by side, in lines as long as its longest row: the same loss, less padding."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for about a third more time."""
    trainer: dict[str, Any] = Field({})
    """Any other field of TRL's SFTConfig, by its own name: {optim: adamw_8bit, max_grad_norm: 0.5, ...}."""

    def uneven(self, processes: int, section: str = "") -> str:
        """What is wrong if that many processes cannot share the rows of a step evenly; no text if they can."""
        own, odd = divmod(self.batch_size, processes)
        if own and not odd:
            return ""
        near = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
        up = (own + 1) * processes
        micro = "" if up % self.micro_batch_size == 0 else f" {section}micro_batch_size={own + 1}"
        return (
            f"{section}batch_size is {self.batch_size}, which {processes} processes cannot share evenly; set "
            f"{section}batch_size={up}{micro}, or start {', '.join(map(str, near[-4:]))} processes"
        )

    def micro_batch(self, processes: int) -> int:
        """Rows of a forward pass in each process: the largest divisor of its part of a step, up to micro_batch_size."""
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
    """Stage 1, expert preparation: one instruction-tuning run, or existing checkpoints."""

    checkpoints: str | list[str] | None = None
    """Existing checkpoints (models or adapters): a list of folders, or a Trainer folder with checkpoint-*. Nothing is
    trained then."""
    train: Literal["ffn", "full", "lora", "bottleneck"] = "ffn"
    """What is trained and becomes an expert. `ffn`: FFN blocks only. `full`: FFN blocks, with all other weights trained
    too. `lora`: LoRA adapters. `bottleneck`: bottleneck adapters (PESC)."""
    by_domain: bool = False
    """Train once for each domain label of the data; each run's final model is a checkpoint (Self-MoE,
    Branch-Train-MiX)."""

    @property
    def num_checkpoints(self) -> int | None:
        """How many checkpoints there will be; None for a Trainer folder, whose contents are not known yet."""
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
    """Adapters as experts, with PEFT's meanings; used if `prepare.train` is `lora` or `bottleneck`."""

    rank: int = Field(16, ge=1)
    """LoRA rank of newly created adapters; for bottlenecks, their width."""
    alpha: int = Field(32, ge=1)
    """LoRA alpha: an adapter adds (alpha / rank) B A to the weight."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""
    targets: list[Literal["gate_proj", "up_proj", "down_proj"]] = Field(
        ["gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Which FFN weights get adapters in preparation; all three mean all that the base has."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on an adapter's input, in preparation only."""
    four_bit: bool = False
    """Quantize the base to 4 bits for training (QLoRA). Needs a GPU and bitsandbytes."""

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class ExpandSettings(Settings):
    """Stage 2, expert expansion: from the n checkpoints to any number of experts."""

    num_experts: int = Field(8, ge=1, le=MOST_EXPERTS)
    """Experts per MoE layer, m. 1 gives a dense model that goes through the same stages."""
    copies_of: Literal["none", "last", "base"] = "none"
    """Use m copies of the last checkpoint or of the base instead of different experts (vanilla upcycling)."""
    perturb: Literal["none", "noise", "drop"] = "none"
    """How to make copies differ: add noise to weights, or reinitialize channels at random (Drop-Upcycling)."""
    perturb_rate: float = Field(0.5, gt=0, le=1)
    """Share of the weights that get noise, or of the channels that are reinitialized."""
    noise_std: float = Field(0.02, gt=0)
    """Standard deviation of the noise."""
    num_checkpoints: int | None = Field(None, ge=1)
    """How many checkpoints become experts, n. Null: all of them, or as many as there are experts."""
    select: Literal["uniform", "first", "last", "farthest"] = "uniform"
    """Which checkpoints to keep if there are more: evenly spaced, the first n, the last n, or greedily the ones least
    similar to those already chosen."""
    keep_base: bool = False
    """Make the base itself an expert too. Its task vector is zero, so with cosine similarity it cannot be a parent."""
    similarity: Literal["cosine", "l2"] = "cosine"
    """Similarity of two experts: cosine, or negative squared L2 distance, of their FFN task vectors."""
    parents: Literal["most_dissimilar", "random"] = "most_dissimilar"
    """Which two experts are merged into a child. `random` is the paper's ablation."""
    repeat_pairs: Literal["avoid", "allow"] = "avoid"
    """Whether a pair may have more than one child. With `allow`, the same pair tends to be picked every time."""
    weights: Literal["uniform", "fixed"] = "uniform"
    """The first parent's weight alpha: uniform in (0, 1), or fixed at 1/2. The second parent has 1 - alpha."""
    merge: Literal["dare", "linear", "slerp", "ties", "dare_ties"] = "dare"
    """Merge method (paper: dare). docs/paper.md has the formulas."""
    drop_rate: float = Field(0.2, ge=0, le=0.95)
    """Share p of each parent's task vector that dare drops or ties trims; dare rescales the rest by 1/(1-p)."""
    spread: float = Field(1.0, ge=-1, le=2)
    """Scales each expert's distance from the last checkpoint L: E becomes L + spread (E - L). 1 leaves experts as they
    are, 0 makes them copies of L, and negative values go beyond L, away from E. Whole FFNs only."""
    adapters: Literal["average", "apart", "product"] = "average"
    """How adapters are merged. `average`: A and B separately, with the child's weights. `apart`: A and B separately,
    with the square roots of the weights, as in PEFT. `product`: B A, cut back to the rank by an SVD."""

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
    """Every N-th layer, starting with the N-th (`decoder_sparse_step` in transformers)."""

    every: int = Field(ge=1)
    """N."""


class AssembleSettings(Settings):
    """How the MoE is put together, before it is trained."""

    num_experts_per_tok: int = Field(2, ge=1)
    """Experts that each token uses, k."""
    granularity: Literal[1, 2, 4, 8] = 1
    """Cut every expert's FFN into G smaller experts; each token uses k G of them. With k = 1 and G > 1 the MoE has the
    dense model's FLOPs, and its router still learns. Whole FFNs only."""
    layers: Literal["all"] | EveryLayer | list[int] = "all"
    """Which layers get experts: all, `{every: N}`, or a list of layer indices from 0. The others keep one FFN, taken
    from `shared`, which preparation does not train. Only for MoE architectures that have such layers, and whole
    FFNs."""
    channels: Literal["contiguous", "strided", "random"] = "contiguous"
    """Which channels of an FFN form a slice."""
    shared: Literal["last", "mean", "base"] = "last"
    """Source of attention, norms and embeddings: the last checkpoint, the mean of all, or the base (always the base for
    adapters). With `last`, the tokenizer, chat template, special tokens and generation settings also come from the last
    checkpoint, if it has them."""
    dtype: Dtype = "source"
    """Storage dtype of the assembled MoE; `source` keeps that of the checkpoints, which is float32 where the run trains
    them."""
    keep_vision: bool = False
    """For a multimodal base (Mistral3, Qwen3-VL, Qwen3.5, Gemma 4): write the finished model with the base's vision
    part, unchanged. Otherwise the MoE reads text only. Whole FFNs only."""

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
    """How the router is initialized; docs/paper.md describes each method. The paper's pre-optimisation is `upit`."""
    seed_from: Literal["held_out", "train"] = "held_out"
    """Where the seed data come from: rows held out of all training, or the training set (paper)."""
    seed_fraction: float = Field(0.01, gt=0, lt=1)
    """Share of the training rows used as seed data (paper: 1%)."""
    min_samples_per_expert: int = Field(20, ge=1)
    """Lower bound on the seed data: this many samples times the number of experts."""
    test_fraction: float = Field(0.25, ge=0, lt=1)
    """Share of the seed data set aside to measure how often the router ranks the assigned expert first."""
    assignment: Literal["balanced", "lowest_loss", "centred", "domain", "random"] = "balanced"
    """How samples are assigned to experts. `balanced`: equal buckets with the least total loss. `lowest_loss`: lowest
    loss (paper). `centred`: lowest loss after subtracting the expert's mean. `domain`: all samples of a domain to one
    expert. `random`: equal buckets at random (the paper's ablation)."""
    expert_learning_rate: float | None = Field(None, gt=0)
    """Also train the experts during the pre-optimisation (`start: upit`), with this learning rate. Null: keep them
    frozen (paper)."""
    equal_steps: bool = False
    """Repeat the samples of small buckets, so that every expert has equal weight in training and averages."""
    equal_norms: bool = False
    """Scale all routing vectors of a layer to the same norm."""
    logit_std: float | None = Field(2.0, gt=0)
    """Standard deviation over experts of the initial router logits. Null: do not rescale them."""
    ridge: float = Field(0.01, gt=0)
    """Penalty of `start: ridge`, in units of the mean square of the router's inputs."""
    epochs: int = Field(4, ge=1)
    """Passes over the seed data in the pre-optimisation (paper: 4)."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Weight of the language-modelling loss in the pre-optimisation; the auxiliary loss has 1 - alpha (paper: 0.5)."""
    learning_rate: float = Field(1.0e-3, gt=0)
    """AdamW's learning rate for the routing vectors in the pre-optimisation. The paper does not give one."""
    batch_size: int = Field(8, ge=1)
    """Samples per optimizer step of the pre-optimisation, of all experts together. The paper does not say."""
    tokens: Literal["answer", "all"] = "all"
    """Which tokens of a sample train its expert's routing vector: all tokens, or the answer's."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the random router, and of the router in the assembled MoE before stage 3."""
    slice_noise: float = Field(0.0, ge=0)
    """Noise that separates the routing vectors of one expert's slices, in units of the layer's standard deviation."""
    tokens_per_batch: int = Field(4096, ge=1)
    """Maximum tokens that go through the model at once in scoring and pre-optimisation, padding included."""

    @model_validator(mode="after")
    def _experts_move_in_upit_alone(self) -> "RouteSettings":
        if self.expert_learning_rate is not None and self.start != "upit":
            raise ValueError(f"expert_learning_rate is for start=upit; start={self.start} trains no experts")
        return self


class PosttrainSettings(TrainingSettings):
    """Stage 4, model upcycling: train the whole MoE on D."""

    schedule: Literal["continue", "restart"] | None = None
    """`continue`: one learning-rate schedule spans the epochs of preparation and post-training. `restart`:
    post-training has its own schedule, with a warm-up. Null: continue, or restart if `prepare.checkpoints` is set."""
    optimizer_state: Literal["carry", "fresh"] = "fresh"
    """Adam's moments at the start of post-training. `carry`: the last checkpoint's; every expert gets those of its FFN.
    `fresh`: zero."""
    experts_rate: float = Field(1.0, gt=0)
    """Learning rate of the experts, as a multiple of learning_rate."""
    shared_rate: float = Field(1.0, gt=0)
    """Learning rate of attention, norms and embeddings, as a multiple of learning_rate."""
    router_rate: float = Field(1.0, gt=0)
    """Learning rate of the routing vectors, as a multiple of learning_rate."""
    router_aux_loss_coef: float = Field(0.01, ge=0)
    """Weight of the load-balancing loss, which is computed per layer. 0 turns it off."""
    balance_over: Literal["slices", "experts"] = "slices"
    """What the load-balancing loss balances if experts are cut into slices (assemble.granularity)."""
    balance_scope: Literal["step", "micro_batch"] = "step"
    """Over which tokens the loss computes an expert's share. `step`: those of the step so far, in all micro-batches and
    processes, which lets experts specialise (arXiv 2501.11873). `micro_batch`: those of each micro-batch."""
    router_z_loss_coef: float = Field(0.0, ge=0)
    """Weight of the router z-loss, which keeps logits small (ST-MoE: 0.001). 0 turns it off."""
    balance_bias_rate: float = Field(0.0, ge=0)
    """Step size of the loss-free balancing bias (Wang et al.: 0.001), which fades out before the end. 0 turns it
    off."""
    freeze: Literal["none", "router", "experts", "shared"] = "none"
    """What post-training does not train. `shared` is attention, norms and embeddings."""
    report_to: Literal["none", "trackio", "wandb", "tensorboard"] = "none"
    """Also send the training log to this tracker, whose package must be installed. log.json is always written,
    tensorboard's events come into `RUN/tensorboard`."""

    @property
    def rates(self) -> dict[str, float]:
        """Of each part of the MoE (`routing.routers.parts`), in units of learning_rate."""
        return {"experts": self.experts_rate, "shared": self.shared_rate, "router": self.router_rate}


class DevicesSettings(Settings):
    """How a model is divided among the processes that train it (torchrun). The result of a run does not depend on
    it."""

    fsdp: int = Field(1, ge=1)
    """Number of processes that share every weight, gradient and optimizer state (FSDP2). 1: each process holds all."""
    ep: int = Field(1, ge=1)
    """How many of these processes hold different experts (expert parallelism). Must divide `fsdp`."""
    replicate: int = Field(1, ge=1)
    """Number of groups of `fsdp` processes, each with the whole model. One group per machine keeps traffic on the
    machine."""

    @property
    def processes(self) -> int | None:
        """How many processes must be started; None: any number."""
        return self.fsdp * self.replicate if self.fsdp > 1 else None

    @model_validator(mode="after")
    def _parts_fit(self) -> "DevicesSettings":
        if self.fsdp % self.ep:
            raise ValueError(f"ep {self.ep} does not divide fsdp {self.fsdp}")
        if self.replicate > 1 and self.fsdp == 1:
            raise ValueError("replicate is for groups of fsdp processes; without fsdp each process has the whole model")
        return self


class EvaluateSettings(Settings):
    """The evaluation that ends a run: held-out loss, and exact match where answers are short."""

    models: Literal["all", "ends"] = "all"
    """What to score. `all`: the base, every checkpoint and the MoE. `ends`: the base, the last checkpoint (every
    one with `prepare.by_domain`) and the MoE."""
    exact_match: bool = True
    """Also generate greedily and compare with the reference answer, for rows with short answers."""
    max_answer_tokens: int = Field(16, ge=1)
    """Rows with longer answers do not count towards exact match."""
    max_generated: int = Field(500, ge=1)
    """Maximum rows per model for exact match."""
    tokens_per_batch: int = Field(8192, ge=1)
    """Maximum tokens per forward pass, padding included."""
