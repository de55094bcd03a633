"""Greedy continuation and log-probabilities from llama.cpp; runs in its environment."""

import numpy as np
from answering import serve
from llama_cpp import Llama


def answer(model: dict) -> dict:
    llm = Llama(model["folder"] + ".gguf", n_ctx=128, logits_all=True, verbose=False, n_threads=1)
    tokens, logprobs = [], []
    llm.eval(model["ids"])
    for _ in range(model["new_tokens"]):
        logits = llm.scores[llm.n_tokens - 1].astype(np.float64)
        tokens.append(int(logits.argmax()))
        logprobs.append(float(logits.max() - logits.max() - np.log(np.exp(logits - logits.max()).sum())))
        llm.eval(tokens[-1:])
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    serve(answer)
