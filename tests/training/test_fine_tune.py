"""Training: the schedule, what is trained, resuming, stopping at NaN."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, get_scheduler

from upcycle.data.chat import Sample
from upcycle.data.splits import load_splits
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import KINDS, load_for_training, load_model
from upcycle.recipe import Recipe
from upcycle.records.files import note_sizes
from upcycle.records.training import TrainingRecord
from upcycle.routing.load import slot_counts
from upcycle.routing.routers import RouterRecorder, freeze
from upcycle.settings import DevicesSettings, LoraSettings, PosttrainSettings, PrepareSettings, TrainingSettings
from upcycle.stages.expert_preparation.prepare import tune
from upcycle.training.callbacks import LoadMonitor, checkpoint_steps
from upcycle.training.checkpoints import last_checkpoint, strip_resume_files
from upcycle.training.fine_tune import _epochs_of, fine_tune
from upcycle.training.packing import can_pack
from upcycle.training.trainer import UpcyclingTrainer
from upcycle.training.trainer_settings import config
from upcycle.training.training import Training
from upcycle.weights.base import load_tokenizer
from worlds import as_base, assembled, make_adapter, mixture

SETTINGS = TrainingSettings(epochs=1, checkpoint_every=0.25, learning_rate=1e-3, batch_size=8, micro_batch_size=4)


@pytest.fixture
def samples(recipe: Recipe, base: Path) -> list[Sample]:
    return load_splits(recipe, load_tokenizer(base, None), 128).train[:64]


@pytest.fixture(scope="module")
def moe(base: Path, checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("moe")
    return assembled(base, checkpoints, out)


class StopAt(TrainerCallback):
    """Raises in the middle of training, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(model) -> str:
    content = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        content.update(name.encode() + parameter.numpy().tobytes())
    return content.hexdigest()


def test_steps_are_the_nearest_to_equal_distances() -> None:
    assert checkpoint_steps(100, 2.0, 0.25) == [12, 25, 38, 50, 62, 75, 88, 100]
    assert checkpoint_steps(10, 1.0, 0.3) == [3, 6, 9, 10]
    with pytest.raises(UpcycleError, match="less than one step apart"):
        checkpoint_steps(4, 1.0, 0.1)
    assert checkpoint_steps(4, 1.0, 0.1, to_resume=True) == [1, 2, 3, 4]


@pytest.mark.parametrize(("steps", "expected"), [(8, 64 / 65), (9, 1.0), (10, 1 + 8 / 65), (18, 2.0)])
def test_epochs_are_those_of_the_rows_that_whole_steps_have(steps: int, expected: float) -> None:
    assert _epochs_of(steps, rows=65, batch_size=8) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["dense", "lora", "moe", "moe with a balancing bias", "mixture of adapters"])
