"""How a command begins and ends: what is said, which processes run it, and errors in one line."""

import errno
import gc
import os
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from upcycle.console import visible
from upcycle.disk import expanded
from upcycle.distributed import world
from upcycle.errors import RelayedError, UpcycleError
from upcycle.reading import brief
from upcycle.records.record import first_problem

ALMOST_FULL_BYTES = 32 << 20
BUGS = (NameError, AttributeError, TypeError, LookupError, AssertionError, ImportError, ArithmeticError)
"""What no library raises because a file cannot be written."""
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What libraries are to be, unless the user has said otherwise."""
LOUDNESS = {"quiet": ("-q", "--quiet"), "verbose": ("-v", "--verbose")}
"""Options of every verb, before or after it."""
PLACES = ("--run", "--out", "--to", "--results")
"""Options that name a place to write to."""


def run_command(app: Callable[[list[str]], Any], shared: Collection[str]) -> None:
    """Run the command that was typed; user-facing errors and interrupts end in one line without a traceback.

    Args:
        app: what takes the words.
        shared: the verbs that several processes share; all others run in the first process only.
    """
    words = _loudness_first([_at_home(word) for word in sys.argv[1:]])
    verb = next((word for word in words if not word.startswith("-")), "")
    if not world.is_main() and verb not in shared:
        return
    gc.set_threshold(100_000, 20, 20)  # importing torch and transformers makes millions of objects: 15% quicker
    try:
        for word in words:
            word.encode()
        _check_named(words)
        app(words)
        world.stop()
    except RelayedError:
        world.leave(2)
    except UnicodeEncodeError as error:
        _stop(2, f"error: {brief(error.object)} is not UTF-8; rename the file or folder")
    except ValidationError as error:
        _stop(2, f"error: {error.title} cannot be recorded: {first_problem(error)}; is a weight or a loss not finite?")
    except UpcycleError as error:
        _stop(2, f"error: {error}")
    except RuntimeError as error:
        if not world.lost_another(error):
            raise
        _stop(2, "error: another of the processes has ended; continue with the same command")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            line = f"error: no space left on the disk of {error.filename or 'a file'} ({error.strerror})"
            _stop(2, f"{line}; free some space, then continue with the same command")
        _stop(2, f"error: {error.filename or ''}: {error.strerror or error}".replace("error: :", "error:"))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """For code that writes to `folder`: a full disk is reported as such, whatever exception a library raises."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) and error.errno not in (None, errno.ENOSPC)
        if known or isinstance(error, (UpcycleError, *BUGS)):
            raise
        there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path())
        if shutil.disk_usage(there).free >= ALMOST_FULL_BYTES:
            raise
        said = str(error).strip().partition("\n")[0]
        raise OSError(errno.ENOSPC, said, str(folder)) from error


def quiet_libraries() -> None:
    """By their variables: a library that a verb does not need is not imported to be told."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # PEFT uses an older name
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def quiet_bars() -> None:
    """Those of libraries that have no variable of their own (lm-eval)."""
    os.environ.setdefault("TQDM_DISABLE", "1")


def is_verbose() -> bool:
    """Whether the words that were typed ask for it."""
    return bool(set(sys.argv) & set(LOUDNESS["verbose"]))


def _at_home(word: str) -> str:
    """With the home folder that a shell leaves as `~` behind an option's `=`, or in quotes; no such user: as it is."""
    option, equals, place = word.partition("=") if word.startswith("--") else ("", "", word)
    try:
        return f"{option}{equals}{expanded(place)}" if place.startswith("~") else word
    except UpcycleError:
        return word


def _loudness_first(words: list[str]) -> list[str]:
    """`upcycle run -q ...` is `upcycle -q run ...`."""
    options = {option for names in LOUDNESS.values() for option in names}
    return sorted(words, key=lambda word: word not in options)


def _check_named(words: Sequence[str]) -> None:
    """Raises UpcycleError for a place without a name, which would be the current folder: a variable that is not set."""
    for option, word in pairwise([*words, "-"]):
        name, equals, value = option.partition("=")
        if name in PLACES and not (value if equals else word):
            raise UpcycleError(f"{name} is empty, expected a name (is a variable of the shell not set?)")


def _stop(code: int, message: str) -> None:
    if world.may_speak():
        if is_verbose():
            traceback.print_exc()
        print(visible(message), file=sys.stderr)
    world.leave(code)
