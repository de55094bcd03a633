"""LoRA adapters as experts: on one shared base while they train, folded into a plain MoE at the end.

Legend: E experts, T tokens, H hidden, I intermediate size, r rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from upcycle.architectures.mapping import Mapping as PlainMapping
from upcycle.architectures.mapping import map_model, read_region
from upcycle.architectures.moves import Region
from upcycle.console import say, warn
from upcycle.distributed.device import compute_dtype, pick_device
from upcycle.errors import NoTwinError, UpcycleError
from upcycle.experts.active import active_additions
from upcycle.experts.adapter_agreement import check_adapter_agreement, load_adapted
from upcycle.experts.adapter_files import (
    PREFIX,
    base_of,
    ffn_shapes,
    is_adapter,
    merged_weight,
    name_base,
    read_adapter,
    read_adapter_config,
    read_tensors,
)
from upcycle.experts.gram import Measure, adapter_gram
from upcycle.experts.kind import Kind, Load, Routers
from upcycle.experts.linears import FFN_WEIGHTS, Shapes, structure_of, weights_in
from upcycle.experts.lora_ffn import DenseFfn, Factors, UngatedFactors, lora_ffn
from upcycle.experts.mixture import (
    MixtureConfig,
    NewExperts,
    check_trained_on,
    expert_tensor,
    load_mixture,
    load_tensors,
    router_keys,
    router_names,
    save_checkpoint,
    save_mixture,
    write_new,
)
from upcycle.experts.plain_moe import Parts, Piece, storage_dtype, write_moe
from upcycle.experts.structure import Dense, check_base, check_routing, checked_dense, checked_mapping, may_have_twin
from upcycle.merging.lineage import Child
from upcycle.merging.low_rank import Adapter, LowRank, fresh, materialise_adapters
from upcycle.recipe import Recipe
from upcycle.records.description import Description
from upcycle.records.files import LINEAGE, MANIFEST
from upcycle.records.plan import ExpansionPlan, Expert, Gram
from upcycle.settings import AssembleSettings, DevicesSettings, ExpandSettings, LoraSettings
from upcycle.types import Config, Model
from upcycle.weights.base import Base
from upcycle.weights.folders import copy_companions, find_model, load_dense
from upcycle.weights.safetensors_io import ModelReader

LORA_MIXTURE = "UPCYCLE_LORA_MOE"


class StackedLora(nn.Module):
    """The low-rank updates of one weight: of all experts, padded to one rank."""

    def __init__(self, num_experts: int, rank: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(num_experts, rank, inputs))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, rank, outputs))  # transposed, see Factors


class LoraExperts(nn.ModuleDict):
    """gate_proj (if there is a gate), up_proj and down_proj of all experts of a layer."""

    scaling: Float[Tensor, " E"]

    def __init__(self, config: MixtureConfig, shapes: Shapes) -> None:
        count, rank = config.num_experts, config.padded_rank
        super().__init__({name: StackedLora(count, rank, *shape) for name, shape in shapes.items()})
        self.register_buffer("scaling", torch.tensor(config.expert_scaling), persistent=False)

    def factors(self) -> Factors | UngatedFactors:
        *gate, up, down = (cast(StackedLora, stacked) for stacked in self.values())
        if not gate:
            return UngatedFactors(up.lora_A, up.lora_B, down.lora_A, down.lora_B)
        a_in = torch.cat([gate[0].lora_A, up.lora_A], dim=1)
        return Factors(a_in, gate[0].lora_B, up.lora_B, down.lora_A, down.lora_B)

    def forward(
        self, ffn: DenseFfn, hidden: Float[Tensor, "T H"], weights: Float[Tensor, "T k"], chosen: Int[Tensor, "T k"]
    ) -> Float[Tensor, "T H"]:
        return lora_ffn(hidden, ffn, weights, chosen, self.factors(), self.scaling)

    def on_disk(self, expert: int, rank: int) -> Iterator[tuple[str, Tensor]]:
        """(name, view) of an expert's A and B of each weight, without the padding of their rank."""
        for weight, module in self.items():
            stacked = cast(StackedLora, module)
            yield f"{weight}.lora_A", stacked.lora_A.data[expert, :rank]
            yield f"{weight}.lora_B", stacked.lora_B.data[expert, :rank].T


