"""Tiny real models and data: 2 layers, hidden 32, one token per character."""

import gc
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"

import torch
from jaxtyping import install_import_hook

SOURCE = Path(__file__).parents[1] / "src"
UNCHECKED = {"upcycle.data.generators"}
"""No tensors, and millions of calls: checking each would take minutes."""
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in SOURCE.rglob("*.py") if path.stem != "__init__"
}
# shapes and types of every function are checked whenever a test calls it
install_import_hook(sorted(MODULES - UNCHECKED), "typechecking.check")

CACHE = tempfile.TemporaryDirectory(prefix="upcycle-tests-")
os.environ["UPCYCLE_CACHE"] = CACHE.name

from upcycle.recipe import Recipe, parse_recipe  # noqa: E402
from warm import warm_python  # noqa: E402

gc.unfreeze = lambda: None  # what is at rest stays so: a collection passes over a million objects of libraries
torch.set_num_threads(1)  # tiny models gain nothing from two threads and lose much when another core is busy

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SLOWEST = {"test_benchmarks.py", "test_families.py", "test_processes.py", "test_starting.py", "test_torture.py"}
"""They come first, so that no worker is left alone with one in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in SLOWEST)


@pytest.fixture(scope="module", autouse=True)
def heap_at_rest() -> None:
    gc.collect()
    gc.freeze()


def make_tokenizer(folder: Path) -> None:
    """One token per printable ASCII character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("(.|\n)"), "isolated")
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def make_dense(folder: Path, seed: int = 0, model_type: str = "llama", **changes: Any) -> Path:
    """A dense model with norms that are not 1 and biases that are not 0, saved with its tokenizer."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**settings, **changes}), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(("bias", "alpha_p", "alpha_n")):  # xIELU's are learnt
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


FFNS = (".mlp.", ".feed_forward.", ".shared_mlp.", ".mixer.up_proj.", ".mixer.down_proj.")


def perturbed(base: Path, folder: Path, seed: int, scale: float = 0.05, ffn_only: bool = True) -> Path:
    """A checkpoint of the base: Gaussian noise on the FFN weights, or on all."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in FFNS) or not ffn_only:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    model.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Chats of two domains: copy a word, or spell it backward."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for i in range(count):
            word = "".join(draw.choices("abcdef", k=draw.randint(2, 5))) + str(i)
            domain, answer = (("copy", word), ("reverse", word[::-1]))[i % 2]
            chat = [{"role": "user", "content": f"{domain} {word}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": chat, "domain": domain}) + "\n")
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def checkpoints(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three checkpoints that differ from the base in their FFNs only."""
    return [perturbed(base, tmp_path_factory.mktemp("checkpoints") / f"checkpoint-{i}", i) for i in (1, 2, 3)]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "train.jsonl", 96)


@pytest.fixture
def tiny_recipe(base: Path, rows: Path) -> dict[str, Any]:
    """Plain values of a whole run that takes a few seconds."""
    training = {"epochs": 1, "checkpoint_every": 0.5, "learning_rate": 1e-3, "batch_size": 8, "micro_batch_size": 4}
    return {
        "base": str(base),
        "data": {"train": str(rows), "validation_fraction": 0.1, "max_length": 64},
        "prepare": training,
        "expand": {"num_experts": 4},
        "assemble": {"num_experts_per_tok": 2},
        "route": {"min_samples_per_expert": 3, "epochs": 2, "test_fraction": 0.3, "tokens_per_batch": 256},
        "posttrain": training,
        "evaluate": {"max_answer_tokens": 9},
    }


@pytest.fixture
def recipe(tiny_recipe: dict[str, Any]) -> Recipe:
    return parse_recipe(tiny_recipe, "test")


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Python for children that need what takes seconds to import."""
    if not hasattr(os, "pidfd_open"):  # Linux
        yield Path(sys.executable)
        return
    with warm_python(tmp_path_factory.mktemp("warm")) as program:
        yield program


@pytest.fixture(scope="session")
def isolation() -> None:
    """Skips where the kernel cannot isolate a program: there `passes` refuses, and nothing can be asked."""
    from upcycle.errors import UpcycleError
    from upcycle.evaluation.code import passes

    try:
        passes("", "", [])
    except UpcycleError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of torch. With four experts, one computes them one by one, and two by grouped products."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
