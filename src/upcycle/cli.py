"""The command line: parses everything before torch is imported."""

import json
import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from upcycle import __version__, api
from upcycle.command import LOUDNESS, is_verbose, quiet_bars, quiet_libraries, run_command, writing
from upcycle.console import hide_progress, tell
from upcycle.disk import check_folder, check_new, check_writable
from upcycle.distributed import world
from upcycle.errors import UpcycleError
from upcycle.hashes import verify_in_full
from upcycle.pipeline.benchmarks import own_folder
from upcycle.pipeline.resume import run_stages, status
from upcycle.pipeline.run import Run, again, is_run
from upcycle.pipeline.stage import Stage
from upcycle.pipeline.stages import STAGES, stage_names, stages_until
from upcycle.reading import brief
from upcycle.recipe import as_override, chosen_settings, describe_settings, dump_recipe, load_recipe, shipped_recipes
from upcycle.records.files import (
    CARD,
    COMPARISON,
    COMPARISON_PICTURE,
    EVALUATE,
    REPORT,
    SWEEP,
    SWEEP_PICTURE,
)
from upcycle.settings import DTYPES, MOST_EXPERTS

PICTURES = (".png", ".pdf", ".svg")
SHARED = ("run", *stage_names(), "compare", "sweep", "benchmark")
"""Verbs that several processes share; all other verbs run in the first process only."""
RUN, ONE_STAGE, LOOK, COMPARE, SHARE = "Run", "Single stages", "Look", "Compare", "Share"
"""Panels of `upcycle --help`."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a dense LLM and the checkpoints of one fine-tuning run into a mixture-of-experts model (UpIT).",
)

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe in the package (`upcycle recipes`)."),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.FIELD=VALUE]...", help="Settings that override the recipe's."),
]
RunOption = Annotated[
    Path,
    typer.Option(
        "--run", "--out", help="The run folder: created if missing, resumed if it exists. Use --out with torchrun."
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Look at base and data, print the settings that are not at their defaults (-v: all) and the stages that "
        "would run, then stop.",
    ),
]
UpdateOption = Annotated[
    bool,
    typer.Option(
        "--update",
        help="Accept a changed recipe: rebuild stages whose inputs changed or whose files are damaged.",
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option("--verify", help="Read every file again, even if it has not changed since it was last read."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
KeepModelsOption = Annotated[
    bool, typer.Option(help="Keep every run's weights; --no-keep-models deletes them after scoring.")
]


def _add_stage(stage: Stage) -> None:
    @app.command(stage.name, help=f"{stage.help}\n\nEarlier stages must be complete.", rich_help_panel=ONE_STAGE)
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
@app.command("run", rich_help_panel=RUN)
def run_all(
    recipe: RecipeArgument,
    run: RunOption,
    overrides: OverridesArgument = None,
    dry_run: DryRunOption = False,
    update: UpdateOption = False,
    verify: VerifyOption = False,
    until: Annotated[str, typer.Option(metavar="STAGE", help="The last stage to run.")] = stage_names()[-1],
) -> None:
    """Run all stages of RECIPE. Run it again to resume; complete stages are kept."""
    _execute(stages_until(until, "--until"), recipe, run, overrides, dry_run, update, verify)


# seven parameters: the options of the verb
@app.command(rich_help_panel=RUN)
def init(
    base: Annotated[str | None, typer.Option(metavar="MODEL", help="The dense model: a folder or hub name.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE", help="Training data: a file, folder, pattern or hub dataset. May be repeated."),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Held-out data. Default: a share of the training data.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="A recipe in the package. Default: upit, or upit-lora where only LoRA experts work."),
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(metavar="FOLDER_OR_PATTERN", help="Your checkpoints: nothing is fine-tuned then.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="FILE", help="chatml, or a Jinja file: for a model whose tokenizer has none.")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="What it must fit on, such as 1x24GB or 8xH100. Default: what is here.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The new recipe; an existing file is not replaced.")] = Path(
        "recipe.yaml"
    ),
) -> None:
    """Write a commented recipe for a model and data: look at both, choose what fits. Asks for what is missing."""
    from upcycle.pipeline.fit import parse_devices
    from upcycle.pipeline.starting import Wanted, ask, check_free, start

    check_free(out)
    cards = parse_devices(devices) if devices is not None else None
    given = {"base": base, "data": data, "validation": validation, "method": method, "checkpoints": checkpoints}
    start(Wanted(**ask(given, typer.prompt), chat_template=chat_template, devices=cards), out)


for _stage in STAGES:
    _add_stage(_stage)


@app.command(rich_help_panel=LOOK)
def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe's YAML.")] = None) -> None:
    """List the recipes in the package, or print one."""
    shipped = shipped_recipes()
    if name is None:
        for key, text in sorted(shipped.items()):
            print(f"{key:14} {text.splitlines()[0].removeprefix('# ')}")
    elif name in shipped:
        print(shipped[name], end="")
    else:
        raise UpcycleError(f"the package has no recipe '{name}'; there are {', '.join(sorted(shipped))}")


@app.command(rich_help_panel=LOOK)
def settings() -> None:
    """List every setting of a recipe with its default and meaning."""
    print(describe_settings(), end="")


@app.command(rich_help_panel=LOOK)
def families(
    as_json: JsonOption = False,
) -> None:
    """List the MoE that each dense model family becomes, the programs that serve it, and the families without one."""
    from upcycle.architectures.listing import listing, tables
    from upcycle.console import table

    if as_json:
        print(json.dumps(listing(), indent=2))
        return
    for part in tables().values():
        table(part.title, part.columns, part.rows, words=True)


@app.command(rich_help_panel=LOOK)
def data(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="Files, folders, patterns or hub datasets; settings as data.FIELD=VALUE."
        ),
    ],
    base: Annotated[str, typer.Option(help="The model whose tokenizer and chat template to use.")],
    html: Annotated[Path | None, typer.Option(help="Also write the output to this HTML file.")] = None,
) -> None:
    """Show what data contain: format, rows and tokens by domain, what is left out and why, and what will be learned."""
    if html is not None:
        check_writable(html)
    from upcycle.console import console
    from upcycle.data.overview import overview
    from upcycle.data.splits import load_parts

    settings = [word for word in sources if re.match(r"data\.\w+=", word)]  # data.jsonl is a file
    names = [word for word in sources if word not in settings]
    if any(word.startswith("data.train=") for word in settings):
        raise UpcycleError("data.train= is given by the sources; name the files alone")
    if not names:
        raise UpcycleError("no source among the settings; name files, folders, patterns or hub datasets")
    run = Run(load_recipe("upit", [as_override("base", base), as_override("data.train", names), *settings]), Path())
    console.record = html is not None
    given = run.given_base  # whatever can be made of it
    train, _ = load_parts(run.recipe, given.tokenizer, given.context_length, given.vocabulary)
    overview(train, given.tokenizer)
    if html is not None:
        console.save_html(str(html))
        tell(f"written: {html}")


@app.command(rich_help_panel=LOOK)
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub name.")],
    num_experts: Annotated[int, typer.Option(min=2, max=MOST_EXPERTS, help="Experts per layer.")] = 8,
    num_experts_per_tok: Annotated[int, typer.Option(min=1, help="Experts that each token uses.")] = 2,
    granularity: Annotated[int, typer.Option(help="Cut every expert into 1, 2, 4 or 8 slices.")] = 1,
    dtype: Annotated[str, typer.Option(help="Storage dtype: source, float32, bfloat16 or float16.")] = "source",
    devices: Annotated[
        str | None, typer.Option(help="Also say what fits on these devices, such as 8xH100 or 8x80GB.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say which MoE a dense model would become and what it costs (parameters, FLOPs, memory), or why it cannot."""
    _check_dtype(dtype)
    if num_experts_per_tok > num_experts:
        raise UpcycleError(f"--num-experts-per-tok is {num_experts_per_tok}, more than --num-experts, {num_experts}")
    if num_experts_per_tok == granularity == 1:
        raise UpcycleError(
            "--num-experts-per-tok is 1: the weight of the only expert of a token is always 1, so the router would not "
            "learn; give 2 or more, or --granularity 2, 4 or 8"
        )
    if as_json and devices:
        raise UpcycleError("--json has no forecast for --devices; leave one of them out")
    if granularity not in (1, 2, 4, 8):
        raise UpcycleError(f"--granularity is {granularity}, expected 1, 2, 4 or 8")
    if granularity * num_experts > MOST_EXPERTS:
        raise UpcycleError(
            f"--granularity {granularity} times --num-experts {num_experts} is more than {MOST_EXPERTS} experts"
        )
    from upcycle.architectures.check import check
    from upcycle.experts.structure import offering_adapters
    from upcycle.pipeline.fit import parse_devices, show_fit

    cards = parse_devices(devices) if devices is not None else None
    with offering_adapters():
        mapping = check(model, num_experts, num_experts_per_tok, dtype, granularity, as_json)
    if cards:
        show_fit(model, mapping, num_experts_per_tok, cards)


