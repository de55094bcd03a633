"""A first recipe: what the model becomes, what the data hold, what fits, and a file with a comment for each setting."""

import glob
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.console import tell, warn
from upcycle.disk import check_writable, expanded, write_text
from upcycle.errors import NoTwinError, UpcycleError, counted, nearest
from upcycle.pipeline.commented import commented
from upcycle.pipeline.fit import CHOSEN_FIRST, Devices, devices_here, show_ways, tell_the_rest, typed, ways
from upcycle.pipeline.run import Run
from upcycle.recipe import Recipe, as_override, load_recipe, read_values, shipped_recipes
from upcycle.records.files import POSTTRAIN, PREPARE

if TYPE_CHECKING:  # what imports torch; the annotations are whole names, which the checks of the tests can follow
    import upcycle.architectures.mapping
    import upcycle.experts.structure

DEFAULT, ADAPTERS = "upit", "upit-lora"
"""Methods: what is taken, and what works where no MoE architecture matches."""
CHANGED = (
    *("data.max_length", "data.validation_fraction", "prepare.train", "prepare.epochs", "prepare.checkpoint_every"),
    *("prepare.learning_rate", "prepare.batch_size", "prepare.micro_batch_size", "expand.num_experts"),
    *("assemble.num_experts_per_tok", "posttrain.epochs", "posttrain.learning_rate", "posttrain.batch_size"),
    *("posttrain.micro_batch_size", "seed"),
)
"""Settings that are written whatever the method says of them: people change them."""

STEPS = 2
"""Of the optimizer before the first checkpoint: the first of a warm-up has the learning rate 0."""


@dataclass(frozen=True)
class Wanted:
    """What a user has said of a new recipe."""

    base: str
    data: Sequence[str]
    validation: str | None = None
    method: str | None = None
    """None: `DEFAULT`, or `ADAPTERS` where that alone works."""
    checkpoints: str | None = None
    """A Trainer's folder, or a pattern of model folders."""
    chat_template: str | None = None
    """`chatml`, or a Jinja file; None: the model's own."""
    devices: Devices | None = None
    """None: what is here."""


@dataclass(frozen=True)
class Draft:
    """A method with overrides, and what is said of them."""

    method: str
    overrides: tuple[str, ...]
    notes: dict[str, str] = field(default_factory=dict)
    """Setting to why it was chosen."""

    def recipe(self, more: Sequence[str] = ()) -> Recipe:
        return load_recipe(self.method, [*self.overrides, *more])

    def having(self, overrides: Sequence[str], note: str) -> "Draft":
        chosen = {override.partition("=")[0]: note for override in overrides}
        return replace(self, overrides=(*self.overrides, *overrides), notes={**self.notes, **chosen})

    @property
    def names(self) -> list[str]:
        """The settings to write: what the method changes, what was given or chosen, and what people change."""
        recipe = self.recipe()
        given = {override.partition("=")[0] for override in self.overrides}
        changed = {name for name in _names(read_values(self.method)) if _is_changed(recipe, name)}
        idle = {"data.validation_fraction"} if recipe.data.validation else set()
        if not recipe.tunes:
            idle |= {name for name in CHANGED if name.startswith("prepare.")}
        return sorted(given | changed | (set(CHANGED) - idle))


def ask(given: dict[str, Any], prompt: Callable[..., str]) -> dict[str, Any]:
    """The options of `upcycle init` with what is missing asked for on a terminal.

    Args:
        prompt: typer's, or one that takes a question and a `default`.

    Raises:
        UpcycleError: something is missing and there is nobody to ask.
    """
    missing = [flag for flag in ("base", "data") if not given[flag]]
    if not missing:
        return given
    if not sys.stdin.isatty():
        meant = {"base": "a model folder or hub name", "data": "a file with chats"}
        raise UpcycleError("; ".join(f"--{flag} is missing: give {meant[flag]}" for flag in missing))
    asked = dict(given)
    if not asked["base"]:
        asked["base"] = prompt("Dense model (folder or hub name)", default=read_values(DEFAULT)["base"])
    if not asked["data"]:
        found = sorted(path.name for path in Path().glob("*.jsonl*"))
        question = "Training data (file, folder, pattern or hub dataset)"
        asked["data"] = [prompt(question, default=found[0] if found else None)]
    if not asked["validation"]:
        question = "Held-out data (empty: hold out a share of the training data)"
        asked["validation"] = prompt(question, default="", show_default=False) or None
    if not asked["checkpoints"]:
        question = "Your own checkpoints (Trainer folder or pattern; empty: fine-tune now)"
        asked["checkpoints"] = prompt(question, default="", show_default=False) or None
    return asked


