"""Testbeds of real text: a small base model made here, and the rows that it is tuned on and scored with.

    python benchmarks/testbeds.py capacity --data DATA_FOLDER --out runs/testbeds          # some seconds
    python benchmarks/testbeds.py middle --data DATA_FOLDER --out runs/testbeds
    python benchmarks/testbeds.py smollm2 --data DATA_FOLDER --out runs/testbeds           # rows alone
    python benchmarks/testbeds.py smollm2-full --data DATA_FOLDER --out runs/testbeds      # rows alone, for a GPU
    python benchmarks/testbeds.py middle --base --data DATA_FOLDER --out FOLDER            # its base too: half an hour
    python benchmarks/testbeds.py toy --data DATA_FOLDER --out FOLDER                      # as small as can be

DATA_FOLDER has `instruct/*.jsonl.gz`. Short rows of one question and one answer are split by the hash of the question
into training, validation and search (learning rates are chosen on those alone); the base is pre-trained on the text of
the longer rows. `capacity` is short of capacity: 20 training tokens and more for each parameter in four epochs of half
the rows. `middle` is a larger model with few tokens for it: a quarter of one for each parameter in two epochs of a
quarter of the rows. The weights of both are in this folder, since another machine's rounding would make another base;
the rows are not. `smollm2` and `smollm2-full` are for SmolLM2-135M-Instruct: put it, or a link to it, at
runs/testbeds/smollm2/base.
"""

import argparse
import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BLOCK = 128
"""Tokens of a pre-training sample."""
SPLITS = {"validation": 0.09, "search": 0.05}
"""Shares of the short rows; the rest is for training."""


@dataclass(frozen=True)
class Testbed:
    """A base model, and how long a row may be that it is tuned on."""

    vocabulary: int
    shape: dict[str, int]
    longest: int
    """Characters of question and answer; longer rows are for pre-training."""
    pretraining_tokens: int
    learning_rate: float


TESTBEDS = {
    "capacity": Testbed(
        512,
        {"hidden_size": 48, "intermediate_size": 144, "num_hidden_layers": 3, "num_attention_heads": 2},
        longest=330,
        pretraining_tokens=3_000_000,
        learning_rate=3e-3,
    ),
    "middle": Testbed(
        2048,
        {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 3},
        longest=400,
        pretraining_tokens=6_000_000,
        learning_rate=2e-3,
    ),
}
TESTBEDS["toy"] = replace(TESTBEDS["capacity"], vocabulary=300, pretraining_tokens=32 * BLOCK)
SHORTEST = 40
"""Characters of an answer, so that it says something."""
ROWS_ALONE = {"smollm2": (400, SHORTEST), "smollm2-full": (100_000, 1)}
"""Testbeds whose base is made elsewhere: how long their rows may be, and how short an answer."""


def read_rows(data: Path) -> Iterator[dict[str, Any]]:
    """Rows of one question and one answer in ASCII."""
    for path in sorted((data / "instruct").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = (json.loads(line) for line in lines)
            yield from (row for row in rows if len(row["messages"]) == 2 and _text(row).isascii())


def _text(row: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in row["messages"])


def split_of(row: dict[str, Any], longest: int, shortest: int) -> str | None:
    """Where a row goes: training, validation, search; None: its text is for pre-training."""
    question, answer = (message["content"] for message in row["messages"])
    if len(question) + len(answer) >= longest or len(answer) < shortest:
        return None
    place = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return "train"


def write_rows(rows: list[dict[str, Any]], longest: int, shortest: int, out: Path) -> list[str]:
    """Write the splits, and give the texts for pre-training: none has the question of a split's row."""
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in ("train", *SPLITS)}
    others = []
    for row in rows:
        name = split_of(row, longest, shortest)
        (others if name is None else splits[name]).append(row)
    for name, chosen in splits.items():
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({key: row[key] for key in ("messages", "domain")}) + "\n" for row in chosen)
        print(f"{name}: {len(chosen)} rows, {dict(Counter(row['domain'] for row in chosen))}")
    asked = {row["messages"][0]["content"] for chosen in splits.values() for row in chosen}
    return [_text(row)[:1500] for row in others if row["messages"][0]["content"] not in asked]


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a plain chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, START, END]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, chat_template=TEMPLATE, model_max_length=512
    )


def pretrain(testbed: Testbed, tokenizer: PreTrainedTokenizerFast, texts: list[str], out: Path) -> LlamaForCausalLM:
    """A Llama from scratch on blocks of the texts, each seen at most a few times."""
    ids = [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.pad_token_id]]
    blocks = [ids[i : i + BLOCK] for i in range(0, len(ids) - BLOCK, BLOCK)]
    config = LlamaConfig(
        **testbed.shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {len(ids):,} tokens of text")
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=testbed.pretraining_tokens // (32 * BLOCK),
        per_device_train_batch_size=32,
        learning_rate=testbed.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.05,
        adam_beta2=0.95,
        logging_steps=100,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": blocks, "labels": blocks})).train()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("testbed", choices=[*TESTBEDS, *ROWS_ALONE])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", action="store_true", help="train the base anew even if its weights are here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    testbed, out = TESTBEDS.get(arguments.testbed), arguments.out / arguments.testbed
    out.mkdir(parents=True, exist_ok=True)
    rows = list(read_rows(arguments.data))
    random.Random(0).shuffle(rows)
    lengths = (testbed.longest, SHORTEST) if testbed else ROWS_ALONE[arguments.testbed]
    texts = write_rows(rows, *lengths, out)
    if testbed is None:
        return
    kept = Path(__file__).parent / "testbeds" / arguments.testbed
    if kept.is_dir() and not arguments.base:
        print(f"the base is {kept}")
        return
    tokenizer = make_tokenizer(texts[:6000], testbed.vocabulary)
    model = pretrain(testbed, tokenizer, texts, out)
    model.bfloat16().float().save_pretrained(out / "base")  # rounded, so that git packs the file to half
    tokenizer.save_pretrained(out / "base")


if __name__ == "__main__":
    main()