@app.command(rich_help_panel=COMPARE)
def compare(
    variants: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help='Two or more recipes with overrides and an optional name: "ridge: quickstart route.start=ridge".',
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and comparison.json; resumed if it exists.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, with seeds 0, 1, ...")] = 3,
    force: Annotated[
        bool, typer.Option(help="Compare even if data or training tokens differ, and mark the result.")
    ] = False,
    keep_models: KeepModelsOption = True,
    against: Annotated[
        str | None, typer.Option(help="Name of the variant to compare the others with. Default: the first.")
    ] = None,
    match: Annotated[
        str, typer.Option(help="tokens, or flops: scale epochs to the first variant's training FLOPs.")
    ] = "tokens",
    results: Annotated[
        Path | None, typer.Option(help="Also store each run's measurements in this folder, and reuse those in it.")
    ] = None,
) -> None:
    """Compare recipes over several seeds: mean, spread, and paired tests against one of them."""
    if len(set(variants)) < 2:
        raise UpcycleError('compare needs two or more variants, such as "upit" "upit route.start=random"')
    from upcycle.reporting.figures import comparison_figure
    from upcycle.studies.cells import Study
    from upcycle.studies.compare import compare

    world.start()
    study = Study(variants, range(seeds), out, keep_models=keep_models, results=results)
    with writing(out):
        found = compare(study, force, against, match)
        world.on_main(lambda: comparison_figure(found, COMPARISON_PICTURE.of(out)))
    tell(f"written: {COMPARISON.of(out)}, {COMPARISON_PICTURE.of(out)}")