def check_free(out: Path) -> None:
    """Raises UpcycleError if a new file cannot be written there, or would replace one."""
    check_writable(out)
    if out.exists():
        raise UpcycleError(f"{out} exists and is not replaced; give --out another file, or remove it")


def start(wanted: Wanted, out: Path) -> None:
    """Look at the model and the data, choose what fits, and write a recipe with a comment for each setting.

    Raises:
        UpcycleError: `out` exists; nothing can be made of the model, the checkpoints or the data, with what would work.
    """
    from upcycle.data.sources import files_of

    check_free(out)
    for name in filter(None, (*wanted.data, wanted.validation)):
        files_of(name)  # before a large model is read
    draft, base = _understood(wanted)
    becomes, num_experts = _becomes(draft.recipe(), base), draft.recipe().expand.num_experts
    tell(f"base: {becomes}")
    draft, lengths = _read_data(draft)
    if draft.recipe().expand.num_experts != num_experts:
        draft, base = _read_base(draft, ())
        becomes = _becomes(draft.recipe(), base)
        tell(f"base, with an expert for each domain: {becomes}")
    draft, devices, said = _fitted(draft, base, lengths, wanted.devices)
    head = [_title(draft.method), f"Base: {becomes}.", f"Memory: {said}.", "`upcycle settings` lists all settings."]
    write_text(out, commented(draft.recipe(), draft.names, head, draft.notes))
    tell(f"written: {out}, {counted(len(draft.names), 'setting')} with comments; all others keep their defaults")
    tell("\n".join(["next:", *(f"    {line}" for line in _next_commands(out, devices))]))


def methods() -> list[str]:
    """The recipes in the package that leave model and data to the user."""
    return sorted(name for name in shipped_recipes() if read_values(name)["data"] == {"train": "train.jsonl"})


def _understood(
    wanted: Wanted,
) -> tuple[Draft, "upcycle.architectures.mapping.Mapping | upcycle.experts.structure.Dense"]:
    """A method that works on the model, and the model as it is read."""
    method, known = wanted.method, methods()
    if method is not None and method not in known:
        raise UpcycleError(
            f"--method is '{method}', expected one of {', '.join(known)} (`upcycle recipes`){nearest(method, known)}"
        )
    given = _checkpoints(wanted.checkpoints)
    method = method or (ADAPTERS if given and _holds_adapter(given[0]) else DEFAULT)
    try:
        return _read_base(_draft(wanted, method, given), given)
    except NoTwinError as error:
        if method == ADAPTERS or (given and not _holds_adapter(given[0])):
            raise
        try:
            understood = _read_base(_draft(wanted, ADAPTERS, given), given)
        except UpcycleError:
            raise error from None
        if wanted.method is not None:
            raise UpcycleError(f"{error}; give --method {ADAPTERS}") from None
        tell(f"base: whole FFNs cannot be its experts, so the method is {ADAPTERS}")
        return understood


def _draft(wanted: Wanted, method: str, checkpoints: Sequence[Path]) -> Draft:
    train = wanted.data[0] if len(wanted.data) == 1 else list(wanted.data)
    values: dict[str, Any] = {"base": wanted.base, "data.train": train}
    if wanted.validation:
        values["data.validation"] = wanted.validation
    if wanted.chat_template:
        values["data.chat_template"] = wanted.chat_template
    if checkpoints and not _drafted(method, values).recipe().prepares:
        raise UpcycleError(f"--checkpoints: {method} makes its experts of copies of the base; give another --method")
    if wanted.checkpoints:
        is_folder = expanded(wanted.checkpoints).is_dir()
        values["prepare.checkpoints"] = wanted.checkpoints if is_folder else list(map(str, checkpoints))
    return _drafted(method, values)


def _drafted(method: str, values: Mapping[str, Any]) -> Draft:
    return Draft(method, tuple(as_override(name, value) for name, value in values.items()))


