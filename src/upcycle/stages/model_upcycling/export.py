"""The finished model as a standalone folder: a mixture of LoRA experts is folded into a plain MoE."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from upcycle.console import tell
from upcycle.disk import check_new, scratch_folder, sync_files
from upcycle.errors import UpcycleError
from upcycle.experts.kinds import holds_model, kind_in
from upcycle.records.files import INPUTS, LOG, MANIFEST, ORIGIN
from upcycle.settings import DTYPES
from upcycle.weights.casting import cast_model
from upcycle.weights.folders import copy_files
from upcycle.weights.safetensors_io import DTYPE_NAMES

NOT_EXPORTED = (MANIFEST.name, INPUTS.name, LOG.name, ORIGIN.name)


def export(
    source: Path,
    target: Path,
    fold: bool,
    dtype: str,
    base: str | None = None,
    finish: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write the MoE or mixture in `source` to `target`, which must not hold anything yet.

    Args:
        fold: write a mixture of LoRA experts as a plain MoE, expert i having the weights W + s_i B_i A_i.
        dtype: of a plain MoE; `source` is its own, or of a folded one the base's.
        base: the dense model of a mixture; none given: the one that it names.
        finish: adds to the folder before it gets its name.

    Raises:
        UpcycleError: nothing to export, `dtype` or `base` for what they do not apply to, a target that is not empty, a
            mixture that cannot be folded, or logits that are not the mixture's.
    """
    check_new(target, "--to")
    if dtype not in DTYPES:
        raise UpcycleError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not holds_model(source):
        raise UpcycleError(f"{source} holds no model; expected a finished run, its folder posttrain, or a model folder")
    if base is not None and not fold:
        raise UpcycleError("--base is for a mixture that is folded; add --fold, or leave it out")
    if dtype != "source" and not fold and not kind_in(source).describe(source).plain:
        raise UpcycleError("--dtype is for a plain MoE; add --fold, or leave it out")
    scratch = scratch_folder(target)
    try:
        if fold:
            kind_in(source).fold(source, scratch, dtype, base)
        elif dtype != "source":
            cast_model(source, scratch, DTYPE_NAMES[dtype], NOT_EXPORTED)
        else:
            names = (path.name for path in source.iterdir())
            copy_files(source, scratch, sorted(name for name in names if name not in NOT_EXPORTED))
        finish(scratch)
        sync_files(scratch)
        scratch.replace(target)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise UpcycleError(
            f"{target} is not empty any more: another process wrote there; give --to a new folder"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    made = kind_in(target).describe(target)
    needs = "" if made.plain else " (compact: it needs its base and upcycle)"
    tell(f"export: {target}{needs}{'; --fold makes a plain MoE' if made.folds else ''}")
