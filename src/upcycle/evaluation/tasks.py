"""Benchmarks from plain JSONL: rows that are checked, and the task of lm-evaluation-harness that asks them.

Three kinds of rows, a file each kind (plain or .gz, the file's name is the task's):

    {"question": "...", "choices": ["...", "..."], "answer": 0, "context": "optional"}     by log-likelihood
    {"prompt": "...", "answer": "..." or ["...", "..."]}                                   by generation, exact match
    {"prompt": "...", "test_list": ["assert ..."], "test_setup_code": "optional"}         by running the generated code

One `_` that stands alone in a question stands for the choice (Winogrande); not that of `Z_3`.
"""

import re
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from upcycle.console import say, warn
from upcycle.data.formats import check_encodable
from upcycle.data.sources import read_jsonl
from upcycle.errors import UpcycleError, counted
from upcycle.evaluation.code import WARNING, passes
from upcycle.reading import brief

Row = dict[str, Any]
NUMBER = re.compile(r"-?[\d,]*\.?\d+")
MATHEMATICS = re.compile(r"[+*/=<>^%]|(?<!\w)-\s*\w|\d\s*[-.:]\s*\d|\b\w-\w\b")
"""Punctuation that makes another answer: `x-1`, `3.5 km`, `1/2`."""
PUNCTUATION = str.maketrans("", "", string.punctuation)
GAP = re.compile(r"(?<!\w)_(?!\w)")
Check = tuple[Callable[[Any], bool], str]
"""What a field must be, and in words."""


def _texts(value: Any, least: int) -> bool:
    return isinstance(value, list) and len(value) >= least and all(isinstance(t, str) and t.strip() for t in value)


TEXT: Check = (lambda value: isinstance(value, str), "a string")
TEXT_IF_ANY: Check = (lambda value: value is None or isinstance(value, str), "a string, or leave it out")
FIELDS: dict[str, dict[str, Check]] = {
    "choice": {
        "question": TEXT,
        "context": TEXT_IF_ANY,
        "choices": (lambda value: _texts(value, 2), "a list of two strings or more, none of them empty"),
        "answer": (lambda value: type(value) is int, "an integer"),
    },
    "answer": {
        "prompt": TEXT,
        "answer": (
            lambda value: _texts(value if isinstance(value, list) else [value], 1),
            "a string or a list of strings, none of them empty",
        ),
    },
    "code": {
        "prompt": TEXT,
        "test_list": (lambda value: _texts(value, 1), "a list of strings, none of them empty"),
        "test_setup_code": TEXT_IF_ANY,
    },
}
LONGEST_ANSWER, LONGEST_PROGRAM = 128, 512
"""Tokens that are generated, if the model can take twice as many."""


def read_tasks(folder: Path, names: Sequence[str] = (), allow_code: bool = False) -> dict[str, dict[str, Any]]:
    """Name of each task file of a folder to its configuration for lm-eval.

    Args:
        names: the tasks wanted; none: all, but those that would run code if that is not allowed.
        allow_code: whether programs that the model wrote may be run.

    Raises:
        UpcycleError: no such folder or task, one that would run code though that is not allowed, or a row that is not
            of one of the three kinds (file, line and field are named).
    """
    files: dict[str, Path] = {}
    if not folder.is_dir():
        raise UpcycleError(f"--task-folder {folder} is no folder; expected one with *.jsonl files, a task each")
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")]):
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if name in files:
            raise UpcycleError(f"{folder} has {files[name].name} and {path.name}; every task needs its own name")
        files[name] = path
    if not files:
        raise UpcycleError(f"--task-folder {folder} has no *.jsonl files; expected a task each")
    if unknown := sorted(set(names) - files.keys()):
        raise UpcycleError(f"{folder} has no task {unknown[0]}; it has {', '.join(files)}")
    try:
        rows = {name: read_rows(path) for name, path in files.items() if not names or name in names}
    except UpcycleError as error:
        raise UpcycleError(f"{error} (if this file is not a task, name the tasks with --tasks)") from None
    running = [name for name in rows if kind_of(rows[name][0]) == "code"]
    if running and allow_code:
        warn(WARNING)
    elif names and running:
        raise UpcycleError(f"{files[running[0]]} runs programs that the model writes; use --allow-code to permit that")
    elif running:
        say(f"{', '.join(running)} left out: they run programs that the model writes; --allow-code permits that")
    return {name: task_of(name, rows[name]) for name in rows if allow_code or name not in running}


