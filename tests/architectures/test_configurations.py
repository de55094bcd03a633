"""config.json is read as transformers reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from upcycle.errors import UpcycleError
from upcycle.weights.folders import read_config

INFINITE = {"limit": float("inf"), "inner": {"limits": [float("-inf"), 1.5, [float("nan")]]}}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", INFINITE), ("granitemoehybrid", {}), ("nemotron_h", {}), ("falcon_h1", {})],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_floats_that_json_lacks_are_those_of_transformers(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    CONFIG_MAPPING[model_type](**changes).save_pretrained(tmp_path)
    assert '"__float__": "Infinity"' in (tmp_path / "config.json").read_text()
    found, expected = read_config(tmp_path), AutoConfig.from_pretrained(tmp_path).to_dict()
    expected = {"num_hidden_layers": found["num_hidden_layers"], **expected, "_name_or_path": ""}
    assert repr(sorted(found.items())) == repr(sorted(expected.items()))  # NaN is not equal to itself


@pytest.mark.parametrize("kept", [{"__float__": "nan"}, {"__float__": 1.0}, {"__float__": "NaN", "more": 1}])
def test_what_transformers_would_not_write_stays_as_it_is(kept: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "limit": kept}))
    assert read_config(tmp_path)["limit"] == AutoConfig.from_pretrained(tmp_path).limit == kept


def test_a_configuration_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"a": {"[" * 980}{"]" * 980}}}')
    with pytest.raises(UpcycleError, match=r"config\.json: not readable JSON"):
        read_config(tmp_path)
