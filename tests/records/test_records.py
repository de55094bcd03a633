"""Records: what is written is what is read, and damage is named by file and field."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from upcycle.errors import UpcycleError
from upcycle.records import files
from upcycle.records.comparison import Measures, Sweep
from upcycle.records.files import BENCHMARK_SCORES, COSTS, LOG, MANIFEST, PLAN, SCORES, SWEEP, RecordFile
from upcycle.records.plan import Expert
from upcycle.records.scores import ModelScores
from upcycle.records.training import TrainingRecord, log_entry
from upcycle.studies.statistics import summary
from worlds import plan_of

CHILD = Expert(name="child-2", kind="child", parents=(0, 1), weights=(0.25, 0.75), similarity=0.5)


def with_child(**changes: Any) -> Any:
    experts = (*plan_of(2).experts, CHILD.model_copy(update=changes))
    return plan_of(3).model_copy(update={"experts": experts})


def edited(change: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    """The plan's file with a change."""
    values = json.loads((folder / PLAN.name).read_text())
    change(values)
    (folder / PLAN.name).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(extra=1), r"plan\.json is damaged: extra: expected no such field"),
        (lambda v: v.pop("gram"), r"plan\.json is damaged: gram: expected this field"),
        (lambda v: v.update(seed="0"), r"seed: expected a whole number \(found '0'\)"),
        (lambda v: v.update(drop_rate=1.5), r"drop_rate: expected 0\.95 or less \(found 1\.5\)"),
        (lambda v: v.update(merge="magic"), r"merge: expected 'dare', .* \(found 'magic'\)"),
        (lambda v: v["experts"][2].update(parents=[0, 7]), r"expert 2 has parents \(0, 7\), which do not come before"),
        (lambda v: v["experts"][2].update(parents=[0]), r"expert 2 is a child with 1 parents"),
        (lambda v: v["experts"][0].update(checkpoint=None), r"expert 0 is a checkpoint with checkpoint None"),
        (lambda v: v["experts"].reverse(), r"which do not come before it"),
        (lambda v: v["gram"].pop(), r"gram is not 3 by 3"),
        (lambda v: v["gram"][0].__setitem__(0, math.nan), r"gram\.0\.0: expected a finite number"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(change: Any, message: str, tmp_path: Path) -> None:
    PLAN.write(tmp_path, with_child())
    assert PLAN.read(tmp_path) == with_child()
    edited(change, tmp_path)
    with pytest.raises(UpcycleError, match=message):
        PLAN.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"plan\.json is damaged: Invalid JSON"),
        (b'{"experts": [', r"plan\.json is damaged: Invalid JSON"),
        (b"\xff\xfe", r"plan\.json is damaged: Invalid JSON"),
        (b"[]", r"plan\.json is damaged: the whole: expected fields with values, \{name: value\} \(found \[\]\)"),
        (b"null", r"plan\.json is damaged: the whole: expected fields with values"),
    ],
)
def test_a_file_that_is_no_record_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / PLAN.name).write_bytes(content)
    with pytest.raises(UpcycleError, match=message):
        PLAN.read(tmp_path)


def test_a_missing_file_is_named_or_unknown(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"plan\.json cannot be read: No such file"):
        PLAN.read(tmp_path)
    assert PLAN.known(tmp_path) is None
    (tmp_path / PLAN.name).mkdir()
    with pytest.raises(UpcycleError, match=r"plan\.json is a folder, expected a file"):
        PLAN.read(tmp_path)


def test_every_file_has_a_type_that_is_strict(tmp_path: Path) -> None:
    """Of whatever kind, a file that holds something else is refused by name."""
    every = [file for file in vars(files).values() if isinstance(file, RecordFile)]
    assert len(every) >= 15
    for file in every:
        (tmp_path / file.name).write_text('{"a": {"nonsense": [1]}, "b": 3}')
        with pytest.raises(UpcycleError, match=f"{file.name} is damaged: "):
            file.read(tmp_path)


def test_what_is_not_known_is_not_written(tmp_path: Path) -> None:
    SCORES.write(tmp_path, {"base": ModelScores(loss={"all": math.nan})})
    assert json.loads((tmp_path / SCORES.name).read_text()).keys() == {"base"}
    assert (tmp_path / SCORES.name).read_text().count("null") == 0
    assert math.isnan(SCORES.read(tmp_path)["base"].loss["all"])  # of a run that diverged


def test_a_log_keeps_what_the_trainer_calls_its_figures(tmp_path: Path) -> None:
    entry = log_entry({"step": 1, "loss": 2.0, "epoch": 0.5, "total_flos": 9.0, "grad_norm": 3, "load/expert_0": 1.0})
    record = TrainingRecord(rows=1, tokens=2, answer_tokens=1, steps=1, log=[entry])
    LOG.write(tmp_path, record)
    (written,) = json.loads((tmp_path / LOG.name).read_text())["log"]
    assert written == {"step": 1, "loss": 2.0, "epoch": 0.5, "grad_norm": 3, "load/expert_0": 1.0}
    assert LOG.read(tmp_path) == record
    both = TrainingRecord.of_all([record, record])
    assert (both.rows, both.tokens, both.steps, len(both.log)) == (2, 4, 2, 2)
    text = (tmp_path / LOG.name).read_text()
    (tmp_path / LOG.name).write_text(re.sub(r'"grad_norm": [0-9.]+', '"grad_norm": "big"', text))
    with pytest.raises(UpcycleError, match=r"log\.json is damaged: log\.0\.grad_norm: .* \(found 'big'\)"):
        LOG.read(tmp_path)


