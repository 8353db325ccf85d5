"""Run by vLLM's own Python: greedy responses to prompts of token ids, with log-probabilities.

generate.py HF_DIR < {"prompts": [[ids]], "tokens": n}   ->   last line {"responses": [...]}
"""

import json
import sys

from vllm import LLM, SamplingParams


def main() -> None:
    asked = json.load(sys.stdin)
    llm = LLM(
        sys.argv[1],
        dtype="float32",
        max_model_len=512,
        max_num_seqs=4,
        enforce_eager=True,
        gpu_memory_utilization=0.15,
    )
    params = SamplingParams(temperature=0, max_tokens=asked["tokens"], logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], params)
    responses = [
        {
            "text": each.text,
            "ids": list(each.token_ids),
            "log_probs": [
                found[token].logprob
                for token, found in zip(each.token_ids, each.logprobs, strict=True)
            ],
        }
        for each in (output.outputs[0] for output in outputs)
    ]
    print("\n" + json.dumps({"responses": responses}), flush=True)


if __name__ == "__main__":
    main()
