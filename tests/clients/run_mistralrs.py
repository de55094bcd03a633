"""Greedy continuation and log-probabilities from mistral.rs; runs in its environment."""

import mistralrs
from answering import serve


def answer(model: dict) -> dict:
    which = mistralrs.Which.Plain(model_id=model["folder"], dtype=mistralrs.ModelDType.F32)
    runner = mistralrs.Runner(which=which)
    request = mistralrs.ChatCompletionRequest(
        model="default",
        messages=[{"role": "user", "content": model["text"]}],
        max_tokens=model["new_tokens"],
        temperature=0.0,
        logprobs=True,
        top_logprobs=1,
    )
    choice = runner.send_chat_completion_request(request).choices[0]
    content = choice.logprobs.content
    return {"text": "".join(c.token for c in content), "logprobs": [c.logprob for c in content]}


if __name__ == "__main__":
    serve(answer)