def test_damage_says_what_to_do(tmp_path: Path) -> None:
    for file, remedy in (
        (MANIFEST, "restore it, or rerun with --update to rebuild the stage"),
        (COSTS, "restore it, or remove it: nothing else is made from it"),
        (PLAN, "restore it, or rebuild it"),
    ):
        (tmp_path / file.name).write_text("{")
        with pytest.raises(UpcycleError, match=rf"{file.name} is damaged: Invalid JSON.*; {remedy}$"):
            file.known(tmp_path)


def measured(**changes: Any) -> Measures:
    return Measures(**{"seed": 0, "data": "d", "tokens": {"prepare": 1}, "loss": {"all": 1.0}, **changes})


COMPARED: dict[str, Any] = {
    "variants": {"a": [measured()], "b": [measured()]},
    "summary": summary({"a": [measured()], "b": [measured()]}, "ab", [{"x.y": "1"}, {"x.y": "2"}]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"summary": COMPARED["summary"][::-1]}, r"summary has rows of \['b', 'a'\], but the variants are"),
        ({"summary": COMPARED["summary"][:1]}, "summary has rows of"),
        ({"variants": {"a": [measured()], "b": [measured()] * 2}}, r"different numbers of seeds, or none: \[1, 2\]"),
        ({"variants": {"a": [], "b": []}}, r"different numbers of seeds, or none: \[0\]"),
        ({"summary": [row.model_copy(update={"loss": None}) for row in COMPARED["summary"]]}, "row .* has no loss"),
        (
            {"summary": [r.model_copy(update={"benchmark": r.loss}) for r in COMPARED["summary"]]},
            "benchmark is not there for all variants, or not for none: see a",
        ),
        ({"axes": ["x.z"]}, r"settings of a: there is no x\.z"),
        ({"axes": []}, "axes: expected 1 or more entries"),
    ],
)
def test_a_comparison_that_contradicts_itself_is_refused(changes: Any, message: str, tmp_path: Path) -> None:
    good = Sweep(**COMPARED, recipe="r", grid=["x.y=1,2"], axes=["x.y"])
    SWEEP.write(tmp_path, good)
    assert repr(SWEEP.read(tmp_path)) == repr(good)  # nan is not itself
    SWEEP.write(tmp_path, good.model_copy(update=changes))
    with pytest.raises(UpcycleError, match=rf"sweep\.json is damaged: .*{message}"):
        SWEEP.read(tmp_path)


@pytest.mark.parametrize("field", ["loss", "exact_match", "benchmark"])
def test_scores_by_domain_have_one_over_all(field: str) -> None:
    with pytest.raises(ValidationError, match="there is no `all` among math"):
        measured(**{field: {"math": 0.5}})


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": {"x": {"rows": 1, "acc,none": 1.0}}, "b": {}}, "different tasks, or on none"),
        ({"a": {"x": {"rows": 1, "acc,none": 1.0}}, "b": {"y": {"rows": 1, "acc,none": 1.0}}}, "different tasks"),
        ({"a": {}}, "different tasks, or on none"),
        ({"a": {"x": {"rows": 1, "acc_stderr,none": 1.0}}}, r"a\.x: .*there is no figure of lm-eval's"),
        ({"a": {"x": {"rows": 1, "acc,none": 1.0, "expert_share": [[0.5], [0.5, 0.5]]}}}, "layers have different num"),
    ],
)
def test_benchmark_scores_that_are_no_table_are_refused(scores: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / BENCHMARK_SCORES.name).write_text(json.dumps(scores))
    with pytest.raises(UpcycleError, match=rf"benchmark\.json is damaged: .*{message}"):
        BENCHMARK_SCORES.read(tmp_path)


def test_a_hash_must_look_like_one(tmp_path: Path) -> None:
    values = {"stage": "a", "inputs": {}, "settings": {}, "seed": 0, "versions": {}, "format": 1}
    (tmp_path / MANIFEST.name).write_text(json.dumps({**values, "files": {"x": {"bytes": -1, "sha256": "0" * 64}}}))
    with pytest.raises(UpcycleError, match=r"files\.x\.bytes: expected 0 or more \(found -1\)"):
        MANIFEST.read(tmp_path)
    (tmp_path / MANIFEST.name).write_text(json.dumps({**values, "files": {"x": {"bytes": 1, "sha256": "short"}}}))
    with pytest.raises(UpcycleError, match=r"files\.x\.sha256: String should match pattern"):
        MANIFEST.read(tmp_path)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_figure_that_is_not_finite_is_read_back(value: float, tmp_path: Path) -> None:
    entry = log_entry({"step": 1, "loss": 2.0, "epoch": 0.5, "grad_norm": value})
    LOG.write(tmp_path, TrainingRecord(rows=1, tokens=2, answer_tokens=1, steps=1, log=[entry]))
    (found,) = LOG.read(tmp_path).log
    assert repr(found.__pydantic_extra__["grad_norm"]) == repr(value)


def test_what_we_wrote_may_be_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long training of many experts writes a log that no user's text would be."""
    monkeypatch.setattr("upcycle.reading.MAX_BYTES", 10)
    PLAN.write(tmp_path, with_child())
    assert PLAN.read(tmp_path) == with_child()