@app.command(rich_help_panel=COMPARE)
def sweep(
    recipe: RecipeArgument,
    axes: Annotated[
        list[str],
        typer.Argument(metavar="SECTION.FIELD=VALUE,VALUE...", help="Settings, each with the values to try."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the runs and sweep.json; resumed if it exists.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each combination, with seeds 0, 1, ...")] = 3,
    keep_models: KeepModelsOption = True,
) -> None:
    """Run every combination of settings over several seeds, and plot the scores."""
    from upcycle.reporting.figures import sweep_figure
    from upcycle.studies.sweep import sweep

    world.start()
    with writing(out):
        found = sweep(recipe, axes, seeds, out, keep_models)
        world.on_main(lambda: sweep_figure(found, SWEEP_PICTURE.of(out)))
    tell(f"written: {SWEEP.of(out)}, {SWEEP_PICTURE.of(out)}")


@app.command(rich_help_panel=LOOK)
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A run, one of its stage folders, a MoE made by Upcycle, or a plan.json.")
    ],
    figure: Annotated[
        Path | None, typer.Option(help="Also draw the similarities here; for a run, routing and load beside it.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print how far a run is as JSON: its stages, their state, seconds, memory.")
    ] = False,
) -> None:
    """Show the experts' lineage and similarities; with --figure, plot them, and a run's routing by domain and load."""
    if as_json:
        if figure is not None:
            raise UpcycleError("--json draws no --figure; leave one of them out")
        from upcycle.reporting.progress import facts

        print(json.dumps(facts(path), indent=2))
        return
    if figure is not None:
        check_writable(figure)
    if figure is not None and figure.suffix.lower() not in PICTURES:
        raise UpcycleError(f"--figure is {figure}, expected a name that ends in {', '.join(PICTURES)}")
    from upcycle.reporting.inspect import inspect

    made = None
    if path.is_dir() and not is_run(path):
        from upcycle.experts.kinds import holds_model, kind_in

        made = kind_in(path).describe(path) if holds_model(path) else None
    with writing(figure.parent if figure else path):
        inspect(path, figure, made)


