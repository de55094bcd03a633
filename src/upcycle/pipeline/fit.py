"""Will it fit, and how long: what the trainings of a recipe need on given devices, before anything is spent."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from upcycle.console import say, table, tell, warn
from upcycle.errors import UpcycleError, command_line, counted
from upcycle.pipeline.run import Run, shards_evenly
from upcycle.recipe import Recipe, as_override, load_recipe
from upcycle.records.files import POSTTRAIN, PREPARE

if TYPE_CHECKING:  # what imports torch; the annotations are whole names, which the checks of the tests can follow
    import upcycle.architectures.mapping
    import upcycle.experts.structure
    import upcycle.training.forecast

CARDS = {
    "B200": (180, 2250),
    "H200": (141, 989),
    "H100": (80, 989),
    "A100": (80, 312),
    "A100-40": (40, 312),
    "MI300X": (192, 1307),
    "L40S": (48, 362),
    "A10G": (24, 70),
    "L4": (24, 121),
    "RTX4090": (24, 165),
    "RTX3090": (24, 71),
}
"""Name to GB and dense bf16 TFLOP/s, as their makers say."""
USED = 0.4
"""Share of a card's FLOP/s that a training gets; what good ones reach."""
ROOM = 0.92
"""Share of a device's memory that is left beside the driver's and what lies between tensors."""
TIGHT = 0.85
"""Share of a device's memory from which on what fits is called tight: a forecast is off by some per cent."""
SMALL = 20e6
"""Parameters of a dense model below which a run says nothing of memory."""
TOKENS = 100_000_000
SETTINGS = {
    "as it is": (),
    "8-bit Adam": ("{stage}.trainer={{optim: adamw_8bit}}",),
    "activations recomputed": ("{stage}.gradient_checkpointing=true",),
    "fsdp": ("devices.fsdp={fsdp}", "devices.replicate={replicate}"),
    "fsdp, recomputed": ("devices.fsdp={fsdp}", "devices.replicate={replicate}", "{stage}.gradient_checkpointing=true"),
    "LoRA": ("prepare.train=lora", "expand.spread=1"),
}
"""What may make it fit, with the settings of each stage."""
CHOSEN_FIRST = ("as it is", "activations recomputed", "fsdp", "fsdp, recomputed", "8-bit Adam")
"""What is chosen of it: first what gives the same losses and needs no other package. LoRA is another method."""


@dataclass(frozen=True)
class Devices:
    """So many cards of a kind."""

    count: int
    name: str
    gigabytes: float
    teraflops: float | None
    accelerator: bool = True

    @property
    def usable(self) -> float:
        """Bytes of one."""
        return ROOM * self.gigabytes * 1e9

    def __str__(self) -> str:
        if not self.accelerator:
            return f"{self.name}, {self.gigabytes:.1f} GB"
        return f"{self.count} x {self.name}, {self.gigabytes:g} GB each"


@dataclass(frozen=True)
class Way:
    """One of `SETTINGS` for a recipe on some devices."""

    name: str
    overrides: tuple[str, ...]
    stages: "dict[str, upcycle.training.forecast.Forecast]"
    fits: str
    """`yes`, `tight` from `TIGHT` of the memory on, or `no`."""


def parse_devices(text: str) -> Devices:
    """`8xH100`, `H100`, or `8x80GB`.

    Raises:
        UpcycleError: no such card.
    """
    match = re.fullmatch(r"(?:(\d{1,5})x)?(.+)", text.strip())
    count, name = (int(match[1] or 1), match[2]) if match else (0, text)
    known = {card.lower(): card for card in CARDS}
    if count and name.lower() in known:
        card = known[name.lower()]
        return Devices(count, card, *CARDS[card])
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(?:gb)?", name.lower())
    if not count or not size:
        raise UpcycleError(
            f"--devices is '{text}', expected a number of cards such as 8xH100, or their memory, 8x80GB; known cards: "
            f"{', '.join(CARDS)}"
        )
    return Devices(count, f"{size[1]} GB", float(size[1]), None)


