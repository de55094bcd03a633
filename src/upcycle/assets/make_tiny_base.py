"""Make the bundled base model: a tokenizer of single bytes and a small Llama trained on statements only.

    python -m upcycle.assets.make_tiny_base --out DIR --steps 4000

The model never sees a question, a role or a chat. It is trained from scratch on the CPU, and the same
arguments give the same weights on the same machine with the same number of threads.
"""

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from upcycle.data.generators import pretraining_statements

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
# A role and its line break are one token, so that a turn costs three tokens besides its text.
ROLES = ("system\n", "user\n", "assistant\n")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CONTEXT = 256
ANSWER_WEIGHT = 10.0
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
WARMUP = 0.03  # of the whole run
FINAL_LR = 0.02  # of the peak
REPORT_EVERY = 100


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes are the tokens, so that any text survives and digits and letters stand alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (START, END, PAD)])
    tokenizer.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)  # Hugging Face's initialization takes no generator
    config = LlamaConfig(
        **SIZES,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.05,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


Batch = tuple[Tensor, Tensor]  # token ids and loss weights, both [batch, longest]


def batches(tokenizer: PreTrainedTokenizerFast, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield padded rows of one statement between the start and the end token, without end.

    The words before an answer are mostly random operands, so the answer carries most of the loss: without that
    so small a budget teaches the model no skill.
    """
    statements = pretraining_statements(seed)
    while True:
        rows = [_encode(tokenizer, *next(statements)) for _ in range(batch_size)]
        ids = pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
        yield ids, pad_sequence([weights for _, weights in rows], batch_first=True)


def _encode(tokenizer: PreTrainedTokenizerFast, stem: str, answer: str) -> Batch:
    before, after = tokenizer.encode(START + stem), tokenizer.encode(answer + END)
    return torch.tensor(before + after), torch.tensor([1.0] * len(before) + [ANSWER_WEIGHT] * len(after))


def lr_factor(progress: float) -> float:
    """Linear warm-up, then a cosine; `progress` is the part of the run that is done."""
    if progress < WARMUP:
        return progress / WARMUP
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP)))
    return FINAL_LR + (1 - FINAL_LR) * cosine


def train(model: LlamaForCausalLM, data: Iterator[Batch], args: argparse.Namespace) -> None:
    """Train until `args.steps`, or for `args.minutes` if those are given."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        # Half a step ahead, so that the first step is not lost to a rate of zero.
        optimizer.param_groups[0]["lr"] = args.lr * lr_factor(progress + 0.5 / args.steps)
        loss = _step(model, optimizer, *next(data))
        step += 1
        elapsed = time.monotonic() - started
        progress = elapsed / (60 * args.minutes) if args.minutes else step / args.steps
        if step % REPORT_EVERY == 0 or progress >= 1:
            print(f"step {step:5d}  {progress:4.0%}  loss {loss:.3f}  {elapsed:5.0f} s", flush=True)


def _step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor, weights: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits
    token_loss = cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    loss = (token_loss * weights[:, 1:]).sum() / weights[:, 1:].sum()
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def reset_unseen_embeddings(model: LlamaForCausalLM, seen: Tensor, seed: int) -> None:
    """Draw the rows of tokens that no document has from the distribution of those that occur.

    Training only pushes an unseen row away from every hidden state, which would make the chat markers alike.
    """
    rows = model.get_input_embeddings().weight
    mean, std = rows[seen].mean(dim=0), rows[seen].std(dim=0)
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    rows[~seen] = (mean + std * noise)[~seen]


def seen_tokens(tokenizer: PreTrainedTokenizerFast, seed: int) -> Tensor:
    seen = torch.zeros(len(tokenizer), dtype=torch.bool)
    for ids, weights in itertools.islice(batches(tokenizer, 100, seed), 50):
        seen[ids[weights > 0]] = True
    return seen


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled base model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=0.0, help="stop by the clock (not reproducible)")
    parser.add_argument("--batch-size", type=int, default=40, help="statements a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed)
    print(f"{model.num_parameters():,} parameters")
    train(model, batches(tokenizer, args.batch_size, args.seed), args)
    reset_unseen_embeddings(model, seen_tokens(tokenizer, args.seed), args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
