"""The dense pre-trained model that everything is made of."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from upcycle.disk import expanded, write_json
from upcycle.errors import UpcycleError
from upcycle.reading import read_json, read_text
from upcycle.types import Config, Tokenizer
from upcycle.weights.folders import (
    GENERATION,
    SETTINGS_FILES,
    TEMPLATE,
    TOKENIZER_FILES,
    copy_files,
    read_config,
    with_end,
)
from upcycle.weights.tokenizers import has_tokenizer, read_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

SPECIAL_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Base:
    """A dense model's folder; its configuration and tokenizer are read when they are first used."""

    folder: Path
    name: str
    """What adapters call it: a hub name as it is, a folder by its whole path."""
    chat_template: str | None = None
    """The Jinja text that replaces the tokenizer's own template, here and in every model folder that is written."""
    last: Path | None = None
    """The checkpoint whose tokenizer, template, special tokens and generation settings the MoE gets, as far as it has
    them (`assemble.shared=last`); None: the base's."""
    layers: tuple[int, ...] | None = None
    """The layers that become sparse (`assemble.layers`); None: all."""

    @cached_property
    def config(self) -> Config:
        """Every field written out, see `read_config`."""
        return read_config(self.folder)

    @property
    def num_moe_layers(self) -> int:
        return int(self.config["num_hidden_layers"]) if self.layers is None else len(self.layers)

    @property
    def words(self) -> Path:
        """The folder whose tokenizer is in force."""
        return self.last if self.last is not None and has_tokenizer(self.last) else self.folder

    @cached_property
    def template(self) -> str | None:
        """The Jinja text that replaces that of the tokenizer in force, which may have none though the base has one."""
        if self.chat_template is not None or self.words == self.folder or read_tokenizer(self.words).chat_template:
            return self.chat_template
        own = read_tokenizer(self.folder).chat_template
        return own if isinstance(own, str) else None

    @property
    def special_ids(self) -> Config:
        """The ids of the end, begin and padding tokens that config.json of the MoE has instead of the base's."""
        if self.last is None or not (self.last / "config.json").is_file():
            return {}
        config = read_config(self.last)
        return {name: config[name] for name in SPECIAL_IDS if config.get(name) is not None}

    @property
    def _generates_as_base(self) -> bool:
        """Whether the settings for generation are the base's: the last checkpoint has none, nor other special ids."""
        if self.last is None or not (self.last / "config.json").is_file():
            return True
        own = self.special_ids
        return not (self.last / GENERATION).is_file() and all(self.config.get(name) == own[name] for name in own)

    def generate_until(self, folder: Path, end: int) -> bool:
        """Let the MoE in a new folder end its texts at a token too (generation_config.json); False if it does."""
        path, config = folder / GENERATION, {**self.config, **self.special_ids}
        given = {name: config[name] for name in SPECIAL_IDS if config.get(name) is not None}
        written = read_json(path) if path.is_file() else given
        before = written.get("eos_token_id", config.get("eos_token_id"))
        if (ends := with_end(before, end)) == before:
            return False
        write_json(path, {**written, "eos_token_id": ends})
        return True

    def write_companions(self, folder: Path) -> None:
        """Put what lies beside a model's weights into the folder of a MoE that is new."""
        copy_files(self.words, folder, TOKENIZER_FILES)
        copy_files(self.folder if self._generates_as_base else self.last or self.folder, folder, SETTINGS_FILES)
        if self.template is not None:
            (folder / TEMPLATE).write_text(self.template)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """With the chat template in force, see `load_tokenizer`."""
        tokenizer = load_tokenizer(self.words, self.template)
        known = self.vocabulary
        for name in ("pad_token", "eos_token"):
            token = getattr(tokenizer, f"{name}_id")
            if token is not None and token >= known:
                raise UpcycleError(
                    f"{self.words}: the tokenizer's {name} {getattr(tokenizer, name)!r} has the id {token}, but the "
                    f"model knows {known} tokens (vocab_size); resize its embeddings, or give the tokenizer a "
                    "different one"
                )
        return tokenizer

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model has embeddings for."""
        return int(self.config["vocab_size"])

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
    path = expanded(name)
    if not path.is_file():
        raise UpcycleError(f"data.chat_template: no file {name} (or use chatml)")
    return read_text(path)


def load_tokenizer(folder: Path, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
        chat_template: Jinja text that replaces its own.

    Raises:
        UpcycleError: it has no template and none is given, it gives no character offsets, or has no token to pad with.
    """
    tokenizer = read_tokenizer(folder)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise UpcycleError(
            f"the tokenizer of {folder} has no chat template; give data.chat_template (upcycle init: --chat-template): "
            "a Jinja file, or chatml"
        )
    if not tokenizer.is_fast:
        raise UpcycleError(f"the tokenizer of {folder} has no fast version, which the answer mask needs")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UpcycleError(
            f"the tokenizer of {folder} has neither a padding nor an end token; name one in tokenizer_config.json "
            "(pad_token or eos_token)"
        )
    return tokenizer
