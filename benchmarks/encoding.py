"""What it costs to encode many chats, against the tokenizer alone on the same text; and to read them a second time.

    python benchmarks/encoding.py --tokenizer MODEL --data DATA_FOLDER --work DIR [--rows 500000]

Rows are those of DATA_FOLDER's `instruct/*.jsonl.gz`, again and again, each time with another first word. CPU seconds
are those of a process and its children. Both sides of each ratio are measured in this one run.
"""

import argparse
import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from upcycle.console import say, table

FULL = """
import sys, threading
from pathlib import Path

most = [0]

def watch():
    while not done.wait(0.05):
        lines = open("/proc/self/status").read().splitlines()
        most[0] = max(most[0], *(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))

done = threading.Event()
threading.Thread(target=watch, daemon=True).start()  # what fails ends the process
from upcycle.data.samples import dataset
from upcycle.data.splits import load_splits
from upcycle.recipe import load_recipe
from upcycle.weights.base import load_tokenizer
recipe = load_recipe("upit", [f"data.train={sys.argv[2]}", "data.max_length=2048"])
splits = load_splits(recipe, load_tokenizer(Path(sys.argv[1]), None), 8192)
rows = dataset(splits.train, ["input_ids", "labels"])
rows[0]
done.set()
print(most[0])
"""
"""As far as a stage comes before it trains."""
ALONE = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
backend = tokenizer.backend_tokenizer
texts = Path(sys.argv[2]).read_text(encoding="utf-8").split("\\0")
spent, tokens = [], 0
for how in (
    lambda some: backend.encode_batch(some, add_special_tokens=False),
    lambda some: tokenizer(some, add_special_tokens=False)["input_ids"],
    lambda some: tokenizer(some, add_special_tokens=False, return_offsets_mapping=True)["input_ids"],
):
    begin = time.process_time()
    for start in range(0, len(texts), 1024):
        tokens += sum(map(len, how(texts[start:start + 1024])))
    spent.append(time.process_time() - begin)
print(len(texts), tokens // len(spent), *spent)
"""
"""The tokenizer's backend, which gives no token ids yet; the tokenizer; and with the offsets that answer masks need."""


def write(data: Path, rows: int, tokenizer: str, work: Path) -> tuple[Path, Path]:
    """The rows as JSONL, and as the texts that the tokenizer sees."""
    from transformers import AutoTokenizer

    jsonl, texts = work / f"rows-{rows}.jsonl", work / f"texts-{rows}.txt"
    if texts.exists():
        return jsonl, texts
    work.mkdir(parents=True, exist_ok=True)
    render = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template
    files = sorted((data / "instruct").glob("*.jsonl.gz"))
    lines = [line for path in files for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]
    found = [json.loads(line) for line in lines if len(line) < 2000]
    with jsonl.open("w", encoding="utf-8") as out, (work / "texts.tmp").open("w", encoding="utf-8") as plain:
        for number, row in enumerate(itertools.islice(itertools.cycle(found), rows)):
            first, *rest = row["messages"]
            messages = [{**first, "content": f"{number // len(found)} {first['content']}"}, *rest]
            out.write(json.dumps({"messages": messages, "domain": row["domain"]}) + "\n")
            plain.write(("\0" if number else "") + render(messages, tokenize=False))
    (work / "texts.tmp").rename(texts)
    return jsonl, texts


def run(code: str, *words: str, threads: int, cache: Path) -> tuple[float, float, list[str]]:
    """Wall and CPU seconds of a process and its children, and what it printed last."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "UPCYCLE_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
    }
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    said = subprocess.check_output([sys.executable, "-c", code, *words], env=environment, text=True)
    wall, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, said.split("\n")[-3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a model folder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=500_000)
    arguments = parser.parse_args()
    work = arguments.work
    jsonl, texts = write(arguments.data, arguments.rows, arguments.tokenizer, work)
    small, _ = write(arguments.data, 2000, arguments.tokenizer, work)
    said = run(ALONE, arguments.tokenizer, str(texts), threads=1, cache=work)[2][-2].split()
    chats, tokens, spent = int(said[0]), int(said[1]), [float(word) for word in said[2:]]
    rows, begun = [], run(FULL, arguments.tokenizer, str(small), threads=1, cache=work / "cache-one")
    for name, file, threads, cache in (
        ("2,000 of them, again", small, 1, "one"),
        ("once, one process", jsonl, 1, "one"),
        ("again", jsonl, 1, "one"),
        ("once, two processes", jsonl, 2, "two"),
    ):
        wall, cpu, last = run(FULL, arguments.tokenizer, str(file), threads=threads, cache=work / f"cache-{cache}")
        begun = (wall, cpu, last) if name.startswith("2,000") else begun
        more = cpu - begun[1]
        rows.append((name, wall, cpu, *(more / alone for alone in spent), int(last[-2]) / 1e6))
    over = ("over the backend", "over the tokenizer", "over the tokenizer with offsets")
    heads = ("encoding", "wall s", "CPU s", *over, "peak anonymous GB")
    alone = ", ".join(f"{seconds:.1f}" for seconds in spent)
    title = (
        f"{chats:,} chats of {tokens / chats:.0f} tokens; CPU s of the three alone {alone}; ratios without the start"
    )
    table(title, heads, [(row[0], *(f"{figure:.2f}" for figure in row[1:])) for row in rows])
    few, once, again, two = (row[1] for row in rows)
    say(f"two processes: {two / once:.2f} of one's wall time; a second time: {again - few:.1f} s more than 2,000 rows")


if __name__ == "__main__":
    main()