def read_rows(path: Path) -> list[Row]:
    """The checked rows of a task file."""
    rows = [check_row(value, where) for value, where in read_jsonl(path)]
    if not rows:
        raise UpcycleError(f"{path} is empty; expected one JSON object per line")
    kept = [row for row in rows if kind_of(row) != "answer" or _one_line(row["answer"])]
    if several := len(rows) - len(kept):
        said = f"{path}: the `answer` of {counted(several, 'row')} has several lines, but the first one is compared"
        if not kept:
            raise UpcycleError(f"{said}; give short answers")
        warn(f"{said}; left out")
    rows = kept
    if len(kinds := {kind_of(row) for row in rows}) > 1:
        raise UpcycleError(f"{path} mixes {' and '.join(sorted(kinds))} rows; use one file for each kind")
    return rows


def _one_line(answer: str | list[str]) -> bool:
    """Whether one of the answers that count is on one line."""
    return any("\n" not in text.strip() for text in ([answer] if isinstance(answer, str) else answer))


def kind_of(row: Row) -> str:
    """choice, code or answer."""
    return "choice" if "choices" in row else "code" if "test_list" in row else "answer"


def check_row(row: Any, where: str) -> Row:
    """A row as it is, if it is of one of the three kinds.

    Raises:
        UpcycleError: names the place, the field, what was found and what was expected.
    """
    if not isinstance(row, dict):
        raise UpcycleError(f"{where} holds {type(row).__name__}, expected an object")
    check_encodable(row, where)
    for field, (fits, expected) in FIELDS[kind_of(row)].items():
        if not fits(row.get(field)):
            raise UpcycleError(f"{where}: `{field}` is {brief(row.get(field))}, expected {expected}")
    if kind_of(row) == "choice" and not 0 <= row["answer"] < (count := len(row["choices"])):
        found = brief(row["answer"])
        raise UpcycleError(f"{where}: `answer` is {found}, expected the index of one of {count} `choices`")
    return row


def task_of(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """lm-eval's configuration of a task: multiple choice, or generation with exact match or with tests."""
    kind = kind_of(rows[0])
    documents = Dataset.from_list([DOCUMENTS[kind](row) for row in rows])
    common = {
        "task": name,
        "custom_dataset": lambda **_: {"test": documents},
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_target": "target",
    }
    if kind == "choice":
        metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
        return {**common, "output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": metrics}
    if kind == "code":
        return {
            **common,
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["[DONE]"], "do_sample": False, "max_gen_toks": LONGEST_PROGRAM},
            "process_results": _run,
            "metric_list": [{"metric": "pass_at_1", "aggregation": "mean", "higher_is_better": True}],
        }
    targets = [target for document in documents for target in document["target"]]
    numeric = all(map(NUMBER.fullmatch, targets))
    picked = {"regex_pattern": NUMBER.pattern, "group_select": -1} if numeric else {"regex_pattern": r"\s*([^\n]*)"}
    return {
        **common,
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": LONGEST_ANSWER},
        "filter_list": [
            {"name": "answer", "filter": [{"function": "regex", **picked}, {"function": "take_first"}]},
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": not numeric and _means_the_same_without_punctuation(targets),
                "regexes_to_ignore": [",", r"\s+$", r"^\s+"],
            }
        ],
    }


def _means_the_same_without_punctuation(targets: Sequence[str]) -> bool:
    """Whether none has signs of mathematics, answers that differ stay different, and none is left empty."""
    if any(map(MATHEMATICS.search, targets)):
        return False
    known = {target.strip().lower() for target in targets}
    bare = {target.translate(PUNCTUATION).strip() for target in known}
    return "" not in bare and len(bare) == len(known)


def _choice_document(row: Row) -> Row:
    context = f"{row['context']}\n" if row.get("context") else ""
    parts = GAP.split(row["question"])
    if len(parts) == 2:
        text, choices = f"{context}{parts[0]}".rstrip(), [f"{choice}{parts[1]}" for choice in row["choices"]]
    else:
        text, choices = f"{context}Question: {row['question']}\nAnswer:", list(row["choices"])
    return {"text": text, "choices": choices, "target": row["answer"]}


def _answer_document(row: Row) -> Row:
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return {"text": row["prompt"], "target": [answer.strip() for answer in answers]}


def _code_document(row: Row) -> Row:
    """The tests are part of the question: they say what the function is called."""
    tests = "\n".join(row["test_list"])
    text = f"{row['prompt']}\nAnswer with Python code that passes these tests:\n{tests}\n"
    return {"text": text, "target": "", "tests": row["test_list"], "setup": row.get("test_setup_code") or ""}


def _run(document: Row, answers: Sequence[str]) -> dict[str, float]:
    return {"pass_at_1": float(passes(answers[0], document["setup"], document["tests"]))}


DOCUMENTS = {"choice": _choice_document, "answer": _answer_document, "code": _code_document}
