"""Expansion and assembly against mergekit 0.1.5 and against the disk: whole commands, all sides in one go.

    python benchmarks/assembly_vs_mergekit.py --work /tmp/assembly            # 25 GB of disk
    python benchmarks/assembly_vs_mergekit.py --work /tmp/assembly --keep     # puts the table into docs/benchmarks.md
    python benchmarks/assembly_vs_mergekit.py --work /tmp/toy --toy --skip-mergekit

Job: a random Llama in bf16 and four perturbed checkpoints; expand 4 to 8 experts (DARE, p 0.2), write an 8-expert MoE.
Ours: `upcycle run --until assemble`; the verbs `prepare`, `expand` and `assemble` one after the other; both as a user
types them, with hashes, checks and an empty cache of their own; and the two functions alone. mergekit: one
`dare_linear` merge per child with the same parents and weights, then `mergekit-moe`, in a virtual environment of its
own (made in --work if --mergekit does not name one). The floor: `cp` of the bytes read plus `cp` of the bytes written.
CPU seconds are user plus system of all processes of a side, imports included; memory is the peak of the anonymous
resident memory, sampled every 20 ms.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from math import prod
from pathlib import Path
from typing import Any

import torch

from upcycle.console import say
from upcycle.disk import CACHE, write_json, write_text
from upcycle.records.files import PLAN
from upcycle.records.plan import ExpansionPlan
from upcycle.weights.folders import BUILTIN_BASE, find_model, write_config
from upcycle.weights.safetensors_io import ModelWriter, TensorSpec, pieces

NUM_CHECKPOINTS, NUM_EXPERTS, DROP_RATE = 4, 8, 0.2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
TOY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TOY |= {"num_attention_heads": 4, "num_key_value_heads": 4}
FUNCTIONS, RUN, VERBS, FLOOR, MERGEKIT = "two functions", "`upcycle run`", "three verbs", "`cp`", "mergekit"
OUTPUTS = ("run", "ours", "copy", "theirs")
"""Folders in --work that the sides write."""
KEPT = Path(__file__).parent / "results" / "assembly.json"
PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(<!-- assembly -->\n).*?(<!-- end -->)", re.DOTALL)
RATIOS = (
    ("wall_s", MERGEKIT, RUN, "at least 8"),
    ("cpu_s", MERGEKIT, RUN, "at least 8"),
    ("wall_s", MERGEKIT, VERBS, ""),
    ("cpu_s", MERGEKIT, VERBS, ""),
    ("cpu_s", MERGEKIT, FUNCTIONS, "at least 10"),
    ("wall_s", RUN, FLOOR, "at most 2"),
    ("wall_s", VERBS, FLOOR, "at most 2.5"),
)
"""What is compared, of which side over which, and the aim."""
NAMES = {"wall_s": "wall time", "cpu_s": "CPU seconds"}
OURS = """
import gc, sys
gc.set_threshold(100_000, 20, 20)  # as the command `upcycle` does
from pathlib import Path
from upcycle.experts.kinds import KINDS
from upcycle.recipe import parse_recipe
from upcycle.records.plan import Checkpoint
from upcycle.stages.expert_expansion.expand import expand
from upcycle.stages.model_upcycling.assemble import assemble
from upcycle.weights.base import Base
folder, out, *folders = map(Path, sys.argv[1:])
base, kind = Base(folder, str(folder)), KINDS["ffn"]
checkpoints = [Checkpoint(name=f.name, path=str(f)) for f in folders]
expansion = {"num_experts": %d, "drop_rate": %g, "spread": 1}
recipe = parse_recipe({"base": str(folder), "data": {"train": "none"}, "expand": expansion}, "benchmark")
plan = expand(kind, base, checkpoints, folders, recipe.expand, 0, out)
assemble(kind, base, folders, plan, recipe, out)
"""


@dataclass
class Cost:
    """What a side of the comparison took."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    anonymous_mb: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s, max(self.anonymous_mb, other.anonymous_mb))


