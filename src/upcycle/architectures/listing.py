"""What becomes what, who serves it, what has no twin: the tables of `upcycle families` and of docs/families.md."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from upcycle.architectures.clients import CLIENTS, served
from upcycle.architectures.families import FAMILIES, MOES, WRONG

MODELS = {
    "apertus": ("Apertus",),
    "arcee": ("AFM-4.5B",),
    "cohere": ("Command R",),
    "cohere2": ("Command R7B", "Command A"),
    "cwm": ("CWM",),
    "ernie4_5": ("ERNIE 4.5 0.3B",),
    "exaone4": ("EXAONE 4.0",),
    "falcon": ("Falcon",),
    "gemma": ("Gemma 1",),
    "gemma2": ("Gemma 2",),
    "gemma3_text": ("Gemma 3",),
    "gemma4_text": ("Gemma 4",),
    "glm": ("GLM-4-9B-chat",),
    "glm4": ("GLM-4-0414",),
    "gpt2": ("GPT-2",),
    "gpt_neox": ("Pythia",),
    "granite": ("Granite 3",),
    "granite_swa": ("Granite with windows",),
    "granitemoehybrid": ("Granite 4.0 without experts",),
    "helium": ("Helium 1",),
    "hunyuan_v1_dense": ("Hunyuan 0.5B to 7B",),
    "hyperclovax": ("HyperCLOVA X",),
    "internlm3": ("InternLM3",),
    "jais2": ("Jais 2",),
    "lfm2": ("LFM2",),
    "llama": ("Llama 2 and 3", "SmolLM2", "Falcon 3"),
    "minicpm3": ("MiniCPM3",),
    "ministral": ("Ministral 8B",),
    "ministral3": ("Ministral 3",),
    "mistral": ("Mistral 7B", "Mistral Nemo"),
    "nemotron": ("Nemotron Mini",),
    "nemotron_h": ("Nemotron-H", "Nemotron Nano 2"),
    "olmo": ("OLMo 1",),
    "olmo2": ("OLMo 2",),
    "olmo3": ("OLMo 3",),
    "opt": ("OPT",),
    "phi": ("Phi-1", "Phi-2"),
    "phi3": ("Phi-3", "Phi-3.5-mini", "Phi-4", "Phi-4-mini"),
    "qwen2": ("Qwen2", "Qwen2.5"),
    "qwen3": ("Qwen3",),
    "qwen3_5_text": ("Qwen3.5",),
    "seed_oss": ("Seed-OSS",),
    "smollm3": ("SmolLM3",),
    "stablelm": ("StableLM 2",),
    "starcoder2": ("StarCoder2",),
    "youtu": ("Youtu-LLM",),
}
"""What people call the models, by `model_type`."""
PARTIAL = {"no": "none", "first": "the first", "any": "any"}
ADAPTERS = {"olmo", "gemma2", "exaone4", "glm4", "apertus", "starcoder2", "jais2", "nemotron", "stablelm", "phi"}
"""Without a twin, but every layer has an FFN that LoRA experts know (`experts.structure.problem_of`)."""


@dataclass(frozen=True)
class Table:
    """Words in rows and columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = (self.columns, ["---"] * len(self.columns), *self.rows)
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def listing() -> dict[str, list[dict[str, Any]]]:
    """All of it, for programs."""
    return {
        "families": [
            {
                "dense": family.dense,
                "models": MODELS.get(family.dense, ()),
                "moe": family.moe.model_type,
                "exact_for": family.note,
                "layers_without_experts": PARTIAL[family.moe.partial],
            }
            for family in FAMILIES
        ],
        "programs": [{"moe": moe, **served(moe)} for moe in MOES],
        "without_moe": [
            {
                "dense": dense,
                "models": MODELS.get(dense, ()),
                "reason": reason,
                "instead": "prepare.train=lora" if dense in ADAPTERS else "none",
            }
            for dense, reason in WRONG.items()
        ],
    }


def tables() -> dict[str, Table]:
    """The same to be read, by the names of `listing`."""
    titles = {
        "families": (
            "dense models and the mixture of experts that each becomes, by the model_type of config.json",
            ("dense", "models", "mixture", "exact for", "layers without experts"),
        ),
        "programs": ("programs that serve the mixture, as `make clients` found", ("mixture", *CLIENTS.values())),
        "without_moe": (
            "dense models without an exact mixture (prepare.train=lora: a mixture of LoRA experts on the dense model)",
            ("dense", "models", "reason", "what works"),
        ),
    }
    found = listing()
    return {name: Table(*titles[name], tuple(_words(found[name]))) for name in titles}


def _words(entries: Sequence[dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    for entry in entries:
        yield tuple(cell if isinstance(cell, str) else ", ".join(cell) for cell in entry.values())