def read_base(base: Base, recipe: Recipe) -> PlainMapping | Dense:
    """The mapping to what the mixture can be folded into; if there is none that is said, and the dense model does.

    Raises:
        UpcycleError: see `checked_mapping` and `checked_dense`.
    """
    try:
        mapping = checked_mapping(base, recipe)
        check_routing(mapping.family, mapping.config, recipe.assemble.num_experts_per_tok)
        return mapping
    except NoTwinError as error:
        warn(
            f"{base.config['model_type']} has no exact plain MoE ({error.reason}): only upcycle with transformers "
            "can serve this mixture of adapters, and `upcycle export --fold` will refuse it"
        )
        return checked_dense(base)


def check_checkpoint(base: Base, _first: Path, checkpoint: Path) -> None:
    """Raises UpcycleError if a checkpoint is no adapter of the base's FFN weights, or is read otherwise by PEFT."""
    if not is_adapter(checkpoint):
        raise UpcycleError(f"{checkpoint} is not an adapter (no adapter_config.json), but prepare.train is lora")
    check_adapter_agreement(base.folder, checkpoint, read_adapter(checkpoint, base.config))
    warn_of_another_base(base, checkpoint)


def warn_of_another_base(base: Base, checkpoint: Path) -> None:
    """Adapters fit any base of the same shape; only their own words tell which one they were trained on."""
    named = read_adapter_config(checkpoint).get("base_model_name_or_path")
    if named is not None and Path(str(named)).name != Path(base.name).name:
        warn(f"{checkpoint} was trained on {named}, by its own words; the base here is {base.name}: the same model?")


def trainable(base: Base, lora: LoraSettings, seed: int, _devices: DevicesSettings) -> Model:
    """PEFT's adapters on the FFN weights of the frozen base, which every process has whole."""
    from peft import LoraConfig, get_peft_model

    dtype = compute_dtype(pick_device())  # frozen: not worth fp32 where bf16 is quick
    model = load_dense(base.folder, dtype, lora.four_bit)
    torch.manual_seed(seed)  # of A
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=target_linears(model, lora.targets),
    )
    return get_peft_model(model.train(), config)


def target_linears(model: Model, targets: Sequence[str]) -> list[str]:
    """The linear layers in which a dense model has the FFN weights `targets`.

    Raises:
        UpcycleError: there is no such weight, or a layer holds another one too.
    """
    structure = structure_of(model.model.layers[0].mlp)
    assert structure is not None  # see `check_base`
    missing = sorted(set(targets).difference(structure.weights))
    if missing and set(targets) != set(FFN_WEIGHTS):  # which are all that there are
        raise UpcycleError(
            f"lora.targets is {list(targets)}, but the FFN of this base has no {missing[0]}, only "
            f"{' and '.join(structure.weights)}: name of these, or leave lora.targets out"
        )
    chosen = {name: weights for name, weights in structure.linears.items() if not set(targets).isdisjoint(weights)}
    for name, weights in chosen.items():
        if not set(targets).issuperset(weights):
            raise UpcycleError(
                f"lora.targets is {list(targets)}, but this base has {' and '.join(weights)} in one layer, {name}, "
                "which PEFT adapts as a whole; name both or none"
            )
    return list(chosen)


def compare(base: Base, folders: Sequence[Path], settings: ExpandSettings, seed: int) -> tuple[Gram, Measure]:
    """Inner products of what adapters add; those of children are measured, as they are not linear in the products."""
    adapters = [read_adapter(folder, base.config) for folder in folders]
    if _has_children(settings, len(adapters)):
        check_mergeable(folders, adapters, settings.adapters)
    known: list[Adapter] = []
    gram = np.zeros((0, 0))

    def measure(experts: Sequence[Expert]) -> Gram:
        nonlocal gram
        for expert in experts[len(known) :]:
            known.append(_adapter(expert, adapters, known, settings, seed))
        gram = adapter_gram(known, gram)
        return gram

    return adapter_gram(adapters), measure


def _adapter(
    expert: Expert, checkpoints: Sequence[Adapter], known: Sequence[Adapter], settings: ExpandSettings, seed: int
) -> Adapter:
    """What an expert adds to the base, from the adapters of the experts before it."""
    if expert.kind == "child":
        child = [Child(expert.parents, expert.weights)]
        how = settings.adapters
        return materialise_adapters(known, child, settings.merge, settings.drop_rate, how, seed)[0]
    return {} if expert.checkpoint is None else checkpoints[expert.checkpoint]


def _has_children(settings: ExpandSettings, n: int) -> bool:
    try:
        chosen = settings.num_chosen(n)
    except ValueError as error:
        raise UpcycleError(str(error)) from None
    return settings.copies_of == "none" and chosen + settings.keep_base < settings.num_experts


