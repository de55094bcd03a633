"""Tokenizers: loaded, and compared by what they do to a text rather than by what their files say."""

from collections.abc import Iterator
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.types import Tokenizer

PROBES = (
    "The quick brown fox doesn't jump over the lazy dog's 3rd fence; it'll re-read CamelCase and snake_case.",
    "  two  spaces,\ttabs\t\tand   \n\n lines \r\n\r\n   end  ",
    "0 7 42 365 1024 31415926535 1,234.56 -7 1e-9 0x1F 2nd \u0663\u0664\u0665 \u00bd x\u00b2",
    "na\u00efve caf\u00e9 e\u0301 \u212bngstr\u00f6m \ufb01 \u0130 \u00df \u017f \uff21",  # also not normalised
    "Привет, мир! Γειά σου שלום مرحبا नमस्ते สวัสดี 你好，世界。こんにちは 안녕하세요",  # noqa: RUF001
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 ∑∫√ → █",
    "def f(x): return {'a': [x**2 != 1, \"b\\n\"]}  # $x_1$ <b>&amp;</b> https://a.b/c?d=e",
    "\u00a0\u200b\ufeff\u2028\x00\x7f",
)
WORDS = 512
"""So many entries of the vocabulary, evenly spread, are a probe too."""
SHOWN = 40
"""Characters of a probe in a message."""
CHAT = (("system", "Be brief."), ("user", " Hi \n"), ("assistant", "Hello."), ("user", "And now?"))
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder as transformers loads it; no code of the folder's runs.

    Raises:
        UpcycleError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # missing files surface as several kinds
        raise UpcycleError(f"the tokenizer of {folder} cannot be loaded: {error}") from None


def other_ids(expected: Tokenizer, found: Tokenizer) -> str | None:
    """The first text that the two turn into other tokens, in words; None if there is none.

    Texts of several scripts, white space, digits and signs, entries of the vocabulary, every added token in a text.
    """
    for text in (*PROBES, _words(expected), *(f"a {token}b" for token in sorted(expected.get_added_vocab()))):
        ids, others = (tokenizer.encode(text, add_special_tokens=False) for tokenizer in (expected, found))
        if ids != others:
            place = next(i for i in range(len(ids) + 1) if ids[i : i + 1] != others[i : i + 1])
            shown = text if len(text) < SHOWN else f"{text[:SHOWN]}..."
            return f"token {place} of {shown!r} is {_at(others, place)}, not {_at(ids, place)}"
    return None


def other_words(expected: Tokenizer, found: Tokenizer) -> Iterator[str]:
    """What else they do otherwise, in words: special and added tokens, what is put around a text, a chat's template."""
    for name in SPECIAL:
        ours, theirs = (getattr(tokenizer, name) for tokenizer in (expected, found))
        if ours != theirs:
            yield f"{name} {theirs!r} ({ours!r} in the base)"
    if added := sorted(found.get_added_vocab().keys() - expected.get_added_vocab().keys()):
        yield f"the added tokens {', '.join(map(repr, added[:3]))}"
    if len({tuple(tokenizer("a").input_ids) for tokenizer in (expected, found)}) > 1:
        yield "the tokens around a text"
    if found.chat_template and len({_rendered(tokenizer) for tokenizer in (expected, found)}) > 1:
        yield "the chat template"


def _words(tokenizer: Tokenizer) -> str:
    ids = range(0, len(tokenizer), max(1, len(tokenizer) // WORDS))
    return " ".join(str(tokenizer.decode([number])) for number in ids)


def _rendered(tokenizer: Tokenizer) -> str:
    """A chat as the template writes it: by its first turns, as templates may refuse a system turn or a later one."""
    turns = [{"role": role, "content": content} for role, content in CHAT]
    texts = []
    for chat in (turns, turns[1:], turns[1:2]):
        try:
            texts.append(str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)))
        except Exception as error:  # jinja2 raises its own and the template's exceptions
            texts.append(type(error).__name__)
    return "\0".join(texts)


def _at(ids: list[int], place: int) -> str:
    return str(ids[place]) if place < len(ids) else "none"
