"""Files that cannot be trusted: what is wrong is said in a line, at once."""

import os
import stat
from pathlib import Path

import pytest

from upcycle.data.sources import decoded_rows
from upcycle.disk import write_text
from upcycle.errors import UpcycleError
from upcycle.reading import MAX_NODES, brief, hub_problem, parse_json, parse_yaml, read_json, read_text
from upcycle.recipe import load_recipe
from upcycle.weights.folders import HUB_FILES, HUB_OTHERS, find_model

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize("content", ["{}".encode("utf-16"), b'{"a": "\xe9"}'])
def test_what_is_not_utf_8_is_named_with_its_byte(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UpcycleError, match=r"x\.json is not UTF-8 \(byte \d+: .*\); save it as UTF-8"):
        read_json(tmp_path / "x.json")


def test_only_a_regular_file_is_written_over(tmp_path: Path) -> None:
    """As root, a device in the place of the file would be replaced for everybody."""
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "is a pipe or a device; name a file"), (".", "is a folder; name a file")):
        with pytest.raises(UpcycleError, match=message):
            write_text(tmp_path / name, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_an_error_of_writing_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / ".x.tmp").symlink_to("/dev/full")  # where the text is written first
    with pytest.raises(OSError, match=r"No space left on device: '.*/x'"):
        write_text(tmp_path / "x", "text")
    assert list(tmp_path.iterdir()) == []


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, message in (
        ("pipe", "is a pipe, expected a file"),
        ("dangling", "cannot be read: No such file"),
        ("loop", "cannot be read: Too many levels of symbolic links"),
        (".", "is a folder, expected a file"),
    ):
        with pytest.raises(UpcycleError, match=message):
            read_text(tmp_path / name)
    with pytest.raises(UpcycleError, match="/dev/zero is a device, expected a file"):
        read_text(Path("/dev/zero"))
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(UpcycleError, match="expected at most"):
        read_text(tmp_path / "large", most_bytes=10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"x: not JSON \(.*line 1, column 2\)"),
        ("1" * 5000, r"x: not readable JSON \(.*digits"),
        ("[" * 200_000, "x: not readable JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "x: the key 'c' occurs twice; keep one"),
    ],
)
def test_json_that_nobody_writes_is_refused(text: str, message: str) -> None:
    with pytest.raises(UpcycleError, match=message) as refused:
        parse_json(text, "x")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", r"x is not YAML \(.*line \d, column \d\)"),
        ("a: 1\nb: 2\na: 3", r"x is not YAML \('a' is there twice, line 3, column 1\)"),
        ("a: !!int abc", "x is not readable YAML"),
        ("a: !!python/object/apply:os.system [id]", r"x is not YAML \(could not determine a constructor"),
        ("a: " + "[" * 50_000, "x is not readable YAML"),
        (BOMB, r"x: its aliases stand for .* values, expected at most 10000"),
        ("a: &a [*a]", "x: its aliases stand for inf values"),
        ("a: 0x" + "f" * 10 + "\nb: 1:99999999999999999999999:0", ""),
    ],
    ids=range(8),
)
def test_yaml_that_nobody_writes_is_refused(text: str, message: str) -> None:
    if not message:
        parse_yaml(text, "x")
        return
    with pytest.raises(UpcycleError, match=message) as refused:
        parse_yaml(text, "x")
    assert len(str(refused.value)) < 200


def test_plain_yaml_and_its_aliases_are_read() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x", "x") == {"a": {"b": 1}, "c": {"b": 1}}
    assert parse_yaml("", "x") is None
    assert len(parse_yaml(f"[{', '.join(['1'] * (MAX_NODES - 1))}]", "x")) == MAX_NODES - 1


def test_a_value_in_an_error_is_short(tmp_path: Path) -> None:
    assert brief({"a": "b"}) == "{'a': 'b'}"
    assert len(brief({str(i): ["x" * 1000] * 1000 for i in range(1000)})) <= 120
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: [{', '.join(['x'] * 5000)}]\ndata: {{train: y}}")
    with pytest.raises(UpcycleError) as refused:
        load_recipe(str(recipe))
    assert len(str(refused.value)) < 300


def test_settings_are_finite() -> None:
    for value in (".inf", ".nan", "-.inf", "1e999"):
        with pytest.raises(UpcycleError, match=r"learning_rate=.*': expected (a finite number|more than 0) "):
            load_recipe("quickstart", [f"posttrain.learning_rate={value}"])


def test_what_the_hub_does_not_give_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the exceptions of the hub's own clients; both cannot reach it here."""
    import huggingface_hub
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    assert "has none of that name" in hub_problem(DatasetNotFoundError("x\ny"))
    assert hub_problem(RuntimeError("one\ntwo")) == "one"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_problem(OfflineModeIsEnabled("x")).startswith("HF_HUB_OFFLINE is set, and there is no copy in the cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def fail(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("Got: ConnectError\nAn error happened")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    unreachable = "the hub cannot be reached, and there is no copy in the cache; check the path, or go online once"
    with pytest.raises(UpcycleError) as model:
        find_model("owner/none-such")
    assert str(model.value) == f"model 'owner/none-such': no such folder here, and not from the hub: {unreachable}"
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: fail())
    with pytest.raises(UpcycleError, match=rf"^data 'owner/rows': no such file .* from the hub .*: {unreachable}$"):
        next(decoded_rows("owner/rows"))


def test_of_a_hub_model_only_what_is_read_is_downloaded() -> None:
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "model-00001-of-2.safetensors", "tokenizer.model", "README.md", "chat_template.jinja"]
    others = ["consolidated.safetensors", "original/model.safetensors", "onnx/config.json", "pytorch_model.bin", "x.py"]
    found = filter_repo_objects([*there, *others], allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_OTHERS))
    assert list(found) == there
