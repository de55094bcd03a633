"""Greedy continuation and log-probabilities from vLLM on the CPU; runs in its environment."""

import os

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)
from answering import serve
from vllm import LLM, SamplingParams


def answer(model: dict) -> dict:
    llm = LLM(model["folder"], dtype="float32", enforce_eager=True, max_model_len=128, disable_log_stats=True)
    greedy = SamplingParams(temperature=0.0, max_tokens=model["new_tokens"], logprobs=1, ignore_eos=True)
    output = llm.generate([{"prompt_token_ids": model["ids"]}], greedy, use_tqdm=False)[0].outputs[0]
    tokens = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    serve(answer)