def forecasts(
    recipe: Recipe,
    base: "upcycle.architectures.mapping.Mapping | upcycle.experts.structure.Dense",
    lengths: Sequence[int],
    processes: int,
    accelerator: bool,
) -> Iterator[tuple[str, "upcycle.training.forecast.Forecast"]]:
    """Of each stage that trains.

    Args:
        base: the dense model; where experts are FFNs, with its mapping to the MoE.
        lengths: tokens of the rows; a single one is that of all.
    """
    from upcycle.experts.trained import posttrained, prepared
    from upcycle.training.forecast import forecast
    from upcycle.training.packing import MASKED, is_masked, largest_batch
    from upcycle.training.trainer_settings import attention

    stages = {PREPARE: (recipe.prepare, prepared)} if recipe.tunes else {}
    for stage, (settings, of) in (stages | {POSTTRAIN: (recipe.posttrain, posttrained)}).items():
        what = of(recipe, base)
        packed = settings.pack_rows and attention(settings) in (None, *MASKED) and is_masked(what.config)
        rows, length = largest_batch(lengths, settings.micro_batch(processes), packed)
        where = (settings, length, recipe.devices, processes, what.names, accelerator)
        yield stage, forecast(what.config, *where, added=what.added, rows=rows)


def say_fit(run: Run, base: "upcycle.architectures.mapping.Mapping | upcycle.experts.structure.Dense") -> None:
    """What the trainings of a run need, in a line each.

    Raises:
        UpcycleError: a training does not fit on the accelerator, by what is certain: weights, gradients, optimizer.
    """
    from upcycle.distributed.device import memory, pick_device
    from upcycle.distributed.world import world_size

    if base.num_dense < SMALL:
        return
    from upcycle.data.samples import lengths

    accelerator = pick_device().type != "cpu"
    there, would_fit = memory(), f"{command_line('check', run.recipe.base)} --devices ..."
    for stage, found in forecasts(run.recipe, base, lengths(run.splits.train), world_size(), accelerator):
        say(f"{stage}: needs {found}; {there / 1e9:.1f} GB are available")
        certain = found.weights + found.gradients + found.optimizer
        if accelerator and certain > there:
            raise UpcycleError(
                f"{stage} does not fit: weights, gradients and optimizer take {certain / 1e9:.1f} GB on each device, "
                f"which has {there / 1e9:.1f} GB; `{would_fit}` says what would fit"
            )
        if found.device > there:
            warn(f"{stage} may not fit; `{would_fit}` says what would")


def devices_here() -> Devices:
    """What a run in this process would train on."""
    from upcycle.distributed.device import memory, pick_device

    accelerator, size = pick_device().type != "cpu", round(memory() / 1e9, 1)
    return Devices(1, "GPU of this machine" if accelerator else "CPU of this machine", size, None, accelerator)


