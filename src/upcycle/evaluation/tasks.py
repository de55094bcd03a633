"""Benchmarks from plain JSONL: rows that are checked, and the task of lm-evaluation-harness that asks them.

Two kinds of rows, a file each kind (plain or .gz, the file's name is the task's):

    {"question": "...", "choices": ["...", "..."], "answer": 0, "context": "optional"}     by log-likelihood
    {"prompt": "...", "answer": "..." or ["...", "..."]}                                   by generation, exact match

A `_` in a question stands for the choice (Winogrande).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from upcycle.data.sources import read_jsonl
from upcycle.errors import UpcycleError

Row = dict[str, Any]
NUMBER = re.compile(r"-?[\d,]*\.?\d+")


def read_tasks(folder: Path, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Name of each task file of a folder to its configuration for lm-eval.

    Args:
        names: the tasks wanted; none: all.

    Raises:
        UpcycleError: no such task, or a row that is not of one of the two kinds (file, line and field are named).
    """
    files = {path.name.split(".")[0]: path for path in sorted(folder.glob("*.jsonl*"))}
    if unknown := sorted(set(names) - files.keys()):
        raise UpcycleError(f"{folder} has no task {unknown[0]}; it has {', '.join(files) or 'no *.jsonl files'}")
    return {name: task_of(name, read_rows(path)) for name, path in files.items() if not names or name in names}


def read_rows(path: Path) -> list[Row]:
    """The checked rows of a task file."""
    rows = [check_row(value, where) for value, where in read_jsonl(path)]
    if not rows:
        raise UpcycleError(f"{path} is empty; expected a JSON object a line")
    if len({"choices" in row for row in rows}) > 1:
        raise UpcycleError(f"{path} mixes rows with and without `choices`; make two files of it")
    return rows


def check_row(row: Any, where: str) -> Row:
    """A row as it is, if it is of one of the two kinds.

    Raises:
        UpcycleError: names the place, the field, what was found and what was expected.
    """
    if not isinstance(row, dict):
        raise UpcycleError(f"{where} holds {type(row).__name__}, expected an object")
    fields = {"question": str, "choices": list, "answer": int} if "choices" in row else {"prompt": str}
    for field, kind in fields.items():
        if not isinstance(row.get(field), kind):
            raise UpcycleError(f"{where}: `{field}` is {row.get(field)!r}, expected {kind.__name__}")
    if "choices" in row:
        count = len(row["choices"])
        if count < 2 or not 0 <= row["answer"] < count:
            raise UpcycleError(f"{where}: `answer` is {row['answer']}, expected the index of one of {count} `choices`")
        return row
    answers = row.get("answer") if isinstance(row.get("answer"), list) else [row.get("answer")]
    if not answers or not all(isinstance(answer, str) and answer for answer in answers):
        raise UpcycleError(f"{where}: `answer` is {row.get('answer')!r}, expected a string or a list of strings")
    return row


def task_of(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """lm-eval's configuration of a task: multiple choice, or generation with exact match."""
    choice = "choices" in rows[0]
    documents = Dataset.from_list([_choice_document(row) if choice else _answer_document(row) for row in rows])
    common = {
        "task": name,
        "custom_dataset": lambda **_: {"test": documents},
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_target": "target",
    }
    if choice:
        metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
        return {**common, "output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": metrics}
    numeric = all(NUMBER.fullmatch(target) for document in documents for target in document["target"])
    picked = {"regex_pattern": NUMBER.pattern, "group_select": -1} if numeric else {"regex_pattern": r"\s*([^\n]*)"}
    return {
        **common,
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False},
        "filter_list": [
            {"name": "answer", "filter": [{"function": "regex", **picked}, {"function": "take_first"}]},
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": not numeric,
                "regexes_to_ignore": [",", r"\s+$", r"^\s+"],
            }
        ],
    }


def _choice_document(row: Row) -> Row:
    context = f"{row['context']}\n" if row.get("context") else ""
    before, gap, after = row["question"].partition("_")
    if gap and "_" not in after:
        text, choices = f"{context}{before}".rstrip(), [f"{choice}{after}" for choice in row["choices"]]
    else:
        text, choices = f"{context}Question: {row['question']}\nAnswer:", list(row["choices"])
    return {"text": text, "choices": choices, "target": row["answer"]}


def _answer_document(row: Row) -> Row:
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return {"text": row["prompt"], "target": answers}