def measured(command: list[str], log: Path, cache: Path | None = None) -> Cost:
    """Run a command to its end; CPU time of its whole tree, peak of its own anonymous memory."""
    environment = {**os.environ, **({CACHE: str(cache)} if cache else {})}
    before, begin, peak = _children_cpu(), time.monotonic(), 0
    with log.open("ab") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous_kb(process.pid))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed, see {log}")
    return Cost(time.monotonic() - begin, _children_cpu() - before, peak / 1e3)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _anonymous_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def make_models(work: Path) -> list[Path]:
    """The base and the checkpoints, kept from run to run; random weights."""
    folders = [work / "base", *(work / f"checkpoint-{i + 1}" for i in range(NUM_CHECKPOINTS))]
    for number, folder in enumerate(folders):
        if (folder / "config.json").exists():
            continue
        say(f"making {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        with ModelWriter(folder, specs()) as writer:
            for index, (name, spec) in enumerate(specs().items()):
                for begin, count in pieces(spec.num_bytes // 2, 1 << 22):
                    writer.write(name, values(index, begin, count, number, name), begin)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(find_model(BUILTIN_BASE) / name, folder / name)
        write_config(folder, CONFIG)
    return folders


def values(index: int, begin: int, count: int, number: int, name: str) -> torch.Tensor:
    """Weights of a base (`number` 0), or of a checkpoint that moved away from it in the FFNs and a little elsewhere."""
    generator = torch.Generator().manual_seed(index * 1_000_003 + begin)
    weights = torch.ones(count) if "norm" in name else torch.randn(count, generator=generator) * 0.02
    if number:
        generator.manual_seed(number * 7_919 + index * 1_000_003 + begin)
        weights += torch.randn(count, generator=generator) * (0.004 if ".mlp." in name else 0.001)
    return weights


def specs() -> dict[str, TensorSpec]:
    """Name, shape and dtype of every tensor of the dense model."""
    hidden, channels = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (CONFIG["vocab_size"], hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{prefix}mlp.{p}_proj.weight": (channels, hidden) for p in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, channels)
        shapes |= {f"{prefix}{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    return {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}


def run_ours(folders: list[Path], out: Path, log: Path) -> Cost:
    """Expansion and assembly, as the stages call them, in one process."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    script = OURS % (NUM_EXPERTS, DROP_RATE)
    return measured([sys.executable, "-c", script, str(folders[0]), str(out), *map(str, folders[1:])], log)


def settings(folders: list[Path]) -> list[str]:
    """The job as words of a command."""
    return [
        f"base={folders[0]}",
        "data.train=builtin:train",
        f"prepare.checkpoints=[{','.join(map(str, folders[1:]))}]",
        f"expand.num_experts={NUM_EXPERTS}",
        f"expand.drop_rate={DROP_RATE}",
        "expand.spread=1",  # mergekit has nothing like it
    ]


def run_verbs(folders: list[Path], out: Path, log: Path, verbs: tuple[tuple[str, ...], ...]) -> Cost:
    """Whole commands, one after the other, of a user who has an empty cache."""
    cache, cost = out.with_name("cache"), Cost()
    for folder in (out, cache):
        shutil.rmtree(folder, ignore_errors=True)
    for verb in verbs:
        cost += run_verb(folders, out, log, *verb)
    return cost


def run_verb(folders: list[Path], out: Path, log: Path, verb: str, *words: str) -> Cost:
    """A whole command of a user whose cache is beside the run."""
    line = [sys.executable, "-m", "upcycle", verb, "upit", "--run", str(out), *settings(folders), *words]
    return measured(line, log, out.with_name("cache"))


def run_mergekit(python: Path, folders: list[Path], plan: ExpansionPlan, out: Path, log: Path) -> Cost:
    """A dense model per child along our plan's lineage, then the MoE."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    experts, cost = [str(folder) for folder in folders[1:]], Cost()
    for number, child in enumerate(plan.children):
        models = [
            {"model": experts[parent], "parameters": {"weight": weight, "density": 1 - DROP_RATE}}
            for parent, weight in zip(child.parents, child.weights, strict=True)
        ]
        job = {"merge_method": "dare_linear", "base_model": str(folders[0]), "models": models, "dtype": "bfloat16"}
        experts.append(str(out / f"child-{number}"))
        cost += _mergekit(python, "mergekit-yaml", job, experts[-1], log)
    moe = {
        "base_model": experts[NUM_CHECKPOINTS - 1],
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts": [{"source_model": expert, "positive_prompts": [""]} for expert in experts],
    }
    return cost + _mergekit(python, "mergekit-moe", moe, str(out / "moe"), log)


def _mergekit(python: Path, tool: str, job: dict, out: str, log: Path) -> Cost:
    path = Path(f"{out}.yaml")
    path.write_text(json.dumps(job))  # JSON is YAML
    return measured([str(python.parent / tool), str(path), out], log)


def run_floor(folders: list[Path], moe: Path, scratch: Path, log: Path) -> Cost:
    """`cp` of the bytes that are read, plus `cp` of the bytes that are written."""
    cost = Cost()
    for folder in (*folders, moe):
        shutil.rmtree(scratch, ignore_errors=True)
        cost += measured(["cp", "-r", "--reflink=never", str(folder), str(scratch)], log)
    shutil.rmtree(scratch, ignore_errors=True)
    return cost


def drop_caches(folders: list[Path]) -> None:
    """Put the models out of the page cache, as far as an unprivileged process can."""
    for path in (p for folder in folders for p in folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_caches(folders: list[Path]) -> None:
    for path in (p for folder in folders for p in folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def mergekit_python(given: Path | None, work: Path) -> Path:
    """Python of an environment with mergekit 0.1.5, made if there is none."""
    python = given or work / "mergekit" / "bin" / "python"
    if not python.exists():
        say("installing mergekit 0.1.5 (once)")
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        for requirement in ("torch==2.13.0", "mergekit==0.1.5"):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", requirement], check=True)
    return python


def sides(folders: list[Path], work: Path) -> dict[str, Callable[[], Cost]]:
    """Ours and the floor, by name, in the order in which they run; the floor copies what the functions made."""
    ours, run, log = work / "ours", work / "run", work / "log.txt"
    return {
        RUN: lambda: run_verbs(folders, run, log, (("run", "--until", "assemble"),)),
        VERBS: lambda: run_verbs(folders, run, log, (("prepare",), ("expand",), ("assemble",))),
        FUNCTIONS: lambda: run_ours(folders, ours, log),
        FLOOR: lambda: run_floor(folders, ours, work / "copy", log),
    }


def measure(folders: list[Path], work: Path, repeats: int, cold: bool) -> dict[str, Cost]:
    """The run of median wall time of each side, all sides in turn."""
    found: dict[str, list[Cost]] = {}
    for cache, prepare in (("cold", drop_caches), ("warm", warm_caches)):
        for _ in range(repeats if cold or cache == "warm" else 0):
            for side, run in sides(folders, work).items():
                drop_caches([work / name for name in OUTPUTS])  # the kernel would make room for one side alone
                prepare(folders + [work / "ours"] * (side == FLOOR))
                name = side if cache == "warm" else f"{side}, cold cache"
                found.setdefault(name, []).append(run())
                say(f"{name}: {found[name][-1]}")
    return {name: sorted(costs, key=lambda cost: cost.wall_s)[len(costs) // 2] for name, costs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models: 25 GB")
    parser.add_argument("--mergekit", type=Path, help="python of an environment with mergekit 0.1.5")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours and of the floor; the median is taken")
    parser.add_argument("--cold", action="store_true", help="also with what is read put out of the page cache")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--keep", action="store_true", help=f"keep the figures, and put the table into {PAGE.name}")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=CONFIG[name], help="of the dense model")
    parser.add_argument("--toy", action="store_true", help="as small as can be")
    arguments = parser.parse_args()
    CONFIG.update({name: vars(arguments)[name] for name in CONFIG if name in vars(arguments)})
    CONFIG.update(TOY if arguments.toy else {})
    arguments.work.mkdir(parents=True, exist_ok=True)
    work = arguments.work.absolute()
    folders = make_models(work)
    costs = measure(folders, work, arguments.repeats, arguments.cold)
    if arguments.skip_mergekit:
        say("mergekit is left out")
    else:
        python = mergekit_python(arguments.mergekit, work)
        drop_caches([work / name for name in OUTPUTS])
        warm_caches(folders)
        costs[MERGEKIT] = run_mergekit(python, folders, PLAN.read(work / "ours"), work / "theirs", work / "log.txt")
    found = {**circumstances(), "costs": {name: asdict(cost) for name, cost in costs.items()}}
    write_json(work / "result.json", found)
    say(markdown(found))
    if arguments.keep:
        write_json(KEPT, found)
        write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))


def circumstances() -> dict[str, str]:
    """What was measured, where and when."""
    size = sum(prod(spec.shape) for spec in specs().values())
    return {
        "job": f"{NUM_CHECKPOINTS} to {NUM_EXPERTS} experts of a Llama of {size / 1e6:.0f}M parameters, bf16",
        "machine": machine(),
        "commit": commit(),
        "day": today(),
    }


def machine() -> str:
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{model[1] if model else platform.machine()}, {os.cpu_count()} virtual cores, {memory:.0f} GB"


def commit() -> str:
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=PAGE.parent, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def today() -> str:
    day = date.today()
    return f"{day.day} {day:%B %Y}"


def markdown(found: Mapping[str, Any]) -> str:
    """Costs and ratios, with machine and commit."""
    costs = {name: Cost(**cost) for name, cost in found["costs"].items()}
    lines = [f"{found['job']}; {found['machine']}; commit {found['commit']}, {found['day']}.", ""]
    lines += ["| side | wall s | CPU s | peak anonymous MB |", "| --- | --: | --: | --: |"]
    for name, cost in costs.items():
        memory = "" if name.startswith(FLOOR) else f"{cost.anonymous_mb:.0f}"
        lines.append(f"| {name} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {memory} |")
    lines += ["", "| ratio | found | aim |", "| --- | --: | --: |"]
    for field, above, below, aim in RATIOS:
        if above in costs and below in costs:
            ratio = getattr(costs[above], field) / getattr(costs[below], field)
            lines.append(f"| {NAMES[field]}: {above} over {below} | {ratio:.1f} | {aim} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page with the table made anew from what is kept."""
    made = markdown(json.loads(KEPT.read_text()))
    return BLOCK.sub(lambda block: f"{block[1]}{made}{block[2]}", text)


if __name__ == "__main__":
    main()
