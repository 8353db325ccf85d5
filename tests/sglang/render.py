"""Run by SGLang's Python: the prompts that its chat endpoint makes of conversations.

render.py < {"folders": [...], "conversations": [...]}   ->   last line {"prompts": [[[ids]]]}
"""

import json
import sys
from pathlib import Path

# The preparation of a machine without a GPU, which happens on import.
sys.path.insert(0, str(Path(__file__).parents[2] / "megatron_rlsd/rollout/sglang/cpu"))
import launch  # noqa: F401
from sglang.srt.parser.jinja_template_utils import (
    detect_jinja_template_content_format,
    process_content_for_template_format,
)
from sglang.srt.utils.hf_transformers_utils import get_tokenizer


def prompt(tokenizer, messages):
    form = detect_jinja_template_content_format(tokenizer.chat_template)
    asked = [
        process_content_for_template_format(message, form, [], [], [], []) for message in messages
    ]
    return tokenizer.apply_chat_template(
        asked, tokenize=True, add_generation_prompt=True, return_dict=False
    )


def main() -> None:
    asked = json.load(sys.stdin)
    prompts = []
    for folder in asked["folders"]:
        tokenizer = get_tokenizer(folder)
        prompts.append([prompt(tokenizer, messages) for messages in asked["conversations"]])
    print("\n" + json.dumps({"prompts": prompts}), flush=True)


if __name__ == "__main__":
    main()
