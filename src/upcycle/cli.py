"""The command line: parses everything before torch is imported."""

import errno
import gc
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from upcycle import __version__, api
from upcycle.console import say
from upcycle.disk import check_new, check_writable
from upcycle.distributed import world
from upcycle.errors import RelayedError, UpcycleError
from upcycle.hashes import verify_in_full
from upcycle.pipeline.benchmarks import own_folder
from upcycle.pipeline.resume import run_stages, status
from upcycle.pipeline.run import Run, is_run
from upcycle.pipeline.stage import Stage
from upcycle.pipeline.stages import STAGES, stage_names
from upcycle.reading import brief
from upcycle.recipe import describe_settings, dump_recipe, load_recipe, shipped_recipes
from upcycle.records.files import (
    CARD,
    COMPARISON,
    COMPARISON_PICTURE,
    EVALUATE,
    REPORT,
    SWEEP,
    SWEEP_PICTURE,
)
from upcycle.records.record import first_problem
from upcycle.settings import MOST_EXPERTS

ALMOST_FULL_BYTES = 32 << 20
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What libraries are to be, unless the user has said otherwise."""
PICTURES = (".png", ".pdf", ".svg")
SHARED = ("run", *stage_names(), "compare", "sweep", "benchmark")
"""Verbs that several processes work on; of all others the first process is enough."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a dense LLM and the checkpoints of one fine-tuning run into a mixture-of-experts model (UpIT).",
)

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe (see `upcycle recipes`)."),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Settings that replace the recipe's."),
]
RunOption = Annotated[
    Path,
    typer.Option("--run", "--out", help="The run folder: made if missing, resumed if there. torchrun needs --out."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe and what would run; do nothing.")
]
UpdateOption = Annotated[
    bool,
    typer.Option(
        "--update",
        help="Accept a changed recipe: build again, in place, what has other inputs or is damaged.",
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option("--verify", help="Read every file again, also one that has not changed since it was last read."),
]
KeepModelsOption = Annotated[
    bool, typer.Option(help="Without it the weights of a seed's runs are deleted once all of them are measured.")
]


def _add_stage(stage: Stage) -> None:
    @app.command(stage.name, help=f"{stage.help} One stage of `run`; earlier ones must be complete.")
    def command(
        recipe: RecipeArgument,
        run: RunOption,
        overrides: OverridesArgument = None,
        dry_run: DryRunOption = False,
        update: UpdateOption = False,
        verify: VerifyOption = False,
    ) -> None:
        _execute((stage.name,), recipe, run, overrides, dry_run, update, verify)


# seven parameters: the options of the verb
@app.command("run")
def run_all(
    recipe: RecipeArgument,
    run: RunOption,
    overrides: OverridesArgument = None,
    dry_run: DryRunOption = False,
    update: UpdateOption = False,
    verify: VerifyOption = False,
    until: Annotated[str, typer.Option(metavar="STAGE", help="The last stage to run.")] = stage_names()[-1],
) -> None:
    """All stages of RECIPE in order. Run it again to resume: what is complete is kept."""
    if until not in (names := stage_names()):
        raise UpcycleError(f"--until is {brief(until)}, expected one of {', '.join(names)}")
    _execute(names[: names.index(until) + 1], recipe, run, overrides, dry_run, update, verify)


for _stage in STAGES:
    _add_stage(_stage)


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe's YAML.")] = None) -> None:
    """List the shipped recipes, or print one."""
    shipped = shipped_recipes()
    if name is None:
        for key, text in sorted(shipped.items()):
            print(f"{key:14} {text.splitlines()[0].removeprefix('# ')}")
    elif name in shipped:
        print(shipped[name], end="")
    else:
        raise UpcycleError(f"no shipped recipe '{name}'; there are {', '.join(sorted(shipped))}")


@app.command()
def settings() -> None:
    """List every setting of a recipe with its default and meaning."""
    print(describe_settings(), end="")


@app.command()
def families(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """List which dense models become which mixture of experts, who serves it, and what has none."""
    from upcycle.architectures.listing import listing, tables
    from upcycle.console import table

    if as_json:
        print(json.dumps(listing(), indent=2))
        return
    for part in tables().values():
        table(part.title, part.columns, part.rows, words=True)


@app.command()
def data(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, patterns, hub datasets; data.FIELD=VALUE.")
    ],
    base: Annotated[str, typer.Option(help="The model whose tokenizer and chat template are used.")],
    html: Annotated[Path | None, typer.Option(help="Write what is printed as a page too.")] = None,
) -> None:
    """Say what data hold: format, rows and tokens by domain, what is left out and why, samples with what is learned."""
    if html is not None:
        check_writable(html)
    _quiet_libraries()
    from upcycle.console import console
    from upcycle.data.overview import overview
    from upcycle.data.splits import load_parts

    settings = [word for word in sources if word.startswith("data.")]
    names = [word for word in sources if word not in settings]
    run = Run(load_recipe("upit", [f"base={base}", f"data.train={json.dumps(names)}", *settings]), Path())
    console.record = html is not None
    given = run.given_base  # whatever can be made of it
    train, _ = load_parts(run.recipe, given.tokenizer, given.context_length)
    overview(train, given.tokenizer)
    if html is not None:
        console.save_html(str(html))
        say(f"written: {html}")


@app.command()
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub name.")],
    num_experts: Annotated[int, typer.Option(min=2, max=MOST_EXPERTS, help="Experts per layer.")] = 8,
    num_experts_per_tok: Annotated[int, typer.Option(min=1, help="Experts active for a token.")] = 2,
    granularity: Annotated[int, typer.Option(help="Slices that every expert is cut into: 1, 2, 4 or 8.")] = 1,
    dtype: Annotated[str, typer.Option(help="source, float32, bfloat16 or float16.")] = "source",
    devices: Annotated[
        str | None, typer.Option(help="Say what fits on them, and what would make it fit: 8xH100, or 8x80GB.")
    ] = None,
) -> None:
    """Say what a dense model would become, and what other choices cost: parameters, FLOPs, memory; or why it cannot."""
    _check_dtype(dtype)
    if num_experts_per_tok > num_experts:
        raise UpcycleError(f"--num-experts-per-tok is {num_experts_per_tok}, more than --num-experts, {num_experts}")
    if granularity not in (1, 2, 4, 8):
        raise UpcycleError(f"--granularity is {granularity}, expected 1, 2, 4 or 8")
    _quiet_libraries()
    from upcycle.architectures.check import check
    from upcycle.experts.structure import offering_adapters
    from upcycle.pipeline.fit import parse_devices, show_fit

    cards = parse_devices(devices) if devices is not None else None
    with offering_adapters():
        mapping = check(model, num_experts, num_experts_per_tok, dtype, granularity)
    if cards:
        show_fit(model, mapping, num_experts_per_tok, cards)


@app.command()
def compare(
    variants: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help='Two or more, each with overrides, and a name if wanted: "ridge: quickstart route.start=ridge".',
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and comparison.json; resumed if there.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, with seeds 0, 1, ...")] = 3,
    force: Annotated[bool, typer.Option(help="Compare runs of other data or training tokens, and mark it.")] = False,
    keep_models: KeepModelsOption = True,
    against: Annotated[
        str | None, typer.Option(help="Name of the variant that the others are compared with; else the first.")
    ] = None,
    match: Annotated[
        str, typer.Option(help="tokens, or flops: scale the others' epochs to the training FLOPs of the first.")
    ] = "tokens",
    results: Annotated[
        Path | None, typer.Option(help="Keep the measures of every run here too, and take those that are here already.")
    ] = None,
) -> None:
    """Run recipes with several seeds; mean, spread and paired tests against one of them."""
    if len(set(variants)) < 2:
        raise UpcycleError('compare needs two variants or more, such as "upit" "upit route.start=random"')
    _quiet_libraries()
    from upcycle.reporting.figures import comparison_figure
    from upcycle.studies.cells import Study
    from upcycle.studies.compare import compare

    world.start()
    study = Study(variants, range(seeds), out, keep_models=keep_models, results=results)
    with _writing(out):
        found = compare(study, force, against, match)
        world.on_main(lambda: comparison_figure(found, COMPARISON_PICTURE.of(out)))
    say(f"written: {COMPARISON.of(out)}, {COMPARISON_PICTURE.of(out)}")


@app.command()
def sweep(
    recipe: RecipeArgument,
    axes: Annotated[
        list[str],
        typer.Argument(metavar="SECTION.FIELD=VALUE,VALUE...", help="Settings with the values to go through."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and sweep.json; resumed if there.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination, with seeds 0, 1, ...")] = 3,
    keep_models: KeepModelsOption = True,
) -> None:
    """Run every combination of settings with several seeds: score against data size, experts, anything."""
    _quiet_libraries()
    from upcycle.reporting.figures import sweep_figure
    from upcycle.studies.sweep import sweep

    world.start()
    with _writing(out):
        found = sweep(recipe, axes, seeds, out, keep_models)
        world.on_main(lambda: sweep_figure(found, SWEEP_PICTURE.of(out)))
    say(f"written: {SWEEP.of(out)}, {SWEEP_PICTURE.of(out)}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A run, one of its stage folders, a MoE made here, or a plan.json.")],
    figure: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("similarity.png"),
) -> None:
    """Show the experts' lineage and similarities; draw them, and of a run who gets which domain and the load."""
    check_writable(figure)
    if figure.suffix.lower() not in PICTURES:
        raise UpcycleError(f"--figure is {figure}, expected a name that ends in {', '.join(PICTURES)}")
    from upcycle.reporting.inspect import inspect

    made = None
    if path.is_dir() and not is_run(path):
        from upcycle.experts.kinds import holds_model, kind_in

        made = kind_in(path).describe(path) if holds_model(path) else None
    with _writing(figure.parent):
        inspect(path, figure, made)


# eight parameters: the options of the verb
@app.command()
def benchmark(
    models: Annotated[list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Runs, model folders or hub names.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for scores and pictures, resumed if there. Of a single run: RUN/benchmark."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Names, separated by commas: of lm-eval's tasks, or of files.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="A folder of *.jsonl or *.jsonl.gz, a task each.")] = None,
    experts: Annotated[bool, typer.Option("--experts", help="Also every expert of a run alone.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows of each task.")] = None,
    chat_template: Annotated[bool, typer.Option(help="Ask as a chat, or as plain text.")] = True,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs that the model writes (rows with `test_list`).")
    ] = False,
) -> None:
    """Score models on benchmarks through lm-evaluation-harness: base, checkpoints, experts and MoE of a run."""
    out = out or own_folder(models)
    _quiet_libraries()
    from upcycle.reporting.figures import draw_benchmarks
    from upcycle.studies.benchmark import choose_tasks, run_benchmark

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    chosen = choose_tasks(names, task_folder, allow_code)
    world.start()
    with _writing(out):
        found = run_benchmark(models, chosen, experts, out, limit, chat_template)
        world.on_main(lambda: draw_benchmarks(found, out))
    say(f"written: {', '.join(str(path) for path in sorted(out.glob('*.*')))}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_OR_COMPARISON", help="A finished run, comparison or sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file; default: report.html in the folder.")
    ] = None,
    watch: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="While a run goes on, show how far it is, anew every SECONDS."),
    ] = None,
) -> None:
    """Write one HTML file that stands alone: what was made, whether it helped, who reads what, cost, how to repeat it.

    The report of a run that is part of a comparison shows the comparison too.
    """
    if out is not None:
        check_writable(out)
    page = out or REPORT.of(folder)
    if watch is not None:
        from upcycle.reporting import progress

        with _writing(page.parent):
            progress.watch(folder, watch, page)
    _quiet_libraries()
    with _writing(page.parent):
        api.report(folder, page)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or a model folder of one.")],
    to: Annotated[Path, typer.Option("--to", help="The new folder.")],
    fold: Annotated[bool, typer.Option("--fold", help="Write a mixture of LoRA experts as a plain MoE.")] = False,
    dtype: Annotated[str, typer.Option(help="Of a folded MoE: source, float32, bfloat16 or float16.")] = "source",
    base: Annotated[str | None, typer.Option(help="The dense model of a mixture, if it has moved.")] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to the hub, after asking.")] = None,
) -> None:
    """Write the finished model as a folder that stands alone, with its model card; upload it if wanted."""
    _check_dtype(dtype)
    check_new(to, "--to")
    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise UpcycleError(f"--push is {brief(push)}, expected OWNER/NAME")
    _quiet_libraries()
    with _writing(to):
        api.export(source, to, fold=fold, dtype=dtype, base=base)
    if CARD.of(to).exists():
        print(f"model card: {CARD.of(to)}")
    if push:
        _push(to, push)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"upcycle {__version__}")
        raise typer.Exit


