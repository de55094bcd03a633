"""The finished model as a folder that stands alone: a mixture of LoRA experts is folded into a plain MoE."""

import shutil
from pathlib import Path

from upcycle.console import say
from upcycle.disk import check_new
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import holds_model, kind_in
from upcycle.records.files import INPUTS, LOG, MANIFEST

NOT_EXPORTED = (MANIFEST.name, INPUTS.name, LOG.name)


def export(source: Path, target: Path, fold: bool, dtype: str, base: str | None = None) -> None:
    """Write the MoE or mixture in `source` to `target`, which must not hold anything yet.

    Args:
        fold: write a mixture of LoRA experts as a plain MoE, expert i having the weights W + s_i B_i A_i.
        dtype: of a folded MoE; `source` is the base's.
        base: the dense model of a mixture; none given: the one that it names.

    Raises:
        UpcycleError: nothing to export, a target that is not empty, a mixture that cannot be folded, or logits that are
            not the mixture's.
    """
    check_new(target, "--to")
    if not holds_model(source):
        raise UpcycleError(f"{source} holds no model; expected a finished run, its folder posttrain, or a model folder")
    kind = kind_in(source)
    partial_target = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial_target, ignore_errors=True)  # of an export that was interrupted
    partial_target.mkdir(parents=True)
    if fold:
        try:
            kind.fold(source, partial_target, dtype, base)
        except UpcycleError:
            shutil.rmtree(partial_target)
            raise
    else:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in NOT_EXPORTED:
                shutil.copyfile(path, partial_target / path.name)
    if target.exists():
        target.rmdir()
    partial_target.rename(target)
    made = kind_in(target).describe(target)
    needs = "" if made.plain else " (compact: it needs its base and upcycle)"
    say(f"export: {target}{needs}{'; --fold makes a plain MoE' if made.folds else ''}")