def test_an_interrupted_training_ends_in_the_same_weights(
    kind: str, base: Path, moe: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock Trainer would go on from the initial experts and router of a MoE."""
    balance = PosttrainSettings(balance_bias_rate=0.01 if "bias" in kind else 0.0)
    folder, balance = (base, None) if kind in ("dense", "lora") else (moe, balance)
    if "adapters" in kind:
        folder = mixture(
            base, [make_adapter(base, tmp_path / str(seed), seed) for seed in (1, 2)], tmp_path / "mixture"
        )
    tokenizer = load_tokenizer(base, None)

    def train(out: Path):
        if kind == "lora":
            model = KINDS["lora"].trainable(as_base(base), LoraSettings(rank=4, dropout=0.1), 0, DevicesSettings())
        else:
            model = load_model(folder, torch.float32).train()
        if "adapters" in kind:
            freeze(model, KINDS["lora"].frozen)
        record = fine_tune(model, tokenizer, samples, Training(SETTINGS, 3, "test", out, balance=balance))
        return weights(model), record

    expected = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("upcycle.training.fine_tune.StripOlder", lambda _: StopAt(5))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut")
    assert last_checkpoint(tmp_path / "cut").name == "checkpoint-4"
    assert train(tmp_path / "cut") == expected


@pytest.mark.parametrize("kind", ["dense", "lora", "moe"])
def test_a_finished_training_is_taken_as_it_is(
    kind: str, base: Path, moe: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Also where it ended within an epoch: the stock Trainer would train a step more each time."""
    settings = SETTINGS.model_copy(update={"epochs": 1.5, "lr_scheduler": "constant", "checkpoint_every": 0.75})

    def train() -> tuple[str, TrainingRecord]:
        if kind == "lora":
            model = KINDS["lora"].trainable(as_base(base), LoraSettings(rank=4), 0, DevicesSettings())
        else:
            model = load_model(base if kind == "dense" else moe, torch.float32).train()
        balance = PosttrainSettings() if kind == "moe" else None
        training = Training(settings, 3, "test", tmp_path / "out", balance=balance)
        record = fine_tune(model, load_tokenizer(base, None), samples, training)
        return weights(model), record

    first, made = train(), sorted((tmp_path / "out").glob("checkpoint-*"))
    assert train() == first
    assert sorted((tmp_path / "out").glob("checkpoint-*")) == made


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        (folder / name).write_text(name)
    note_sizes(folder)
    return folder


@pytest.mark.parametrize(
    ("file", "expected"),
    [("", 6), ("6/sizes.json", 4), ("6/model.safetensors", 4), ("6/optimizer.pt", 4), ("4/model.safetensors", 2)],
)
def test_training_goes_on_before_what_was_cut(file: str, expected: int, tmp_path: Path) -> None:
    for step in (2, 4, 6):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    make_checkpoint(tmp_path / "checkpoint-8").joinpath("sizes.json").unlink()  # it was being written
    if file:
        (tmp_path / f"checkpoint-{file}").write_text("{")
    assert last_checkpoint(tmp_path).name == f"checkpoint-{expected}"
    assert sorted(tmp_path.iterdir()) == [tmp_path / f"checkpoint-{step}" for step in range(2, expected + 1, 2)]


def test_a_checkpoint_without_its_optimizer_is_not_resumed_from(tmp_path: Path) -> None:
    for step in (2, 4):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    strip_resume_files(tmp_path / "checkpoint-2")
    assert last_checkpoint(tmp_path).name == "checkpoint-4"
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_text("")
    assert last_checkpoint(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_two_trainings_share_one_schedule(
    shape: str, base: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rate by rate what transformers gives one training of all the steps, also when the second half is interrupted."""
    settings = SETTINGS.model_copy(update={"lr_scheduler": shape, "warmup_fraction": 0.25})
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=settings.learning_rate)
    theirs = "constant_with_warmup" if shape == "constant" else shape
    schedule = get_scheduler(theirs, optimizer, num_warmup_steps=3, num_training_steps=12)
    expected = []
    for _ in range(12):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()

    def rates(name: str, rows: int, span: tuple[float, float]) -> list[float | None]:
        model = load_model(base, torch.float32).train()
        training = Training(settings, 0, name, tmp_path / name, span=span)
        record = fine_tune(model, load_tokenizer(base, None), samples[:rows], training)
        return [entry.learning_rate for entry in record.log]

    assert rates("first", 32, (0.0, 1 / 3)) == pytest.approx(expected[:4])
    with monkeypatch.context() as patch:
        patch.setattr("upcycle.training.fine_tune.StripOlder", lambda _: StopAt(5))
        with pytest.raises(KeyboardInterrupt):
            rates("second", 64, (1 / 3, 1.0))
    assert rates("second", 64, (1 / 3, 1.0)) == pytest.approx(expected[4:])


@pytest.mark.parametrize(("before", "behind", "steps"), [(2.0, 1.5, 11), (2.0, 0.1, 7), (0.1, 2.0, 7)])
def test_one_schedule_has_whole_steps_in_both_parts(
    before: float, behind: float, steps: int, base: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Of epochs of three steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=SETTINGS.learning_rate)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    expected = []
    for _ in range(steps):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = []
    cut = before / (before + behind)
    for name, epochs, span in (("first", before, (0.0, cut)), ("second", behind, (cut, 1.0))):
        changed = {"epochs": epochs, "checkpoint_every": epochs, "lr_scheduler": "linear", "warmup_fraction": 0.0}
        training = Training(SETTINGS.model_copy(update=changed), 0, name, tmp_path / name, span=span)
        model = load_model(base, torch.float32).train()
        log = fine_tune(model, load_tokenizer(base, None), samples[:20], training).log
        found += [entry.learning_rate for entry in log]
    assert found == pytest.approx(expected)


def test_no_checkpoint_is_lost_where_one_is_finished_and_the_training_not_known_to_be(
    base: Path, recipe: Recipe, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = PrepareSettings(**{**SETTINGS.model_dump(), "checkpoint_every": 0.5}, train="ffn")
    arguments = (KINDS["ffn"], as_base(base), samples, recipe.model_copy(update={"prepare": settings}))
    whole = tune(*arguments, tmp_path / "whole")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("upcycle.stages.expert_preparation.prepare.copy_companions", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(*arguments, tmp_path / "cut")
    (tmp_path / "cut" / "sizes.json").write_text("{")
    assert tune(*arguments, tmp_path / "cut") == whole
    for checkpoint in whole:
        one, two = (tmp_path / run / checkpoint.path / "model.safetensors" for run in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes()


def test_ffn_only_tuning_leaves_everything_else_as_the_base(
    base: Path, recipe: Recipe, samples: list[Sample], tmp_path: Path
) -> None:
    tuned = recipe.model_copy(update={"prepare": PrepareSettings(**SETTINGS.model_dump(), train="ffn")})
    made = tune(KINDS["ffn"], as_base(base), samples, tuned, tmp_path)
    assert [c.epoch for c in made] == [0.25, 0.5, 0.75, 1.0]
    before = load_model(base, torch.float32).state_dict()
    after = load_model(tmp_path / made[-1].path, torch.float32).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}
    # what is left of a checkpoint is a plain model folder: no pickles, cache on
    names = {p.name for p in (tmp_path / made[0].path).iterdir()}
    assert not any(n.endswith((".pt", ".pth", ".bin")) for n in names)
    assert json.loads((tmp_path / made[0].path / "config.json").read_text())["use_cache"] is True


def test_loss_is_on_the_answers_tokens_only(base: Path, samples: list[Sample], tmp_path: Path) -> None:
    model = load_model(base, torch.float32)
    one_step = TrainingSettings(epochs=1, checkpoint_every=1, batch_size=8, micro_batch_size=8, learning_rate=1e-9)
    log = fine_tune(model, load_tokenizer(base, None), samples[:8], Training(one_step, 0, "test", tmp_path)).log
    total, count = 0.0, 0
    for sample in samples[:8]:
        with torch.no_grad():
            logits = load_model(base, torch.float32)(torch.tensor([sample.input_ids])).logits[0, :-1]
        labels = torch.tensor(sample.labels[1:])
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    assert log[0].loss == pytest.approx(total / count, abs=1e-4)


def test_balance_loss_is_added_with_its_coefficient(
    base: Path, moe: Path, samples: list[Sample], tmp_path: Path
) -> None:
    step = TrainingSettings(epochs=1, checkpoint_every=1, batch_size=8, micro_batch_size=4, learning_rate=1e-9)
    logs = []
    for coef in (0.0, 0.5):
        model = load_model(moe, torch.float32).train()
        out = tmp_path / str(coef)
        training = Training(step, 0, "test", out, balance=PosttrainSettings(router_aux_loss_coef=coef))
        logs.append(fine_tune(model, load_tokenizer(base, None), samples[:8], training).log[0])
    assert logs[0].balance_loss == pytest.approx(logs[1].balance_loss, rel=1e-5)
    assert logs[1].loss - logs[0].loss == pytest.approx(0.5 * logs[0].balance_loss, rel=1e-3)


@pytest.mark.parametrize("mixed", [False, True], ids=["dense", "moe"])
def test_rows_side_by_side_give_the_padded_batches_losses(
    mixed: bool, base: Path, moe: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """Step by step, the balance loss and the experts' load included."""
    logs = []
    for packed in (True, False):
        settings = PosttrainSettings(**{**SETTINGS.model_dump(), "pack_rows": packed})
        model = load_model(moe if mixed else base, torch.float32).train()
        training = Training(settings, 0, "test", tmp_path / str(packed), balance=settings if mixed else None)
        logs.append(fine_tune(model, load_tokenizer(base, None), samples, training).log)
    for one, other in zip(*logs, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=2e-4)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=2e-3)
        if mixed:
            assert one.balance_loss == pytest.approx(other.balance_loss, rel=1e-3)
            assert one.load == [pytest.approx(layer, abs=0.02) for layer in other.load]


def test_rows_lie_side_by_side_only_where_attention_has_a_mask(base: Path) -> None:
    model = load_model(base, torch.float32)
    assert can_pack(model)
    model.config._attn_implementation_internal = "flash_attention_2"  # as it is where the package is installed
    assert not can_pack(model)


def test_each_part_has_its_own_rate(base: Path, moe: Path, samples: list[Sample], tmp_path: Path) -> None:
    """Adam's first step is the rate, whatever the gradient."""
    model = load_model(moe, torch.float32).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = {"experts_rate": 2.0, "shared_rate": 0.5, "router_rate": 4.0}
    settings = PosttrainSettings(
        epochs=1, checkpoint_every=1, batch_size=8, micro_batch_size=8, learning_rate=1e-3, warmup_fraction=0, **rates
    )
    training = Training(settings, 0, "test", tmp_path, balance=settings)
    fine_tune(model, load_tokenizer(base, None), samples[:8], training)
    for name, parameter in model.named_parameters():
        rate = 2.0 if ".experts." in name else 4.0 if ".gate." in name else 0.5
        assert (parameter - before[name]).abs().max().item() == pytest.approx(rate * 1e-3, rel=1e-2), name


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(
    base: Path, samples: list[Sample], tmp_path: Path
) -> None:
    wild = SETTINGS.model_copy(update={"learning_rate": 1e30, "warmup_fraction": 0.9, "checkpoint_every": 0.125})
    model, training = load_model(base, torch.float32), Training(wild, 0, "test", tmp_path)
    expected = r"is not finite at step \d of 8; the last good checkpoint is .*checkpoint-2\. Lower the learning rate"
    with pytest.raises(UpcycleError, match=expected):
        fine_tune(model, load_tokenizer(base, None), samples, training)
    kept = last_checkpoint(tmp_path)
    assert kept is not None
    assert kept.name == "checkpoint-2"
    assert all(torch.isfinite(p).all() for p in load_model(kept, torch.float32).parameters())


def test_dead_and_overloaded_experts_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = LoadMonitor()
    mask = torch.tensor([1, 1, 1, 0])
    for _ in range(20):
        monitor.add(slot_counts([torch.tensor([[0], [0], [0], [3]]), torch.tensor([[0], [1], [2], [3]])], mask, 4))
        figures = monitor.take()
    assert figures == {
        "max_load": 4.0,
        "min_load": 0.0,
        "dead_experts": 4.0,  # three in layer 0; expert 3 of layer 1 only gets padding
        "overloaded_experts": 1.0,
        **{f"load/expert_{e}": pytest.approx(load) for e, load in enumerate((16 / 6, 4 / 6, 4 / 6, 0.0))},
    }
    assert monitor.load == [[4.0, 0.0, 0.0, 0.0], [1.333, 1.333, 1.333, 0.0]]
    printed = capsys.readouterr().out
    assert "overloaded over the last 20 steps (load, 1 is balanced): layer 0 expert 0 (4.00)" in printed
    assert "dead over the last 20 steps" in printed


def test_hooks_are_where_the_trainer_puts_the_model(
    moe: Path, base: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from the CPU; what the hooks keep or add must not stay there."""
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda self, model, device: model.to("meta", torch.bfloat16))
    settings = PosttrainSettings(balance_bias_rate=0.01, batch_size=8, micro_batch_size=8)
    trainer = UpcyclingTrainer(
        model=load_for_training(moe, base, False, "none", DevicesSettings()),
        training=Training(settings, 0, "test", tmp_path, balance=settings),
        rows=len(samples),
        args=config(settings, str(tmp_path), 0, 1, "none"),
        train_dataset=Dataset.from_list([{"input_ids": s.input_ids, "labels": s.labels} for s in samples]),
        processing_class=load_tokenizer(base, None),
    )
    with trainer.watching():
        gate = trainer.model.model.layers[0].mlp.gate
        gate(torch.ones(7, gate.weight.shape[1], dtype=gate.weight.dtype, device="meta"))
    held = [*trainer.recorder.logits, *trainer.recorder.indices, trainer.bias.bias]
    assert len(held) == 3
    assert {tensor.device.type for tensor in held} == {"meta"}
    trainer.bias.add(torch.ones_like(trainer.bias.bias))


def test_a_recorder_follows_a_model_that_moves(moe: Path) -> None:
    model = load_model(moe, torch.float32)
    with RouterRecorder(model) as recorder:
        model.to("meta", torch.bfloat16)(torch.ones(1, 5, dtype=torch.long, device="meta"))
    assert {tensor.device.type for tensor in (*recorder.logits, *recorder.indices)} == {"meta"}
