"""A run: whose tokenizer, template and tokens it works with."""

import shutil
from pathlib import Path
from typing import Any

from upcycle.pipeline.run import Run
from upcycle.recipe import parse_recipe


def last_of(tiny: dict[str, Any], folder: Path, **sections: dict[str, Any]) -> Path | None:
    values = {name: {**tiny.get(name, {}), **sections.get(name, {})} for name in ("prepare", "assemble", "expand")}
    return Run(parse_recipe({**tiny, **values}, "test"), folder).base.last


def test_the_last_checkpoint_s_where_shared_is_last(
    tiny_recipe: dict[str, Any], checkpoints: list[Path], tmp_path: Path
) -> None:
    given = {"checkpoints": [str(folder) for folder in checkpoints]}
    assert last_of(tiny_recipe, tmp_path, prepare=given) == checkpoints[-1]
    for shared in ("base", "mean"):
        assert last_of(tiny_recipe, tmp_path, prepare=given, assemble={"shared": shared}) is None
    assert last_of(tiny_recipe, tmp_path) is None  # our own checkpoints have the base's


def test_a_run_whose_checkpoints_are_gone_has_its_moe_s(
    tiny_recipe: dict[str, Any], checkpoints: list[Path], tmp_path: Path
) -> None:
    gone = Path(shutil.copytree(checkpoints[0], tmp_path / "gone"))
    given = {"checkpoints": [str(checkpoints[1]), str(gone)]}
    (tmp_path / "run" / "assemble").mkdir(parents=True)
    assert last_of(tiny_recipe, tmp_path / "run", prepare=given) == gone
    shutil.rmtree(gone)
    assert last_of(tiny_recipe, tmp_path / "run", prepare=given) == tmp_path / "run" / "assemble"
