"""The forecast of memory, against what runs took and against torch's own tracker."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, MixtralConfig

from conftest import make_dense
from upcycle.architectures.mapping import map_model
from upcycle.console import console
from upcycle.errors import UpcycleError
from upcycle.pipeline import fit
from upcycle.pipeline.fit import forecasts, parse_devices, say_fit, show_fit
from upcycle.pipeline.resume import run_stages
from upcycle.pipeline.run import Run
from upcycle.recipe import load_recipe, parse_recipe
from upcycle.settings import DevicesSettings, TrainingSettings
from upcycle.training.forecast import forecast
from upcycle.training.packing import largest_batch
from upcycle.weights.safetensors_io import ModelReader

ONE = DevicesSettings()
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(**more: Any) -> dict[str, Any]:
    found: dict[str, Any] = LlamaConfig(**{**SMALL, "num_hidden_layers": 4, "vocab_size": 512, **more}).to_dict()
    return found


def test_weights_gradients_and_optimizer_are_those_of_the_parameters() -> None:
    config = llama(tie_word_embeddings=True)
    per_layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    count = 512 * 64 + 4 * per_layer + 64
    found = forecast(config, TrainingSettings(), 32, ONE, 1)
    assert (found.weights, found.gradients, found.optimizer) == (4 * count, 4 * count, 8 * count)
    quick = TrainingSettings(trainer={"optim": "paged_adamw_8bit"})
    ffn = forecast(config, quick, 32, DevicesSettings(fsdp=4), 4, lambda name: ".mlp." in name)
    learned = 4 * 3 * 64 * 128
    assert (ffn.weights, ffn.gradients, ffn.optimizer) == (count, learned, learned / 2)
    adapters = forecast(config, TrainingSettings(), 32, ONE, 1, accelerator=True, added=1000)
    assert (adapters.weights, adapters.gradients, adapters.optimizer) == (2 * count + 4000, 4000, 8000)


def test_activations_grow_with_rows_layers_and_length_and_shrink_by_recomputing() -> None:
    def held(layers: int = 4, micro: int = 4, length: int = 64, **more: Any) -> float:
        settings = TrainingSettings(batch_size=16, micro_batch_size=micro, **more)
        return forecast(llama(num_hidden_layers=layers), settings, length, ONE, 1).activations

    assert held(micro=8) == pytest.approx(2 * held(), rel=0.05)
    assert held(length=128) > 1.9 * held()
    assert held(layers=6) - held(layers=5) == pytest.approx(held(layers=5) - held(layers=4))
    assert held(gradient_checkpointing=True) < 0.6 * held()


def test_the_largest_batch_is_of_rows_as_they_are_put_side_by_side() -> None:
    lengths = [10] * 90 + [40] * 10
    lines, width = largest_batch(lengths, 8, packed=True)
    assert (lines, width) == max(((lines, width), (8, 10)), key=lambda shape: shape[0] * shape[1])
    assert largest_batch(lengths, 8, packed=False) == (8, 40)
    assert lines * width < 8 * 40
    assert largest_batch([300], 8, packed=True) == (8, 300)
    assert largest_batch([7, 9], 8, packed=False) == (8, 9)  # fewer rows than a micro-batch has


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8xH100", (8, "H100", 80)),
        ("a100-40", (1, "A100-40", 40)),
        ("16x80GB", (16, "80 GB", 80)),
        ("2x24", (2, "24 GB", 24)),
    ],
)
def test_devices_are_read(text: str, expected: tuple[int, str, float]) -> None:
    found = parse_devices(text)
    assert (found.count, found.name, found.gigabytes) == expected


@pytest.mark.parametrize("text", ["8xH101", "0xH100", "x", "H100x8"])
def test_other_devices_are_refused(text: str) -> None:
    with pytest.raises(UpcycleError, match="expected a number of cards such as 8xH100"):
        parse_devices(text)


def test_a_table_says_what_would_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 200)
    base = make_dense(tmp_path / "untied", tie_word_embeddings=False)  # 99 rows that are tied would not be divided
    mapping = map_model(base, ModelReader(base), 8)
    show_fit(str(base), mapping, 2, parse_devices("16x0.0001GB"))
    said = capsys.readouterr().out
    assert "devices.fsdp=8 devices.replicate=2" in said  # eight experts are divided among eight at most
    assert '"prepare.trainer={optim: adamw_8bit}"' in said
    assert " yes" not in said
    assert "several cards of one machine" in said
    show_fit(str(base), mapping, 2, parse_devices("2xH100"))
    said = capsys.readouterr().out
    assert " no " not in said
    assert "on one card" in said
    assert "time for 100M training tokens" in said


def test_a_run_says_what_it_needs_and_stops_where_it_cannot_fit(
    tiny_recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(parse_recipe(tiny_recipe, "test"), tmp_path / "run")
    mapping = map_model(run.base.folder, ModelReader(run.base.folder), 4)
    say_fit(run, mapping)
    assert "needs" not in capsys.readouterr().out  # so small a model is not worth a word
    monkeypatch.setattr(fit, "SMALL", 0)
    say_fit(run, mapping)
    said = capsys.readouterr().out
    assert said.count("GB of memory (weights") == 2
    assert "may not fit" not in said
    monkeypatch.setattr("upcycle.distributed.device.memory", lambda: 1000)
    say_fit(run, mapping)
    assert "posttrain may not fit" in capsys.readouterr().out
    monkeypatch.setattr("upcycle.distributed.device.pick_device", lambda: __import__("torch").device("cuda"))
    with pytest.raises(UpcycleError, match="prepare does not fit: weights, gradients and optimizer take"):
        say_fit(run, mapping)


SHAPES = {
    "wide": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8},
    "wider": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 12},
    "deep": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6},
    "odd": {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 5, "num_attention_heads": 10},
}
HOW = {
    "wide": {"micro_batch_size": 8},
    "wider": {"micro_batch_size": 2},
    "deep": {"gradient_checkpointing": True},
    "odd": {"freeze": "shared"},
}


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_takes_what_was_forecast(shape: str, tmp_path: Path) -> None:
    """Of a whole process, by the kernel's account of its stages."""
    base = make_dense(tmp_path / "base", max_position_embeddings=512, initializer_range=0.02, **SHAPES[shape])
    draw = random.Random(0)
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(60):
            word = "".join(draw.choices("abcdef", k=170))
            chat = [{"role": "user", "content": f"copy {number} {word}"}, {"role": "assistant", "content": word[:20]}]
            file.write(json.dumps({"messages": chat}) + "\n")
    training = {"batch_size": 8, "micro_batch_size": 4, "epochs": 0.5, "checkpoint_every": 0.25}
    how = {key: value for key, value in HOW[shape].items() if key != "freeze"}
    values = {
        "base": str(base),
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 300},
        "prepare": {**training, **how, "train": "full"},
        "expand": {"num_experts": 6},
        "route": {"min_samples_per_expert": 2, "epochs": 1},
        "posttrain": {**training, **HOW[shape]},
        "evaluate": {"exact_match": False, "models": "ends"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "upcycle", "run", str(tmp_path / "recipe.yaml"), "--run", str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    costs = json.loads((tmp_path / "run" / "costs.json").read_text())
    run = Run(load_recipe(str(tmp_path / "recipe.yaml")), tmp_path / "run")
    mapping = map_model(base, ModelReader(base), 6)
    lengths = [len(sample.input_ids) for sample in run.splits.train]
    for stage, found in forecasts(run.recipe, mapping, lengths, 1, accelerator=False):
        assert found.device / 1e9 == pytest.approx(costs[stage]["memory_gb"], rel=0.15), stage


@pytest.mark.long
@pytest.mark.parametrize(("processes", "layers", "rows"), [(8, 4, 1), (8, 8, 2), (16, 8, 2)])
def test_shards_of_mixtral_take_what_torchs_tracker_finds(processes: int, layers: int, rows: int) -> None:
    script = Path(__file__).with_name("tracked.py")
    said = subprocess.check_output([sys.executable, str(script), *map(str, (processes, layers, rows))], text=True)
    config = MixtralConfig(num_hidden_layers=layers).to_dict()
    settings = TrainingSettings(batch_size=processes * rows, micro_batch_size=rows)
    devices = DevicesSettings(fsdp=8, replicate=processes // 8)
    found = forecast(config, settings, 1024, devices, processes, accelerator=True)
    assert found.device == pytest.approx(int(said.splitlines()[-1]), rel=0.15)


def test_the_command_that_trains_says_what_that_needs(
    tiny_recipe: dict[str, Any],
    checkpoints: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fit, "SMALL", 0)
    given = {**tiny_recipe["prepare"], "checkpoints": [str(folder) for folder in checkpoints]}
    recipe = parse_recipe({**tiny_recipe, "prepare": given}, "test")
    run_stages(Run(recipe, tmp_path / "steps"), ("prepare", "expand", "assemble", "route"))
    assert "posttrain: needs" not in capsys.readouterr().out
    run_stages(Run(recipe, tmp_path / "steps"), ("posttrain",))
    assert capsys.readouterr().out.count("posttrain: needs") == 1
    run_stages(Run(recipe, tmp_path / "whole"), ("prepare", "expand", "assemble", "route", "posttrain"))
    said = capsys.readouterr().out
    assert said.count("posttrain: needs") == 1
    assert said.index("posttrain: needs") < said.index("expand ...")
