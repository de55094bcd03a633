"""The stages in the order in which they run, a row each: everything that is known of a stage is in its row.

prepare -> expand -> assemble -> route -> posttrain -> evaluate. A new stage is one more row.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from upcycle.console import say, warn
from upcycle.distributed.world import on_main
from upcycle.errors import UpcycleError, counted
from upcycle.pipeline.fit import say_fit
from upcycle.pipeline.run import Run
from upcycle.pipeline.stage import Sections, Stage
from upcycle.reading import brief
from upcycle.recipe import Recipe
from upcycle.records.files import (
    ASSEMBLE,
    CHECKPOINTS,
    EVALUATE,
    EXPAND,
    LOG,
    MOMENTS,
    POSTTRAIN,
    PREPARE,
    RESULT,
    ROUTE,
    ROUTE_REPORT,
    ROUTER,
)
from upcycle.records.scores import BASE, MOE, MOE_INIT
from upcycle.settings import TrainingSettings

if TYPE_CHECKING:  # what imports torch
    import upcycle.experts.active


def _prepare(run: Run, out: Path) -> None:
    from upcycle.architectures.check import say_text_part
    from upcycle.architectures.layouts import ffn_layers
    from upcycle.stages.expert_preparation.checkpoints import adopt
    from upcycle.weights.safetensors_io import ModelReader

    base, recipe = run.base, run.recipe
    check_training(recipe)
    say_text_part(ModelReader(base.folder), recipe.assemble.keep_vision)
    found = run.kind.read_base(base, recipe)
    if recipe.tunes or POSTTRAIN in run.asked:  # else nothing is trained yet, and TRL is not waited for
        say_fit(run, found)
    if not recipe.prepares:
        say("prepare: no expert comes from a checkpoint, so there is nothing to train (expand.copies_of=base)")
        on_main(lambda: CHECKPOINTS.write(out, []))
    elif recipe.prepare.checkpoints:
        on_main(lambda: adopt(run.kind, base, run.given_checkpoints, out) and None)
        if base.layers is not None:
            warn(
                f"prepare: {counted(len(ffn_layers(base.config)) - len(base.layers), 'layer')} with one FFN, that of "
                f"assemble.shared={recipe.assemble.shared}, so a single expert differs from its checkpoint"
            )
    else:
        from upcycle.stages.expert_preparation.prepare import tune

        tune(run.kind, base, run.splits.train, recipe, out, run.splits.validation)


def check_training(recipe: Recipe) -> None:
    """What TRL would refuse, before anything is made; a run that brings its checkpoints and says nothing to TRL does
    not wait for it to be imported."""
    for name in (PREPARE, POSTTRAIN):
        settings: TrainingSettings = getattr(recipe, name)
        if recipe.tunes or settings.trainer or getattr(settings, "report_to", "none") != "none":
            from upcycle.training.trainer_settings import check

            check(name, settings)


def _expand(run: Run, out: Path) -> None:
    from upcycle.stages.expert_expansion.expand import expand

    recipe = run.recipe
    expand(run.kind, run.base, run.checkpoints, run.checkpoint_folders, recipe.expand, recipe.seed, out)


def _assemble(run: Run, out: Path) -> None:
    from upcycle.data.chat import end_of_turn
    from upcycle.pipeline.origin import write_origin
    from upcycle.stages.model_upcycling.assemble import assemble

    assemble(run.kind, run.base, run.checkpoint_folders, run.plan, run.recipe, out)
    write_origin(run, out)
    try:
        tokenizer = run.base.tokenizer
    except UpcycleError:
        return  # without a chat template, which this stage can do without
    if (end := end_of_turn(tokenizer)) is not None and run.base.generate_until(out, end):
        token = tokenizer.convert_ids_to_tokens(end)
        say(f"assemble: the chat template ends turns with {token}: generation stops there too (generation_config.json)")


def _route(run: Run, out: Path) -> None:
    from upcycle.data.samples import domains
    from upcycle.stages.router_initialization.route import route

    names = [expert.name for expert in run.plan.experts]
    splits, recipe = run.splits, run.recipe
    unseen = sorted(set(domains(splits.train)) - set(domains(splits.seed.fit)))
    if unseen:
        warn(
            f"route: no seed sample is of {', '.join(unseen)}: no routing vector learns from such rows; raise "
            "route.seed_fraction or route.min_samples_per_expert"
        )
    route(run.base, run.assembled_moe, splits.seed, names, recipe.route, recipe.seed, out)


def _posttrain(run: Run, out: Path) -> None:
    from upcycle.stages.model_upcycling.moments import carried
    from upcycle.stages.model_upcycling.posttrain import posttrain
    from upcycle.training.trainer_settings import check

    check(POSTTRAIN, run.recipe.posttrain)
    base, recipe, moments = run.base, run.recipe, None
    if PREPARE not in run.asked:
        say_fit(run, run.kind.read_base(base, recipe))
    if recipe.carries:
        last = run.checkpoint_folders[-1]
        moments = partial(carried, run.kind, base, MOMENTS.of(run.folder), last, run.plan, recipe)
    splits = run.splits
    posttrain(base, run.routed_moe, ROUTER.of(run.folder), splits.train, recipe, out, moments, splits.validation)


def _evaluate(run: Run, out: Path) -> None:
    from upcycle.evaluation.evaluate import Assigned, Candidate, evaluate

    settings, splits, by_domain = run.recipe.evaluate, run.splits, run.recipe.prepare.by_domain
    folders = zip(run.checkpoints, run.checkpoint_folders, strict=True)
    dense = [Candidate(checkpoint.name, folder) for checkpoint, folder in folders]
    candidates = [
        Candidate(BASE, run.base.folder),
        *(dense[-1:] if settings.models == "ends" and not by_domain else dense),
        Candidate(MOE_INIT, run.routed_moe, ROUTER.of(run.folder)),
        Candidate(MOE, RESULT.of(run.folder)),
    ]
    held_out = ROUTE_REPORT.read_of(run.folder).held_out
    assigned = Assigned(splits.seed.test, held_out.assigned, run.recipe.route.tokens) if held_out else None
    evaluate(run.base, candidates, splits.validation, settings, out, assigned, one_run=not by_domain)


def _section(name: str) -> Callable[[Recipe], Sections]:
    """A section of the recipe, and what decides the experts' kind."""
    return lambda recipe: {name: getattr(recipe, name).model_dump(), **recipe.kind_settings}


