"""Load a model folder with vLLM and print what it computes. Runs in vLLM's own environment.

    python generate.py FOLDER '{"prompt": [5, 6, 7], "tokens": 12}'

Prints {"tokens": greedy continuation, "prompt_logprobs": of each prompt token but the first}.
"""

import json
import os
import sys
from typing import Any

# vLLM reads its environment when it is imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
# On CPUs with AMX, vLLM would round the inputs of int4 layers to int8: a speed-up of its own that
# the artifact does not ask for.
os.environ["VLLM_CPU_INT4_W4A8"] = "0"


def main(folder: str, prompt: list[int], tokens: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt  # type: ignore[import-not-found]

    llm = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=256)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, prompt_logprobs=0)
    [answer] = llm.generate(TokensPrompt(prompt_token_ids=prompt), params)
    logprobs = [
        row[token].logprob
        for token, row in zip(prompt[1:], answer.prompt_logprobs[1:], strict=True)
    ]
    return {"tokens": list(answer.outputs[0].token_ids), "prompt_logprobs": logprobs}


if __name__ == "__main__":  # engine processes import this file again
    # vLLM's processes and libraries log to standard output: keep it for the answer alone
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(main(sys.argv[1], **json.loads(sys.argv[2])), answer)
    answer.close()
