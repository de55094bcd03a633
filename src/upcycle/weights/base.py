"""The dense pre-trained model that everything is made of."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from upcycle.errors import UpcycleError
from upcycle.reading import read_text
from upcycle.types import Config, Tokenizer
from upcycle.weights.folders import read_config

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Base:
    """A dense model's folder; its configuration and tokenizer are read when they are first used."""

    folder: Path
    name: str
    """What adapters call it: a hub name as it is, a folder by its whole path."""
    chat_template: str | None = None
    """The Jinja text that replaces the tokenizer's own template, here and in every model folder that is written."""

    @cached_property
    def config(self) -> Config:
        """Every field written out, see `read_config`."""
        return read_config(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """With the chat template in force, see `load_tokenizer`."""
        tokenizer = load_tokenizer(self.folder, self.chat_template)
        known = self.config["vocab_size"]
        for name in ("pad_token", "eos_token"):
            token = getattr(tokenizer, f"{name}_id")
            if token is not None and token >= known:
                raise UpcycleError(
                    f"{self.folder}: the tokenizer's {name} {getattr(tokenizer, name)!r} has the id {token}, but the "
                    f"model knows {known} tokens (vocab_size); resize its embeddings, or give the tokenizer another"
                )
        return tokenizer

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def context_length(self) -> int:
        """In tokens."""
        return int(self.config["max_position_embeddings"])


def template_text(name: str) -> str:
    """The Jinja text of a `data.chat_template` setting.

    Raises:
        UpcycleError: no such file.
    """
    if name == "chatml":
        return CHATML
    path = Path(name).expanduser()
    if not path.is_file():
        raise UpcycleError(f"data.chat_template: no file {name} (or use chatml)")
    return read_text(path)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder, as it is.

    Raises:
        UpcycleError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # missing files surface as several kinds
        raise UpcycleError(f"the tokenizer of {folder} cannot be loaded: {error}") from None


def load_tokenizer(folder: Path, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
        chat_template: Jinja text that replaces its own.

    Raises:
        UpcycleError: it has no template and none is given, or it gives no character offsets.
    """
    tokenizer = open_tokenizer(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise UpcycleError(
            f"the tokenizer of {folder} has no chat template; give data.chat_template: a Jinja file, or chatml"
        )
    if not tokenizer.is_fast:
        raise UpcycleError(f"the tokenizer of {folder} has no fast version, which the answer mask needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