def _scheduled(name: str) -> Callable[[Recipe], Sections]:
    """A section of training, and what goes from one training to the other: the schedule, the optimizer state."""

    def sections(recipe: Recipe) -> Sections:
        own = _section(name)(recipe)
        for field in ("schedule", "optimizer_state"):  # what they come to follows
            own[name].pop(field, None)
        share = {"dense_share": recipe.dense_share} if recipe.dense_share < 1 else {}
        return own | share | ({"carries": True} if recipe.carries else {})

    return sections


def _assembled(recipe: Recipe) -> Sections:
    own = _section(ASSEMBLE)(recipe)
    own[ASSEMBLE].pop("keep_vision")  # of the finished MoE
    return own | {"init_std": recipe.route.init_std}


def _posttrained(recipe: Recipe) -> Sections:
    return _scheduled(POSTTRAIN)(recipe) | ({"keep_vision": True} if recipe.assemble.keep_vision else {})


def _trained_tokens(folder: Path) -> int:
    record = LOG.known(folder)
    return record.tokens if record else 0


def _started_tokens(folder: Path) -> int:
    cost = ROUTE_REPORT.read(folder).cost
    return cost.backward if cost else 0


def _started_flops(active: "upcycle.experts.active.Active", folder: Path) -> int:
    cost = ROUTE_REPORT.read(folder).cost
    return active.dense * (2 * (cost.scoring + cost.forward) + 4 * cost.backward) if cost else 0


def _less_memory(section: str, last: str) -> str:
    return (
        f"set {section}.micro_batch_size=1 and {section}.gradient_checkpointing=true, devices.fsdp with as many "
        f"processes, or {last}; with --update: the "
        "stages before are kept, this one begins anew"
    )