# seven parameters: what the verbs take
def _execute(
    stages: tuple[str, ...],
    recipe: str,
    folder: Path,
    overrides: list[str] | None,
    dry_run: bool,
    update: bool,
    verify: bool,
) -> None:
    if verify:
        verify_in_full()
    world.start()
    run = Run(world.on_main(lambda: load_recipe(recipe, overrides or [])), folder)
    if dry_run:
        world.on_main(lambda: _show_plan(run, stages))
        return
    _quiet_libraries()
    with _writing(folder):
        run_stages(run, stages, update)
    if EVALUATE in stages:
        from upcycle.pipeline.summary import show_summary

        world.on_main(lambda: show_summary(run))


def _show_plan(run: Run, stages: tuple[str, ...]) -> None:
    print(dump_recipe(run.recipe))
    for stage, todo in status(run):
        print(f"{stage:10} {todo if stage in stages else 'not asked for'}")


def _check_dtype(dtype: str) -> None:
    if dtype not in (choices := ("source", "float32", "bfloat16", "float16")):
        raise UpcycleError(f"--dtype is '{dtype}', expected one of {', '.join(choices)}")


def _push(folder: Path, name: str) -> None:
    """Upload a folder as a private model, once the user has said yes."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not typer.confirm(f"upload {folder} ({size / 1e9:.2f} GB) to the hub as {name} (private if it is new)?"):
        print(f"not uploaded; the folder is {folder}")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UpcycleError(f"{name} could not be uploaded: {error}; log in with `hf auth login`") from None
    print(f"uploaded: https://huggingface.co/{name}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """What runs inside writes there; an error of a full disk says so, whatever kind a library makes of it."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, OSError) and error.errno not in (None, errno.ENOSPC)
        if known or isinstance(error, UpcycleError):
            raise
        there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path())
        if shutil.disk_usage(there).free >= ALMOST_FULL_BYTES:
            raise
        said = str(error).strip().partition("\n")[0]
        raise OSError(errno.ENOSPC, said, str(folder)) from error


def _quiet_libraries() -> None:
    """By their variables: a library that a verb does not need is not imported to be told."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # PEFT uses an older name
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def _stop(code: int, message: str) -> None:
    if world.may_speak():
        print(message, file=sys.stderr)
    world.leave(code)


def main() -> None:
    """Run the command that was typed; what a user can mend, or did, ends in one line without a traceback."""
    if not world.is_main() and not set(sys.argv[1:2]) & set(SHARED):
        return
    gc.set_threshold(100_000, 20, 20)  # importing torch and transformers makes millions of objects: 15% quicker
    try:
        for word in sys.argv[1:]:
            word.encode()
        app()
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
        _stop(2, "error: another of the processes has ended; go on with the same command")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            line = f"error: no space left on the disk of {error.filename or 'a file'} ({error.strerror})"
            _stop(2, f"{line}; make room, and go on with the same command")
        _stop(2, f"error: {error.filename or ''}: {error.strerror or error}".replace("error: :", "error:"))


if __name__ == "__main__":
    main()