def ways(
    make: Callable[[Sequence[str]], Recipe],
    base: "upcycle.architectures.mapping.Mapping | upcycle.experts.structure.Dense",
    lengths: Sequence[int],
    devices: Devices,
) -> Iterator[Way]:
    """Every one of `SETTINGS` that the recipe can have, with what it takes.

    Args:
        make: the recipe with overrides.
        lengths: tokens of the rows; a single one is that of all.
    """
    plain = make(())
    slices = plain.expand.num_experts * plain.assemble.granularity
    counts = (n for n in range(1, devices.count + 1) if devices.count % n == 0 and n <= slices)
    fsdp = max(n for n in counts if shards_evenly(base.config, n))
    for name, templates in SETTINGS.items():
        if (fsdp == 1 and "fsdp" in name) or (not devices.accelerator and "8-bit" in name):
            continue
        overrides = _filled(templates, fsdp, devices.count // fsdp)
        try:
            recipe = make(overrides)
        except UpcycleError:  # such as LoRA where experts are slices
            continue
        if overrides and recipe == plain:
            continue
        found = dict(forecasts(recipe, base, lengths, devices.count, devices.accelerator))
        most = max(forecast.device for forecast in found.values())
        fits = "no" if most > devices.usable else "tight" if most > TIGHT * devices.gigabytes * 1e9 else "yes"
        yield Way(name, tuple(overrides), found, fits)


def _filled(templates: Sequence[str], fsdp: int, replicate: int) -> list[str]:
    overrides = [
        template.format(stage=stage, fsdp=fsdp, replicate=replicate)
        for template in templates
        for stage in ((PREPARE, POSTTRAIN) if "{stage}" in template else ("",))
    ]
    return [setting for setting in overrides if setting != "devices.replicate=1"]


def show_ways(found: Sequence[Way], recipe: Recipe, length: int, devices: Devices) -> None:
    """A table of them: memory of each stage on a card, and whether it fits."""
    stages = list(found[0].stages)
    rows = []
    for way in found:
        sizes = [f"{way.stages[stage].device / 1e9:,.1f}" for stage in stages]
        host = [f"{max(forecast.host for forecast in way.stages.values()) / 1e9:,.0f}"] if devices.accelerator else []
        rows.append((way.name, typed(way.overrides), *sizes, way.fits, *host))
    batch = f"batch_size {recipe.posttrain.batch_size}, micro_batch_size {recipe.posttrain.micro_batch_size}"
    title = f"memory in GB{' on each card' if devices.accelerator else ''}: {devices}"
    heads = ("what", "settings", *stages, "fits", *(["host GB"] if devices.accelerator else []))
    table(f"{title} ({batch}, rows of {counted(length, 'token')})", heads, rows)


def typed(overrides: Sequence[str]) -> str:
    """As on a command line."""
    return " ".join(f'"{setting}"' if " " in setting else setting for setting in overrides)


def show_fit(model: str, mapping: "upcycle.architectures.mapping.Mapping", k: int, devices: Devices) -> None:
    """A table of settings: memory of each stage on a card, whether it fits, hours."""
    make = partial(_recipe, model, mapping, k, devices)
    recipe = make(())
    length = recipe.data.max_length
    show_ways(list(ways(make, mapping, [length], devices)), recipe, length, devices)
    tell_the_rest(mapping, k, devices)


def _recipe(
    model: str,
    mapping: "upcycle.architectures.mapping.Mapping",
    k: int,
    devices: Devices,
    overrides: Sequence[str],
) -> Recipe:
    """`upit` with these settings, a batch that all cards can share, and `prepare.train=full`."""
    per_card = max(1, 16 // devices.count) * devices.count
    batch = [f"{s}.batch_size={per_card}" for s in (PREPARE, POSTTRAIN)]
    micro = [f"{s}.micro_batch_size={max(n for n in (1, 2, 4) if per_card % n == 0)}" for s in (PREPARE, POSTTRAIN)]
    experts = [
        f"expand.num_experts={mapping.num_experts}",
        f"assemble.num_experts_per_tok={k}",
        f"assemble.granularity={mapping.granularity}",
        "prepare.train=full",
    ]
    given = [as_override("base", model), "data.train=rows.jsonl"]
    return load_recipe("upit", [*given, *experts, *batch, *micro, *overrides])


def tell_the_rest(mapping: "upcycle.architectures.mapping.Mapping", k: int, devices: Devices) -> None:
    """What the other stages need, disk, and hours."""
    total, dense = mapping.num_parameters(), mapping.num_dense
    where = "one card" if 2 * total <= devices.usable else "several cards of one machine (the first process uses them)"
    weights = f"{2 * total / 1e9:,.1f} GB in bf16, on {where}" if devices.accelerator else f"{4 * total / 1e9:,.1f} GB"
    tell(f"route, evaluate, benchmark: {weights}")
    tell(
        f"disk: {4 * dense / 1e9:,.1f} GB for each checkpoint of preparation in fp32, {12 * total / 1e9:,.1f} GB for "
        "one of the MoE (weights and optimizer) and twice that while a newer one is written"
    )
    if devices.teraflops:
        speed = devices.count * devices.teraflops * 1e12 * USED
        hours = [6 * count * TOKENS / speed / 3600 for count in (dense, mapping.num_parameters(k))]
        tell(
            f"time for {TOKENS / 1e6:.0f}M training tokens, if {USED:.0%} of the cards' bf16 FLOP/s are used: prepare "
            f"{hours[0]:.2g} h, posttrain {hours[1]:.2g} h"
        )
