"""Export: a folder that stands alone, and what cannot be made into one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycle.disk import scratch_folder
from upcycle.errors import UpcycleError
from upcycle.experts.adapter_files import CONFIG
from upcycle.experts.kinds import load_model
from upcycle.pipeline.manifest import seal
from upcycle.stages.model_upcycling.export import export
from worlds import assembled, logits, make_adapter, mixture

NAMES = {"config.json", "model.safetensors", "tokenizer.json", "upcycle_plan.json"}


def test_a_plain_moe_is_copied_without_what_is_ours_alone(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    dense = Path(shutil.copytree(base, tmp_path / "dense"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(dense)
    made = assembled(dense, checkpoints, tmp_path / "made")
    (made / "log.json").write_text("{}")
    export(made, tmp_path / "out", False, "source")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= NAMES
    assert not names & {"manifest.json", "log.json"}
    assert torch.equal(logits(made), logits(tmp_path / "out"))
    with pytest.raises(UpcycleError, match="out is not empty; give --to a new folder"):
        export(made, tmp_path / "out", False, "source")
    with pytest.raises(UpcycleError, match="is already a plain model; leave out --fold"):
        export(made, tmp_path / "other", True, "source")
    with pytest.raises(UpcycleError, match="--base is for a mixture that is folded; add --fold, or leave it out"):
        export(made, tmp_path / "other", False, "source", str(base))
    with pytest.raises(UpcycleError, match="holds no model; expected a finished run"):
        export(tmp_path, tmp_path / "other", False, "source")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_plain_moe_is_written_in_another_dtype(
    dtype: str, base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    """What transformers loads from it is what it makes of the original in that dtype."""
    made = assembled(base, checkpoints, tmp_path / "made")
    export(made, tmp_path / "out", False, dtype)
    kind = getattr(torch, dtype)
    one, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=kind) for folder in (made, tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {kind}
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == kind
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in made.iterdir()}


def test_values_beyond_float16_are_refused(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    made = assembled(base, checkpoints, tmp_path / "made")
    tensors = load_file(made / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    with pytest.raises(UpcycleError, match=r"model\.norm\.weight has values beyond float16"):
        export(made, tmp_path / "out", False, "float16")
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_folded_or_stays_compact(base: Path, tmp_path: Path) -> None:
    made = mixture(base, [make_adapter(base, tmp_path / str(seed), seed) for seed in (1, 2)], tmp_path / "made")
    left = scratch_folder(tmp_path / "plain")
    (left / "model.safetensors").write_text("half")
    killed = left.rename(tmp_path / left.name.replace(f"-{os.getpid()}.", "-4194305."))  # above the highest process id
    scratch_folder(tmp_path / "plain")  # of a process of the same number, as in a container
    (tmp_path / "plain.partial").mkdir()  # the user's
    export(made, tmp_path / "plain", True, "source")
    export(made, tmp_path / "compact", False, "source")
    with pytest.raises(UpcycleError, match="--dtype is for a plain MoE; add --fold, or leave it out"):
        export(made, tmp_path / "half", False, "bfloat16")
    assert {path.name for path in (tmp_path / "plain").iterdir()} >= NAMES
    for out in ("plain", "compact"):
        torch.testing.assert_close(logits(tmp_path / out), logits(made), rtol=0, atol=1e-5)
    sizes = [sum(p.stat().st_size for p in (tmp_path / out).iterdir()) for out in ("compact", "plain")]
    assert sizes[0] < sizes[1]
    assert not killed.exists()
    assert (tmp_path / "plain.partial").exists()


def test_a_mixture_is_folded_on_its_own_base_alone(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    adapters = [make_adapter(base, tmp_path / str(seed), seed) for seed in (1, 2)]
    made = mixture(base, adapters, tmp_path / "made.partial")
    (made / "inputs.json").write_text("{}")
    seal(made, tmp_path / "made", {"base": "0" * 64}, {}, 0)
    with pytest.raises(UpcycleError, match=r"is not the base that .* was trained on"):
        export(tmp_path / "made", tmp_path / "out", True, "source")
    config = json.loads((tmp_path / "made" / CONFIG).read_text())
    (tmp_path / "made" / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "/nowhere"}))
    with pytest.raises(UpcycleError, match="model folder /nowhere does not exist"):
        export(tmp_path / "made", tmp_path / "out", True, "source")
    (tmp_path / "made" / "manifest.json").unlink()
    with pytest.raises(UpcycleError, match=r"checkpoint-1 is not the base that .* was trained on"):
        export(tmp_path / "made", tmp_path / "out", True, "source", str(checkpoints[0]))
    moved = shutil.copytree(base, tmp_path / "moved")
    export(tmp_path / "made", tmp_path / "out", True, "source", str(moved))
    assert load_model(tmp_path / "out", torch.float32).config.model_type == "mixtral"
    assert not (tmp_path / "manifest.json").exists()


def test_bottlenecks_cannot_be_folded(base: Path, tmp_path: Path) -> None:
    made = mixture(base, [make_adapter(base, tmp_path / "1", 1)] * 2, tmp_path / "made")
    config = json.loads((made / CONFIG).read_text())
    (made / CONFIG).write_text(json.dumps({**config, "peft_type": "UPCYCLE_BOTTLENECK_MOE"}))
    with pytest.raises(UpcycleError, match=r"bottleneck experts .* which are not linear"):
        export(made, tmp_path / "out", True, "source")


def test_an_adapter_alone_is_exported_as_it_is(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter", 1)
    export(folder, tmp_path / "out", False, "source")
    assert (tmp_path / "out" / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()


def test_what_cannot_be_folded_leaves_nothing_behind(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    made = assembled(base, checkpoints, tmp_path / "made")
    with pytest.raises(UpcycleError, match="is already a plain model"):
        export(made, tmp_path / "out", True, "source")
    assert not (tmp_path / "out.partial").exists()


def test_an_export_has_its_name_once_it_is_whole(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    made = assembled(base, checkpoints, tmp_path / "made")

    def stopped(_: Path) -> None:
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(made, tmp_path / "out", False, "source", finish=stopped)

    def another(_: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("")

    with pytest.raises(UpcycleError, match="out is not empty any more"):
        export(made, tmp_path / "out", False, "source", finish=another)
    assert {path.name for path in tmp_path.iterdir()} == {"made", "out"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
