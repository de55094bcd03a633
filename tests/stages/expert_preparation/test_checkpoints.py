"""Checkpoints that the user brings: what does not belong to the base is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_dense, make_tokenizer
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import KINDS
from upcycle.stages.expert_preparation.checkpoints import adopt, check_same_tokenizer
from upcycle.weights.base import Base
from worlds import as_base, assembled, make_adapter


def cast(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def in_bfloat16(folder: Path) -> None:
    cast(folder, torch.bfloat16)


def in_float16(folder: Path) -> None:
    cast(folder, torch.float16)


def in_float64(folder: Path) -> None:
    cast(folder, torch.float64)


def with_one_rounded(folder: Path) -> None:
    """Of the last layer's FFN: the others say nothing of it."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, folder / "model.safetensors", {"format": "pt"})


def with_another_token(folder: Path) -> None:
    make_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {**tokenizer["model"]["vocab"], "a": 66, "b": 65}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def with_other_eps(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            in_bfloat16,
            r"odd: model\.layers\.0\.\S+ is torch.bfloat16, that of .* torch.float32; the rounding would look like",
        ),
        (
            with_one_rounded,
            r"odd: model\.layers\.1\.mlp\.down_proj\.weight is torch.bfloat16, that of .* torch.float32",
        ),
        (in_float64, r"odd: model\.layers\.0\.\S+ is torch.float64, that of .*checkpoint-1 torch.float32"),
        (
            with_another_token,
            r"odd: its tokenizer is not that of the base .*: token 10 of \"The quick brown .* is 65, not 70;",
        ),
        (with_other_eps, r"odd: rms_norm_eps is 0.1, but the base .* has 1e-06"),
    ],
)
def test_a_checkpoint_that_does_not_belong_to_the_base_is_named(
    change: Callable[[Path], None], message: str, base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(checkpoints[1], odd)
    adopt(KINDS["ffn"], as_base(base), [(checkpoints[0], "0" * 64), (odd, "1" * 64)], tmp_path)
    change(odd)
    with pytest.raises(UpcycleError, match=message):
        adopt(KINDS["ffn"], as_base(base), [(checkpoints[0], "0" * 64), (odd, "1" * 64)], tmp_path)


def test_a_base_cast_to_fewer_bits_of_mantissa_is_no_checkpoint(
    base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    """float16 and bfloat16 have the same size; the differences would be rounding alone."""
    half = Path(shutil.copytree(base, tmp_path / "half"))
    in_float16(half)
    rounded = Path(shutil.copytree(half, tmp_path / "rounded"))
    in_bfloat16(rounded)
    with pytest.raises(
        UpcycleError, match=r"rounded: model\.layers\.0\.\S+ is torch.bfloat16, that of .*half torch.float16"
    ):
        adopt(KINDS["ffn"], as_base(half), [(rounded, "0" * 64)], tmp_path)


def said(base: Base, checkpoints: list[Path], capsys: pytest.CaptureFixture[str]) -> str:
    """What taking the checkpoints says, on one line."""
    given = [(folder, str(i) * 64) for i, folder in enumerate(checkpoints)]
    adopt(KINDS["ffn"], base, given, checkpoints[0].parent)
    return " ".join(capsys.readouterr().out.split())


def test_what_the_last_checkpoint_has_otherwise_is_said(
    base: Path, checkpoints: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = Path(shutil.copytree(checkpoints[1], tmp_path / "last"))
    folders = [checkpoints[0], last]
    assert "otherwise" not in said(as_base(base), folders, capsys)
    make_tokenizer(last)
    assert "otherwise" not in said(as_base(base), folders, capsys)
    (last / "chat_template.jinja").write_text("{{ messages }}")
    (last / "generation_config.json").write_text('{"eos_token_id": 7}')
    differ = "the chat template; eos_token_id 7 of generation_config.json (2 in the base)"
    assert f"differs from the base in: {differ}; the MoE gets the base's" in said(as_base(base), folders, capsys)
    taken = said(Base(base, "base", last=last), folders, capsys)
    assert f"the MoE gets from last, which differs from the base in them: {differ}" in taken
    assert "chat template" not in said(Base(base, "base", "{{ mine }}", last), folders, capsys)


def test_the_last_checkpoint_s_tokenizer_template_and_tokens_are_the_moe_s(
    base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    last = Path(shutil.copytree(checkpoints[1], tmp_path / "last"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "~"
    tokenizer.add_tokens(["abc"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}~{% endfor %}"
    tokenizer.save_pretrained(last)
    config = json.loads((last / "config.json").read_text())
    (last / "config.json").write_text(json.dumps({**config, "eos_token_id": 98}))
    (last / "generation_config.json").write_text('{"eos_token_id": [98, 2]}')
    for shared, (eos, ids) in {"last": ("~", [98, 2]), "base": ("<|im_end|>", 2)}.items():
        dense = Base(base, str(base), last=last if shared == "last" else None)
        made = assembled(dense, [checkpoints[0], last], tmp_path / f"moe-{shared}", shared=shared)
        written = AutoTokenizer.from_pretrained(made)
        assert written.eos_token == dense.tokenizer.eos_token == eos
        assert ("abc" in written.get_vocab()) is (shared == "last")
        assert written.chat_template == dense.tokenizer.chat_template
        assert ("~" in written.chat_template) is (shared == "last")
        assert json.loads((made / "config.json").read_text())["eos_token_id"] == (98 if shared == "last" else 2)
        assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == ids


def test_what_the_last_checkpoint_does_not_have_is_the_base_s(
    base: Path, checkpoints: list[Path], tmp_path: Path
) -> None:
    bare = Base(base, str(base), last=make_adapter(base, tmp_path / "adapter", 1))
    bare.write_companions(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes()
    without = Path(shutil.copytree(checkpoints[1], tmp_path / "without"))
    make_tokenizer(without)
    (without / "chat_template.jinja").unlink()
    dense = Base(base, str(base), last=without)
    assert dense.tokenizer.chat_template == (base / "chat_template.jinja").read_text()
    dense.write_companions(Path(shutil.copytree(without, tmp_path / "made")))
    assert (tmp_path / "made" / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()
    (without / "generation_config.json").unlink()
    dense.write_companions(tmp_path / "made")
    ends = "generation_config.json"
    assert (tmp_path / "made" / ends).read_bytes() == (base / ends).read_bytes()
    config = json.loads((without / "config.json").read_text())
    (without / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    (tmp_path / "made" / ends).unlink()
    Base(base, str(base), last=without).write_companions(tmp_path / "made")
    assert not (tmp_path / "made" / ends).exists()  # the base's would not end where the checkpoint does


def test_a_token_that_the_model_does_not_know_is_named(base: Path, checkpoints: list[Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    odd = Path(shutil.copytree(checkpoints[1], tmp_path / "odd"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["abc"])
    tokenizer.save_pretrained(odd)
    check_same_tokenizer(Base(make_dense(tmp_path / "room", vocab_size=100), "room"), odd)
    with pytest.raises(UpcycleError, match=r"odd: its tokenizer has added 'abc' with the id 99, but the model knows"):
        check_same_tokenizer(as_base(base), odd)


def test_adapters_of_another_base_are_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_adapter(base, tmp_path / "a", 1)
    adopt(KINDS["lora"], as_base(base), [(folder, "0" * 64)], tmp_path)
    assert "by its own words" not in capsys.readouterr().out
    config = json.loads((folder / "adapter_config.json").read_text())
    other = {**config, "base_model_name_or_path": "owner/other-instruct"}
    (folder / "adapter_config.json").write_text(json.dumps(other))
    adopt(KINDS["lora"], as_base(base), [(folder, "0" * 64)], tmp_path)
    assert "was trained on owner/other-instruct, by its own words" in " ".join(capsys.readouterr().out.split())


def test_an_adapter_s_configuration_has_one_order(base: Path, tmp_path: Path) -> None:
    """PEFT writes a set: in another order from process to process."""
    folder = make_adapter(base, tmp_path / "a", 1)
    path = folder / "adapter_config.json"
    written = []
    for order in (["up_proj", "down_proj", "gate_proj"], ["gate_proj", "up_proj", "down_proj"]):
        path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": order}))
        KINDS["lora"].finish_checkpoint(folder, as_base(base))
        written.append(path.read_bytes())
    assert written[0] == written[1]