STAGES = (
    Stage(
        name=PREPARE,
        help="Stage 1, expert preparation: fine-tune the base and keep checkpoints, or use existing ones.",
        needs=(),
        run=_prepare,
        by_all=True,
        less_memory=_less_memory("prepare", "prepare.train=lora"),
        settings=_scheduled(PREPARE),
        reads_data=lambda recipe: recipe.tunes,
        held_out=lambda recipe: recipe.tunes and recipe.route.seed_from == "held_out",
        more_inputs=lambda run: run.given_hashes,
        tokens=_trained_tokens,
        flops=lambda active, folder: 6 * active.dense * _trained_tokens(folder),
    ),
    Stage(
        name=EXPAND,
        help="Stage 2, expert expansion: plan m experts from n checkpoints by merging the most dissimilar ones.",
        needs=(PREPARE,),
        run=_expand,
        settings=_section(EXPAND),
    ),
    Stage(
        name=ASSEMBLE,
        help="Stage 4, first half, runs before stage 3: write the MoE from the experts in one streaming pass.",
        needs=(PREPARE, EXPAND),
        run=_assemble,
        settings=_assembled,
        reads_template=True,
    ),
    Stage(
        name=ROUTE,
        help="Stage 3, router initialization: assign seed data to experts and initialize the router from them.",
        needs=(ASSEMBLE,),
        run=_route,
        by_all=True,
        less_memory="set route.tokens_per_batch=1024 or less, with --update; the stages before are kept",
        settings=_section(ROUTE),
        reads_data=lambda _: True,
        held_out=lambda _: True,
        tokens=_started_tokens,
        flops=_started_flops,
    ),
    Stage(
        name=POSTTRAIN,
        help="Stage 4, second half, model upcycling: train the MoE with top-k routing and a load-balancing loss.",
        needs=(ASSEMBLE, ROUTE),
        run=_posttrain,
        by_all=True,
        less_memory=_less_memory("posttrain", "posttrain.freeze=experts"),
        settings=_posttrained,
        reads_data=lambda _: True,
        held_out=lambda recipe: recipe.route.seed_from == "held_out",
        tokens=_trained_tokens,
        flops=lambda active, folder: 6 * active.moe * _trained_tokens(folder),
    ),
    Stage(
        name=EVALUATE,
        help="Score the base, the checkpoints and the MoE on held-out rows, by domain.",
        needs=(PREPARE, ASSEMBLE, ROUTE, POSTTRAIN),
        run=_evaluate,
        by_all=True,
        less_memory="set evaluate.tokens_per_batch=1024 or less, with --update; the stages before are kept",
        settings=_section(EVALUATE),
        reads_data=lambda _: True,
        reads_validation=True,
    ),
)


def stage_names() -> tuple[str, ...]:
    """In the order in which they run."""
    return tuple(stage.name for stage in STAGES)


def stages_until(last: str, option: str) -> tuple[str, ...]:
    """The stages up to `last`, in the order in which they run.

    Raises:
        UpcycleError: there is no such stage; names the option that asked for it.
    """
    check_stage(last, option)
    names = stage_names()
    return names[: names.index(last) + 1]


def check_stage(name: str, option: str) -> None:
    """Raises UpcycleError if there is no such stage; names the option that asked for it."""
    if name not in (names := stage_names()):
        raise UpcycleError(f"{option} is {brief(name)}, expected one of {', '.join(names)}")


def training_tokens(run: Path) -> dict[str, int]:
    """By stage, of those that train and have been run."""
    return {stage.name: stage.tokens(folder) for stage, folder in _trained(run) if stage.tokens}


def training_flops(run: Run) -> dict[str, int]:
    """By stage, of those that train and have been run; the scores of attention left out."""
    active = run.kind.active(run.base, run.recipe)
    return {stage.name: stage.flops(active, folder) for stage, folder in _trained(run.folder)}


def _trained(run: Path) -> list[tuple[Stage, Path]]:
    return [(stage, run / stage.name) for stage in STAGES if stage.tokens and (run / stage.name).is_dir()]