def check_mergeable(folders: Sequence[Path], adapters: Sequence[Adapter], how: str) -> None:
    """Raises UpcycleError if A and B cannot be merged apart: ranks of a weight differ, or a scaling is negative."""
    known: dict[str, tuple[Path, int]] = {}
    for folder, adapter in zip(folders, adapters, strict=True) if how != "product" else ():
        for name, update in adapter.items():
            first, rank = known.setdefault(name, (folder, update.rank))
            if update.rank != rank:
                raise UpcycleError(
                    f"{folder}: rank {update.rank} at {name}, but {rank} in {first}; set expand.adapters=product, "
                    "which merges products of any ranks, or as many experts as adapters"
                )
            if update.scaling < 0:
                raise UpcycleError(
                    f"{folder}: lora_alpha at {name} is negative, so A and B have no shares of the scaling to be "
                    "merged apart with; set expand.adapters=product, or as many experts as adapters"
                )


def assemble(
    base: Base,
    folders: Sequence[Path],
    plan: ExpansionPlan,
    settings: AssembleSettings,
    lora: LoraSettings,
    routers: Routers,
    out_dir: Path,
    moments: bool = False,
) -> None:
    """Write the compact folder of a mixture. An expert that is the base itself starts as a fresh adapter.

    Raises:
        UpcycleError: see `read_adapter`.
    """
    for folder in folders:
        warn_of_another_base(base, folder)
    experts = lora_experts(plan, [read_adapter(folder, base.config) for folder in folders], lora, base.config)
    what = write_new(base, plan, settings, routers, _uniform(experts, base.config), out_dir)
    if not moments:
        say(what)


def lora_experts(plan: ExpansionPlan, adapters: Sequence[Adapter], lora: LoraSettings, config: Config) -> list[Adapter]:
    """Every expert of the plan as an adapter; the base itself is a fresh one, and adds nothing to its children."""
    sources: list[Adapter] = [{} if e.checkpoint is None else adapters[e.checkpoint] for e in plan.sources]
    children = [Child(e.parents, e.weights) for e in plan.children]
    assert plan.adapters is not None
    made = materialise_adapters(sources, children, plan.merge, plan.drop_rate, plan.adapters, plan.seed)
    return [*(source or _fresh(i, lora, config, plan.seed) for i, source in enumerate(sources)), *made]


def _fresh(number: int, lora: LoraSettings, config: Config, seed: int) -> Adapter:
    draw = torch.Generator().manual_seed(seed * 65_537 + number)
    shapes = {name: shape for name, shape in ffn_shapes(config).items() if name.rpartition(".")[2] in lora.targets}
    return {name: fresh(shape, lora.rank, lora.scaling, draw) for name, shape in shapes.items()}


def _uniform(experts: Sequence[Mapping[str, LowRank]], config: Config) -> NewExperts:
    """One rank and scaling per expert, with zeros where it adds nothing."""
    ranks = [max(update.rank for update in expert.values()) for expert in experts]
    scalings = [next((update.scaling for update in expert.values() if update.scaling), 1.0) for expert in experts]
    tensors: dict[str, Tensor] = {}
    for number, (expert, rank, scaling) in enumerate(zip(experts, ranks, scalings, strict=True)):
        for name, (outputs, inputs) in ffn_shapes(config).items():
            update = expert.get(name, LowRank(torch.zeros(1, inputs), torch.zeros(outputs, 1), scaling))
            a = nn.functional.pad(update.a.float(), (0, 0, 0, rank - update.rank))
            b = nn.functional.pad(update.b.float() * (update.scaling / scaling), (0, rank - update.rank))
            tensors |= lora_tensors(name, number, a, b)
    return NewExperts(LORA_MIXTURE, ranks, scalings, tensors)