# eight parameters: the options of the verb
@app.command(rich_help_panel=COMPARE)
def benchmark(
    models: Annotated[list[str], typer.Argument(metavar="RUN_OR_MODEL...", help="Runs, model folders or hub names.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for scores and pictures; resumed if it exists. Default for one run: RUN/benchmark."
        ),
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Names of lm-eval tasks, or of files in --task-folder, separated by commas.")
    ] = "",
    task_folder: Annotated[
        Path | None, typer.Option(help="A folder of *.jsonl or *.jsonl.gz files, one task each.")
    ] = None,
    experts: Annotated[bool, typer.Option("--experts", help="Also score every expert of a run alone.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows of each task.")] = None,
    chat_template: Annotated[bool, typer.Option(help="Apply the chat template.")] = True,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run the programs that the model writes (rows with `test_list`).")
    ] = False,
) -> None:
    """Score base, checkpoints, experts and MoE of a run on benchmarks, through lm-evaluation-harness."""
    out = out or own_folder(models)
    check_folder(out, "--out")
    from upcycle.reporting.figures import draw_benchmarks
    from upcycle.studies.benchmark import choose_tasks, run_benchmark

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    chosen = choose_tasks(names, task_folder, allow_code)
    world.start()
    with writing(out):
        found = run_benchmark(models, chosen, experts, out, limit, chat_template)
        world.on_main(lambda: draw_benchmarks(found, out))
    tell(f"written: {', '.join(str(path) for path in sorted(out.glob('*.*')))}")


@app.command(rich_help_panel=LOOK)
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_OR_COMPARISON", help="A finished run, comparison or sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The HTML file. Default: report.html in the folder.")
    ] = None,
    watch: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="Refresh the page every SECONDS until the run is complete."),
    ] = None,
) -> None:
    """Write a standalone HTML report of a run, comparison or sweep: lineage, scores, routing, cost, recipe.

    The report of a run that is part of a comparison shows the comparison too.
    """
    if out is not None:
        check_writable(out)
    page = out or REPORT.of(folder)
    with writing(page.parent):
        if watch is not None:
            from upcycle.reporting import progress

            progress.watch(folder, watch, page)
        api.report(folder, page)


@app.command(rich_help_panel=SHARE)
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, or one of its model folders.")],
    to: Annotated[Path, typer.Option("--to", help="The new folder.")],
    fold: Annotated[bool, typer.Option("--fold", help="Write a mixture of LoRA experts as a plain MoE.")] = False,
    dtype: Annotated[str, typer.Option(help="Storage dtype: source, float32, bfloat16 or float16.")] = "source",
    base: Annotated[str | None, typer.Option(help="The dense base of a mixture, if its folder has moved.")] = None,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to the hub, after asking.")] = None,
) -> None:
    """Write the finished model to a standalone folder with a model card; upload it if you ask for it."""
    _check_dtype(dtype)
    check_new(to, "--to")
    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise UpcycleError(f"--push is {brief(push)}, expected OWNER/NAME")
    with writing(to):
        api.export(source, to, fold=fold, dtype=dtype, base=base)
    if CARD.of(to).exists():
        print(f"model card: {CARD.of(to)}")
    if push:
        _push(to, push)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    quiet: Annotated[
        bool, typer.Option(*LOUDNESS["quiet"], help="Print only results, warnings and errors, no progress.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option(*LOUDNESS["verbose"], help="Also print what libraries say, and the traceback of an error.")
    ] = False,
) -> None:
    if quiet:
        hide_progress()
        quiet_bars()
    if not verbose:
        quiet_libraries()
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
    with writing(folder):
        run_stages(run, stages, update)
    if EVALUATE in stages:
        from upcycle.pipeline.summary import show_summary

        world.on_main(lambda: show_summary(run))
    else:
        made = folder / stages[-1]
        world.on_main(lambda: tell(f"{made} is complete; all stages: {again(folder)}"))


def _show_plan(run: Run, stages: tuple[str, ...]) -> None:
    from upcycle.pipeline.looking import look

    if is_verbose():
        print(dump_recipe(run.recipe))
    else:
        print("\n".join(chosen_settings(run.recipe)), "\nall other settings: their defaults (-v prints them)\n", sep="")
    for line in look(run):
        print(line)
    for stage, todo in status(run):
        print(f"{stage:10} {todo if stage in stages else 'not asked for'}")


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UpcycleError(f"--dtype is '{dtype}', expected one of {', '.join(DTYPES)}")


def _push(folder: Path, name: str) -> None:
    """Upload a folder as a private model, once the user has said yes."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if not typer.confirm(f"upload {folder} ({size / 1e9:.2f} GB) to the hub as {name} (private if it is new)?"):
        print(f"not uploaded; the folder is {folder}")
        return
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of the hub, of the transport, of the name: all mean the same here
        raise UpcycleError(
            f"{name} could not be uploaded: {error}; {folder} is complete: log in with `hf auth login`, then type "
            f"`{shlex.join(['hf', 'upload', name, str(folder)])}`"
        ) from None
    print(f"uploaded: https://huggingface.co/{name}")


def main() -> None:
    """Run the command that was typed."""
    run_command(app, SHARED)


if __name__ == "__main__":
    main()
