"""Programs of others load an assembled MoE of each family and say what transformers says.

`make clients` installs them and runs these; what is not installed is skipped with the reason. Weights are random and
large enough for the router and the experts to matter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from setup_clients import ROOT
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import TEMPLATE, make_dense, perturbed
from upcycle.architectures.clients import CLIENTS, UNTRIED, limits
from upcycle.experts.kinds import load_model
from upcycle.weights.folders import copy_companions
from worlds import assembled

pytestmark = pytest.mark.clients
HERE = Path(__file__).parent
TEXT, NEW_TOKENS = "Spell the word upcycle backward, then add 2 and 3.", 12
MIXED = ["sliding_attention", "full_attention"]
LONG = {"max_position_embeddings": 1024}
"""mistral.rs has a cache of 543 tokens for some."""
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
PARTIAL_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}
PADDED = {"vocab_size": 296}
"""As llama.cpp's converter pads the tokens of some."""
GEMMA4 = {
    "head_dim": 32,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "sliding_window": 16,
    "layer_types": MIXED,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
GRANITE_4 = {
    **GRANITE,
    **PADDED,
    "num_local_experts": 0,
    "shared_intermediate_size": 128,
    "position_embedding_type": "rope",
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_expand": 2,
}


def longrope(pairs: int) -> dict[str, Any]:
    """Of heads with so many pairs of rotated channels."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "long_factor": [1.5 + 0.1 * i for i in range(pairs)],
        "short_factor": [1.0 + 0.02 * i for i in range(pairs)],
    }


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama -> mixtral": ("llama", {}),
    "mistral with a window -> mixtral": ("mistral", {"sliding_window": 16}),
    "phi3 -> mixtral": ("phi3", {}),
    "qwen2 -> qwen2_moe": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2, tied -> qwen2_moe": ("qwen2", {}),
    "qwen3 -> qwen3_moe": ("qwen3", {"head_dim": 32}),
    "olmo2 -> flex_olmo": ("olmo2", {}),
    "granite -> granitemoe": (
        "granite",
        GRANITE,
    ),
    "llama with biases -> granitemoe": ("llama", {"attention_bias": True}),
    "ministral, mixed windows, in some layers -> qwen2_moe": (
        "ministral",
        {"sliding_window": 16, "layer_types": MIXED, "head_dim": 32},
    ),
    "ministral, mixed windows -> granitemoe_swa": (
        "ministral",
        {"sliding_window": 16, "layer_types": MIXED, "head_dim": 32},
    ),
    "smollm3 with NoPE -> granitemoe_swa": ("smollm3", {"no_rope_layers": [1, 0]}),
    "smollm3 with NoPE and windows -> granitemoe_swa": (
        "smollm3",
        {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 16},
    ),
    "internlm3 -> mixtral": ("internlm3", {"head_dim": 64}),
    "phi3 with longrope -> mixtral": (
        "phi3",
        {"rope_parameters": longrope(16), "original_max_position_embeddings": 32},
    ),
    "phi3 with partial rotary -> glm4_moe": ("phi3", {**PARTIAL_ROTARY, "tie_word_embeddings": False}),
    "phi3 with partial rotary, tied -> glm4_moe": ("phi3", PARTIAL_ROTARY),
    "seed_oss -> qwen2_moe": ("seed_oss", {"head_dim": 32, "tie_word_embeddings": False, **NO_DROPOUT}),
    "ernie4_5 -> ernie4_5_moe": ("ernie4_5", {"head_dim": 32}),
    "cohere2, mixed windows -> cohere2_moe": ("cohere2", {"sliding_window": 16, "layer_types": MIXED}),
    "cohere2, windows longer than the text -> cohere2_moe": ("cohere2", {"sliding_window": 128}),
    "cohere -> cohere2_moe": ("cohere", {}),
    "qwen3, mixed windows, untied -> mellum": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "layer_types": MIXED,
            "head_dim": 32,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3, mixed windows -> mellum": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": MIXED, "head_dim": 32},
    ),
    "qwen3_5 -> qwen3_5_moe_text": (
        "qwen3_5_text",
        {
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
    ),
    "granite 4 -> granitemoe": ("granitemoehybrid", {**GRANITE_4, "layer_types": ["full_attention"] * 2}),
    "granite 4 with mamba -> granitemoehybrid": (
        "granitemoehybrid",
        {**GRANITE_4, **LONG, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "hyperclovax -> granitemoe": ("hyperclovax", {**GRANITE, "use_post_norm": False}),
    "llama with GELU -> mixtral": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "arcee -> mixtral": ("arcee", {}),
    "helium -> mixtral": ("helium", {"head_dim": 32}),
    "glm -> glm4_moe": ("glm", {"head_dim": 32, **PARTIAL_ROTARY}),
    "gemma -> granitemoe": ("gemma", {"head_dim": 32}),
    "gemma4 -> gemma4_text": ("gemma4_text", GEMMA4),
    "hunyuan -> hunyuan_v1_moe": ("hunyuan_v1_dense", {"head_dim": 32}),
    "youtu -> deepseek_v3": ("youtu", {**MLA, "tie_word_embeddings": False}),
    "youtu, tied -> deepseek_v3": ("youtu", MLA),
    "lfm2 -> lfm2_moe": (
        "lfm2",
        {
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
            **LONG,
        },
    ),
    "nemotron_h -> nemotron_h": (
        "nemotron_h",
        {
            **PADDED,
            "num_hidden_layers": 4,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
            "head_dim": 32,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "llama in slices -> mixtral": ("llama", {}),
    "qwen3 in slices -> qwen3_moe": ("qwen3", {"head_dim": 32}),
    "granite in slices -> granitemoe": ("granite", {"attention_multiplier": 0.3}),
    "llama in some layers -> qwen2_moe": ("llama", {"tie_word_embeddings": False}),
    "qwen3 in some layers -> qwen3_moe": ("qwen3", {"head_dim": 32}),
}
CHOICES: dict[str, dict[str, Any]] = {
    "slices": {"granularity": 4, "num_experts_per_tok": 2},  # top-1 flips at the rounding of a client in fp16
    "some layers": {"layers": [1]},
}
"""Words of a family's name to settings of assembly."""
TOLERANCE = {"mistralrs": 2e-2, "llamacpp": 5e-2, "vllm": 2e-3}
"""Of a log-probability, absolute."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of each family: the folder, the prompt's tokens, and what transformers goes on with."""
    chosen = {name: [how for words, how in CHOICES.items() if words in name] for name in FAMILIES}
    return {name: made(tmp_path_factory.mktemp("moe"), *case, *chosen[name]) for name, case in FAMILIES.items()}


def made(folder: Path, dense: str, changes: dict[str, Any], how: dict[str, Any] | None = None) -> dict[str, Any]:
    make_bpe_tokenizer(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }
    base = make_dense(folder / "base", model_type=dense, **{**shape, **changes})
    copy_companions(folder / "tokenizer", base)
    checkpoints = [perturbed(base, folder / f"c{i}", i) for i in range(4)]
    moe = assembled(base, checkpoints, folder / "moe", router_std=0.5, **(how or {}))
    messages = [{"role": "user", "content": TEXT}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return {"folder": str(moe), "text": TEXT, "ids": chat, "new_tokens": NEW_TOKENS, **greedy(moe, chat, tokenizer)}


def make_bpe_tokenizer(folder: Path) -> None:
    """Byte-level BPE like GPT-2's, which every client can read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=special[0], eos_token=special[2])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def greedy(moe: Path, ids: list[int], tokenizer: Any) -> dict[str, Any]:
    model, tokens, logprobs = load_model(moe, torch.float32), list(ids), []
    for _ in range(NEW_TOKENS):
        scores = model(torch.tensor([tokens])).logits[0, -1].log_softmax(dim=-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    new = tokens[len(ids) :]
    return {"tokens": new, "logprobs": logprobs, "pieces": [tokenizer.decode([token]) for token in new]}


def ask(client: str, world: dict[str, Any], folder: Path) -> dict[str, Any]:
    environment = ROOT / client
    if not (environment / ".ready").exists():
        reason = ROOT / f"{client}.failed"
        pytest.skip(f"{client}: {reason.read_text() if reason.exists() else 'not installed, see `make clients`'}")
    request = folder / "request.json"
    request.write_text(json.dumps(world))
    command = [str(environment / "bin" / "python"), str(HERE / f"run_{client}.py"), str(request)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1500
    )
    answers = [line.removeprefix("ANSWER") for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    if not answers and len(world) == 1:  # it stopped, as llama.cpp does
        return {name: {"error": (done.stderr.strip().splitlines() or ["nothing said"])[-1]} for name in world}
    assert answers, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(answers[-1])
    return found


def to_gguf(world: dict[str, Any]) -> None:
    converter = ROOT / "llamacpp" / "llama.cpp" / "convert_hf_to_gguf.py"
    for model in world.values():
        out = f"{model['folder']}.gguf"
        command = [sys.executable, str(HERE / "convert_to_gguf.py"), model["folder"], out, str(converter)]
        subprocess.run(command, capture_output=True, check=False)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_says_what_transformers_says(client: str, world: dict[str, Any], tmp_path: Path) -> None:
    if client == "llamacpp" and (ROOT / client / ".ready").exists():
        to_gguf(world)
    alone = [{name: model} for name, model in world.items()] if client == "llamacpp" else [world]
    found, problems = {name: answer for part in alone for name, answer in ask(client, part, tmp_path).items()}, {}
    for name, answer in found.items():
        verdict = compare(answer, world[name], TOLERANCE[client])
        print(f"{client:10} {name:34} {verdict}")
        config = json.loads((Path(world[name]["folder"]) / "config.json").read_text())
        assert config["model_type"] == name.split(" -> ")[1]
        known = any(limit.client == client for limit in limits(config))
        untried = any(limit.client == client for limit in limits(config, UNTRIED))
        if not untried and known == verdict.startswith("equal"):
            problems[name] = f"{verdict} (architectures.clients says {'otherwise' if known else 'yes'})"
    assert not problems


def compare(answer: dict[str, Any], expected: dict[str, Any], tolerance: float) -> str:
    """`equal` with the largest difference of a log-probability, or what is wrong."""
    if "error" in answer:
        return str(answer["error"])
    if answer.get("tokens", expected["tokens"]) != expected["tokens"]:
        return f"other tokens: {answer['tokens']}, expected {expected['tokens']}"
    pairs = list(zip(answer["logprobs"], expected["logprobs"], strict=False))
    difference = max(abs(a - b) for a, b in pairs)
    if len(pairs) < 2 or difference > tolerance:
        return f"log-probabilities differ by {difference:.1e} over {len(pairs)} tokens"
    if "text" in answer and not "".join(expected["pieces"]).startswith(answer["text"][:-1]):
        return f"other text: {answer['text']!r}, expected {''.join(expected['pieces'])!r}"
    return f"equal, log-probabilities within {difference:.1e}"


def test_mergekits_kernels_agree_where_the_definitions_do(tmp_path: Path) -> None:
    """linear, slerp, TIES (normalised) and dare_ties without dropping, by mergekit's own functions."""
    from safetensors.torch import load_file, save_file

    environment = ROOT / "mergekit"
    if not (environment / ".ready").exists():
        pytest.skip("mergekit: not installed, see `make clients`")
    from upcycle.merging.lineage import Child, materialise
    from upcycle.merging.linear import slerp

    generator = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(4000, generator=generator) for _ in range(3))
    save_file({"base": base, "a": a, "b": b}, tmp_path / "in.safetensors")
    script, out = HERE / "run_mergekit.py", tmp_path / "out.safetensors"
    subprocess.run([str(environment / "bin" / "python"), str(script), str(tmp_path), str(out)], check=True)
    theirs = load_file(out)
    ours = {
        merge: next(materialise(base, [a, b], [Child((0, 1), (0.3, 0.7))], merge, drop_rate, 0, "w"))
        for merge, drop_rate in (("linear", 0.0), ("ties", 0.6), ("dare_ties", 0.0))
    }
    ours["slerp"] = base + slerp(a - base, b - base, 0.7)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