def lora_tensors(module: str, expert: int, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """An expert's A and B of a weight, named as on disk."""
    return {expert_tensor(module, expert, "lora_A"): a, expert_tensor(module, expert, "lora_B"): b}


def expert_updates(folder: Path, config: MixtureConfig) -> list[dict[str, LowRank]]:
    """The LoRA experts of a compact folder, by the name of the weight's module."""
    tensors = read_tensors(folder)
    experts: list[dict[str, LowRank]] = []
    for expert, scaling in enumerate(config.expert_scaling):
        marker = f".experts.{expert}."
        names = sorted(n for n in tensors if marker in n and n.endswith(".lora_A.weight"))
        updates = {}
        for name in names:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight").replace(marker, ".")
            updates[module] = LowRank(tensors[name], tensors[expert_tensor(module, expert, "lora_B")], scaling)
        experts.append(updates)
    return experts


def load(how: Load) -> Model:
    """A mixture, or the dense model with one adapter (any of PEFT's) merged into it."""
    config = read_adapter_config(how.folder)
    if config.get("peft_type") == LORA_MIXTURE:
        return load_mixture(how, LoraExperts)
    base = base_of(how.folder, how.base)
    merged: Model = load_adapted(base, how.folder, how.dtype).merge_and_unload().to(how.device).eval()
    return merged


def fold(source: Path, target: Path, dtype: str, base_name: str | None = None) -> None:
    """Stream a mixture of LoRA experts into a plain MoE: expert i has the weights W + s_i B_i A_i.

    Raises:
        UpcycleError: another base than the mixture was trained on, or what `write_moe` refuses.
    """
    config = MixtureConfig.load(source)
    base = find_model(base_name or config.base_model_name_or_path)
    check_same_base(source, base)
    reader = ModelReader(base)
    try:
        mapping = map_model(base, reader, config.num_experts)
        check_routing(mapping.family, mapping.config, config.num_experts_per_tok)
    except NoTwinError as error:
        raise UpcycleError(f"{error}; export {source} without --fold, for use with upcycle and its base") from None
    experts, kept = expert_updates(source, config), read_tensors(source)

    def expert(number: int, region: Region) -> Tensor:
        weights = weights_in(region.tensor.removesuffix(".weight"))
        update = experts[number].get(weights[region.row // region.shape[0]])
        return merged_weight(read_region(reader, region), update)

    def all_experts(region: Region) -> Iterator[Piece]:
        return ((number, 0, expert(number, region)) for number in range(config.num_experts))

    parts = Parts(
        shared=[reader],
        experts=all_experts,
        expert=expert,
        routers=[kept[name] for name in router_names(mapping.config["num_hidden_layers"])],
        compared=range(config.num_experts),
        num_experts_per_tok=config.num_experts_per_tok,
    )
    write_moe(target, mapping, parts, storage_dtype(dtype, reader, mapping), "export", "take --dtype bfloat16")
    copy_companions(source, target)
    if (lineage := LINEAGE.known(source)) is not None:
        flops = mapping.flops_over_dense(config.num_experts_per_tok)
        LINEAGE.write(target, lineage.model_copy(update={"flops_over_dense": flops}))


def check_same_base(source: Path, base: Path) -> None:
    """Raises UpcycleError if a run trained the mixture on another base than `base`."""
    check_trained_on(MixtureConfig.load(source).base_hash, base, source)
    if (manifest := MANIFEST.known(source)) is not None:
        check_trained_on(f"{manifest.format}:{manifest.inputs.get('base')}", base, source)


def describe(folder: Path) -> Description:
    """From its configuration."""
    if read_adapter_config(folder).get("peft_type") != LORA_MIXTURE:
        return Description("A LoRA adapter (it needs its base)", plain=False)
    config = MixtureConfig.load(folder)
    what = f"A mixture of {config.num_experts} LoRA adapters in compact form (it needs its base and upcycle)"
    return Description(
        what, plain=False, folds=may_have_twin(config.base_model_name_or_path, config.num_experts_per_tok)
    )


def addition(config: Config, recipe: Recipe) -> int:
    """Parameters of an expert."""
    targets = tuple(f".{weight}" for weight in recipe.lora.targets)
    return sum(recipe.lora.rank * sum(shape) for name, shape in ffn_shapes(config).items() if name.endswith(targets))


LORA = Kind(
    peft_types=("LORA", LORA_MIXTURE),
    frozen=frozenset({"shared"}),
    check_base=check_base,
    read_base=read_base,
    check_checkpoint=check_checkpoint,
    trainable=trainable,
    num_saved=lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad),
    finish_checkpoint=lambda folder, base: name_base(folder, base.name),
    merge_rule=lambda settings: settings.adapters,
    compare=compare,
    assemble=assemble,
    load=load,
    save=save_mixture,
    save_checkpoint=save_checkpoint,
    resume=load_tensors,
    router_keys=router_keys,
    fold=fold,
    active=active_additions(addition),
    describe=describe,
    addition=addition,
)
"""Adapters, and the mixture of them."""
ADAPTER = replace(LORA, save_checkpoint=None, resume=None)
"""One adapter, as PEFT trains it: the Trainer knows how to save it and go on."""