def _checkpoints(given: str | None) -> list[Path]:
    """The folders that --checkpoints means, in the order of training."""
    from upcycle.stages.expert_preparation.checkpoints import checkpoint_folders

    if given is None:
        return []
    if not glob.has_magic(given):
        try:
            return checkpoint_folders(given)
        except UpcycleError as error:
            raise UpcycleError(str(error).replace("prepare.checkpoints", "--checkpoints")) from None
    pattern = expanded(given)
    found = [path for path in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))) if path.is_dir()]
    if not found:
        raise UpcycleError(f"--checkpoints: no folder matches the pattern {given}")
    return sorted(found, key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """`checkpoint-90` before `checkpoint-100`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(path))]


def _holds_adapter(folder: Path) -> bool:
    from upcycle.experts.kinds import KINDS, kind_in

    return kind_in(folder) is KINDS["lora"]


def _read_base(
    draft: Draft, checkpoints: Sequence[Path]
) -> tuple[Draft, "upcycle.architectures.mapping.Mapping | upcycle.experts.structure.Dense"]:
    """As the first stage of a run would."""
    from upcycle.architectures.check import say_text_part
    from upcycle.stages.expert_preparation.checkpoints import check_same_tokenizer
    from upcycle.weights.safetensors_io import ModelReader

    recipe = draft.recipe()
    run = Run(recipe, Path())
    base = run.base
    for folder in checkpoints:
        check_same_tokenizer(base, folder)
        run.kind.check_checkpoint(base, checkpoints[0], folder)
    if checkpoints:
        try:
            recipe.expand.num_chosen(len(checkpoints))
        except ValueError as error:
            raise UpcycleError(f"--checkpoints: {error}") from None
    say_text_part(ModelReader(base.folder))
    return draft, run.kind.read_base(base, recipe)


def _becomes(recipe: Recipe, base: "upcycle.architectures.mapping.Mapping | upcycle.experts.structure.Dense") -> str:
    """In a line: which MoE, and how many parameters it has in all and for a token."""
    from upcycle.experts.trained import outcome

    what, *sizes = outcome(recipe, base)
    dense, total, active = (f"{size / 1e6:,.1f} M" for size in (base.num_dense, *sizes))
    m = recipe.expand.num_experts
    many = f"{counted(m, 'expert')}, top-{recipe.assemble.num_experts_per_tok}"
    return f"{recipe.base}, {what}, {many}: {dense} parameters become {total}, {active} of them active per token"


def _read_data(draft: Draft) -> tuple[Draft, list[int]]:
    """What there is to train on, in tokens of each row; with fewer seed rows where there are few rows.

    Raises:
        UpcycleError: unreadable data, or too few rows.
    """
    from upcycle.data.overview import show_domains
    from upcycle.data.samples import by_domain, lengths
    from upcycle.data.splits import load_parts

    recipe = draft.recipe()
    given = Run(recipe, Path()).given_base
    train, validation = load_parts(recipe, given.tokenizer, given.context_length, given.vocabulary)
    show_domains(train)
    tell(f"{counted(len(validation), 'row')} held out for the evaluation")
    if recipe.prepare.by_domain:
        draft = _with_domains(draft, len(by_domain(train)))
    return _with_few_rows(draft, len(train)), lengths(train)


def _with_few_rows(draft: Draft, rows: int) -> Draft:
    """With fewer seed rows, and without a warm-up in which the first checkpoint would lie, if it takes that.

    Raises:
        UpcycleError: there are too few rows all the same.
    """
    from upcycle.data.splits import most_samples_per_expert, seed_sizes

    recipe = draft.recipe()
    if not (least := most_samples_per_expert(rows, recipe)):
        raise UpcycleError(
            f"--data: {counted(rows, 'training row')}, too few for {counted(recipe.expand.num_experts, 'expert')}: "
            "each needs a seed row, and as many rows are to be left to train on; give more data"
        )
    if least < recipe.route.min_samples_per_expert:
        draft = draft.having([f"route.min_samples_per_expert={least}"], "(lowered: few rows)")
    fit, test = seed_sizes(rows, draft.recipe())
    tell(f"{fit:,} + {counted(test, 'seed row')} among the training rows: for the router's start, and to test it")
    prepare = recipe.prepare
    steps = (rows - fit - test) * prepare.checkpoint_every / prepare.batch_size
    if recipe.tunes and not prepare.by_domain and prepare.warmup_fraction and steps < STEPS:
        none = [f"{stage}.warmup_fraction=0" for stage in (PREPARE, POSTTRAIN)]
        draft = draft.having(none, "(none: few rows, and the first step of a warm-up changes nothing)")
    return draft


def _with_domains(draft: Draft, domains: int) -> Draft:
    """With an expert for each domain, if there are more of them than experts.

    Raises:
        UpcycleError: there is one domain.
    """
    if domains < 2:
        raise UpcycleError(f"--method {draft.method} trains once for each domain, but all rows have the same one")
    if domains <= draft.recipe().expand.num_experts:
        return draft
    return draft.having([f"expand.num_experts={domains}"], "(one for each domain of the data)")


def _fitted(
    draft: Draft,
    base: "upcycle.architectures.mapping.Mapping | upcycle.experts.structure.Dense",
    lengths: Sequence[int],
    wanted: Devices | None,
) -> tuple[Draft, Devices, str]:
    """With the settings that make it fit, if it takes any; the devices; and what is to be said of it."""
    from upcycle.experts.trained import moe_of

    devices = wanted or devices_here()
    draft = draft.having(_shared_batches(draft.recipe(), devices.count), "(chosen for the devices to share)")
    found = list(ways(draft.recipe, base, lengths, devices))
    show_ways(found, draft.recipe(), max(lengths), devices)
    if (mapping := moe_of(draft.recipe(), base)) is not None:
        tell_the_rest(mapping, draft.recipe().assemble.num_experts_per_tok, devices)
    by_name = {way.name: way for way in found if way.fits != "no"}
    chosen = next((by_name[name] for name in CHOSEN_FIRST if name in by_name), None)
    if chosen is None:
        instead = f"--method {ADAPTERS} would fit" if by_name else "a smaller model, or more or larger devices, would"
        warn(f"the trainings will not fit on {devices}; {instead}")
        return draft, devices, f"it does not fit on {devices}; {instead}"
    for stage, needs in chosen.stages.items():
        tell(f"{stage}: needs {needs}")
    word = "fits" if chosen.fits == "yes" else "a tight fit"
    how = f" with {typed(chosen.overrides)}" if chosen.overrides else ""
    said = ", ".join(f"{stage} {needs.device / 1e9:.1f} GB" for stage, needs in chosen.stages.items())
    return (
        draft.having(chosen.overrides, "(chosen to fit)"),
        devices,
        f"{said}{how}; {word}: {devices}",
    )


def _shared_batches(recipe: Recipe, processes: int) -> list[str]:
    """Settings with which that many processes can share the rows of a step evenly, where the recipe's cannot be."""
    found = []
    for stage, settings in ((PREPARE, recipe.prepare), (POSTTRAIN, recipe.posttrain)):
        if settings.batch_size % processes:
            own = max(1, settings.batch_size // processes)
            micro = max(n for n in range(1, settings.micro_batch_size + 1) if own % n == 0)
            found += [f"{stage}.batch_size={own * processes}", f"{stage}.micro_batch_size={micro}"]
    return found


def _title(method: str) -> str:
    return f"{shipped_recipes()[method].splitlines()[0].removeprefix('# ').rstrip('.')} (recipe {method})."


def _next_commands(out: Path, devices: Devices) -> list[str]:
    name = "my-moe" if out.stem == "recipe" else out.stem
    file, run = shlex.quote(str(out)), shlex.quote(f"runs/{name}")
    start = f"upcycle run {file} --run {run}"
    if devices.count > 1:
        start = f"torchrun --nproc-per-node {devices.count} -m upcycle run {file} --out {run}"
    return [f"upcycle run {file} --run {run} --dry-run", start]


def _names(values: Mapping[str, Any]) -> list[str]:
    """`section.field` of everything that a recipe says."""
    return [
        f"{section}.{name}" if name else section
        for section, inner in values.items()
        for name in (inner if isinstance(inner, dict) else [""])
    ]


def _is_changed(recipe: Recipe, name: str) -> bool:
    """Whether a setting of a section is not as it is without a word."""
    section, _, field = name.partition(".")
    settings = getattr(recipe, section)
    return bool(field) and bool(getattr(settings, field) != type(settings).model_fields[field].default)
