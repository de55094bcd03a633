"""How much memory a training will take, before it begins: the real modules, without values."""

from collections.abc import Callable
from dataclasses import dataclass

from upcycle.experts.structure import without_values
from upcycle.settings import DevicesSettings, TrainingSettings
from upcycle.training.simulate import Step, activations
from upcycle.types import Config

FULL, HALF = 4, 2
"""Bytes of fp32, of bf16."""
OPTIMIZERS = {"8bit": 2.0, "adafactor": 0.05, "sgd": 0.0, "lion_32bit": 4.0, "adamw_torch_4bit": 1.0}
"""Bytes a trained parameter, by what a name has in it; any other keeps two moments in fp32."""
MOMENTS = 8.0
GATHERED_LAYERS = 2
"""Whole at once under FSDP: as they come from the others, and as they are multiplied."""
SAVED_COPIES = 2
"""Of the weights that are saved: under the names on disk, and as bytes."""
PROCESS = 0.8e9
"""Bytes of the interpreter, the libraries and what earlier stages leave; measured."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """With what is gathered of other processes' parts."""
    saved: float
    """On the host, while a checkpoint is written."""
    accelerator: bool

    @property
    def device(self) -> float:
        """On the accelerator; on a CPU all that the process takes."""
        working = self.gradients + self.activations
        if self.accelerator:
            return self.weights + self.optimizer + working
        return PROCESS + self.weights + self.optimizer + max(working, self.saved)

    @property
    def host(self) -> float:
        """Of the first process, beside an accelerator: weights pass through it as they are loaded and saved."""
        return PROCESS + self.saved + (self.weights if self.accelerator else 0.0)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        where = "on each device" if self.accelerator else "of memory"
        return f"about {self.device / 1e9:.2f} GB {where} ({listed}, activations {self.activations / 1e9:.2f})"


def forecast(
    config: Config,
    settings: TrainingSettings,
    length: int,
    devices: DevicesSettings,
    processes: int,
    trained: Callable[[str], bool] = lambda _: True,
    accelerator: bool = False,
    added: int = 0,
    rows: int | None = None,
) -> Forecast:
    """Of a training of all, or of some of the parameters of a model.

    Args:
        config: the model's config.json.
        length: tokens of a line of a micro-batch; all lines are taken to be as long.
        trained: whether a parameter, by its name, is.
        accelerator: whether it computes in bf16; a base that adapters leave as it is is then kept in it.
        added: parameters of adapters, which alone are trained then.
        rows: lines of a micro-batch, where rows lie side by side; none given: a line a row.
    """
    sizes, shards = _sizes(config), devices.fsdp
    micro = settings.micro_batch(processes)
    step = Step(rows or micro, length, accelerator, shards > 1, settings.gradient_checkpointing)
    learned = 0 if added else sum(size for name, size in sizes.items() if trained(name))
    moments = next((size for part, size in OPTIMIZERS.items() if part in settings.trainer.get("optim", "")), MOMENTS)
    total, kept = sum(sizes.values()), HALF if added and accelerator else FULL
    seen = _norms if any(map(_norms, sizes)) else _embeddings  # some norms have no weights
    first, more = activations(config, step, frozenset(filter(seen if added else trained, sizes)))
    gradients = FULL * (learned / shards + added)
    # layer by layer they take the place of activations, which a CPU's heap does not
    if accelerator and micro * processes >= settings.batch_size:
        more -= min(more, int(gradients))
    return Forecast(
        weights=kept * total / shards + FULL * added,
        gradients=gradients,
        optimizer=moments * (learned / shards + added),
        activations=first + more + _gathered(sizes, devices, accelerator, bool(learned)),
        saved=SAVED_COPIES * FULL * (added or (_largest(sizes) if shards > 1 else total)),
        accelerator=accelerator,
    )


def _norms(name: str) -> bool:
    """The least that lets gradients through: what adapters of a frozen model see."""
    return "norm" in name


def _embeddings(name: str) -> bool:
    return "embed_tokens" in name


def _sizes(config: Config) -> dict[str, int]:
    """Parameters of each tensor of the model."""
    return {name: parameter.numel() for name, parameter in without_values(config).named_parameters()}


def _by_layer(sizes: dict[str, int], ep: int = 1) -> tuple[list[float], float]:
    """Parameters that are whole in a process while a layer computes, of each layer; and those outside of layers."""
    layers: dict[str, float] = {"": 0.0}
    for name, size in sizes.items():
        _, inner, rest = name.partition(".layers.")
        place = rest.partition(".")[0] if inner else ""
        layers[place] = layers.get(place, 0.0) + (size / ep if ".experts." in name else size)
    outside = layers.pop("")
    return list(layers.values()), outside


def _largest(sizes: dict[str, int]) -> float:
    layers, outside = _by_layer(sizes)
    return max(*layers, outside)


def _gathered(sizes: dict[str, int], devices: DevicesSettings, accelerator: bool, learned: bool) -> float:
    """What a process holds of the others' parts: some layers, and the gradients of one in fp32 as they are summed."""
    if devices.fsdp == 1:
        return 0.0
    layers, outside = _by_layer(sizes, devices.ep)
    width = HALF if accelerator else FULL
    return width * (outside + GATHERED_LAYERS * max(layers)) + (FULL * max(layers) if learned else 0.0)
