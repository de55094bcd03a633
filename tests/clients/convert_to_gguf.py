"""llama.cpp's converter on one model: FOLDER OUT CONVERTER.

It knows tokenizers by a hash of what they do to a text; a tiny tokenizer is none that it knows, and the tests give
token ids. So it is told that this one splits like GPT-2's, and not to look for a sentencepiece model first.
"""

import runpy
import sys
from pathlib import Path

folder, out, converter = sys.argv[1:4]
sys.path[:0] = [str(Path(converter).parent), str(Path(converter).parent / "gguf-py")]
sys.argv = [converter, folder, "--outfile", out, "--outtype", "f32"]


from conversion.base import TextModel  # noqa: E402  (llama.cpp's own package)


def no_sentencepiece(self: object) -> None:
    raise FileNotFoundError


TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
TextModel._set_vocab_sentencepiece = no_sentencepiece
runpy.run_path(converter, run_name="__main__")
