"""Run by vLLM's Python: the prompts that it makes of conversations.

render.py < {"folders": [...], "conversations": [...]}   ->   last line {"prompts": [[[ids]]]}
"""

import json
import sys

from vllm.tokenizers import get_tokenizer


def main() -> None:
    asked = json.load(sys.stdin)
    prompts = []
    for folder in asked["folders"]:
        tokenizer = get_tokenizer(folder)
        prompts.append(
            [
                tokenizer.apply_chat_template(
                    messages, tokenize=True, add_generation_prompt=True, return_dict=False
                )
                for messages in asked["conversations"]
            ]
        )
    print("\n" + json.dumps({"prompts": prompts}), flush=True)


if __name__ == "__main__":
    main()
