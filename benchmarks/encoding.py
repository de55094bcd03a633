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
import os, resource, sys, time
begin = time.monotonic()
from pathlib import Path
from upcycle.data.splits import load_splits
from upcycle.recipe import load_recipe
from upcycle.weights.base import load_tokenizer
started = time.monotonic()
recipe = load_recipe("upit", [f"data.train={sys.argv[2]}", "data.max_length=2048"])
splits = load_splits(recipe, load_tokenizer(Path(sys.argv[1]), None), 8192)
from upcycle.data.samples import dataset
rows = dataset(splits.train, ["input_ids", "labels"])
first = rows[0]
print(len(rows), time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
anonymous = [line for line in open("/proc/self/status") if line.startswith("RssAnon")][0].split()[1]
print(anonymous)
"""
ALONE = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]).backend_tokenizer
texts = Path(sys.argv[2]).read_text(encoding="utf-8").split("\\0")
tokens = 0
begin = time.process_time()
for start in range(0, len(texts), 1024):
    tokens += sum(map(len, tokenizer.encode_batch(texts[start:start + 1024], add_special_tokens=False)))
print(len(texts), tokens, time.process_time() - begin)
"""


def write(data: Path, rows: int, tokenizer: str, work: Path) -> tuple[Path, Path]:
    """The rows as JSONL, and as the texts that the tokenizer sees."""
    from transformers import AutoTokenizer

    jsonl, texts = work / f"rows-{rows}.jsonl", work / f"texts-{rows}.txt"
    if texts.exists():
        return jsonl, texts
    work.mkdir(parents=True, exist_ok=True)
    render = AutoTokenizer.from_pretrained(tokenizer).apply_chat_template
    files = sorted((data / "instruct").glob("*.jsonl.gz"))
    lines = [line for path in files for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
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
    alone = run(ALONE, arguments.tokenizer, str(texts), threads=1, cache=work)[2][-2].split()
    rows = []
    for name, file, threads, cache in (
        ("once, one process", jsonl, 1, "one"),
        ("again", jsonl, 1, "one"),
        ("once, two processes", jsonl, 2, "two"),
        ("2,000 rows, again", small, 1, "one"),
    ):
        if name.startswith("2,000"):
            run(FULL, arguments.tokenizer, str(file), threads=threads, cache=work / f"cache-{cache}")
        wall, cpu, said = run(FULL, arguments.tokenizer, str(file), threads=threads, cache=work / f"cache-{cache}")
        rows.append((name, f"{wall:.1f}", f"{cpu:.1f}", f"{cpu / float(alone[2]):.2f}", f"{int(said[-2]) / 1e6:.2f}"))
    heads = ("encoding", "wall s", "CPU s", "CPU over the tokenizer alone", "anonymous GB at the end")
    tokens = int(alone[1]) / int(alone[0])
    table(
        f"{int(alone[0]):,} chats of {tokens:.0f} tokens; the tokenizer alone: {float(alone[2]):.1f} CPU s", heads, rows
    )
    say(f"two processes: {float(rows[2][1]) / float(rows[0][1]):.2f} of one's wall time")


if __name__ == "__main__":
    main()
