"""Make a small random Qwen3 model with a sentencepiece tokenizer trained on a config's own text.

    rlsd tiny-model CONFIG.yaml OUT_DIR [key=value ...] [--hidden-size 256 ...]

The tokenizer learns from the prompts and supervised targets of the config's first training
source. OUT_DIR is a HF folder (config.json, safetensors, tokenizer) that
``rlsd sft`` can start from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_rlsd.config import Config, load_config
from megatron_rlsd.data import build_sources, train_sentencepiece
from megatron_rlsd.runtime.errors import UserError, tell


def training_texts(config: Config, count: int) -> list[str]:
    """What the student and the teacher will read and write, without chat markers."""
    prompts = config.prompts
    fixed = [prompts.system, prompts.format_instruction]
    fixed += [prompts.hint_introduction, prompts.hint_request]
    texts: list[str] = []
    for problem in build_sources(config.data.train[:1], seed=0).next(count):
        texts += [text for text in fixed if text]
        texts += [m["content"] for m in (*problem.messages, *problem.demonstration)]
        texts.append(
            prompts.sft_response.format(
                reference_solution=problem.reference_solution or "", answer=problem.answer
            )
        )
    return texts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="rlsd tiny-model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=48)
    parser.add_argument("--ffn-size", type=int, default=704)
    parser.add_argument("--max-position", type=int, default=1024)
    parser.add_argument("--problems", type=int, default=2000, help="problems the tokenizer reads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args(argv)
    try:
        make(args)
    except UserError as error:
        return tell(error)
    return 0


def make(args: argparse.Namespace) -> None:
    # Slow to import: --help does without.
    import torch
    import transformers

    config = load_config(args.config, args.overrides)
    tokenizer = train_sentencepiece(
        training_texts(config, args.problems), args.out, args.vocab_size, phrase_pieces=True
    )
    torch.manual_seed(args.seed)
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=tokenizer.vocab_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_dim,
            intermediate_size=args.ffn_size,
            max_position_embeddings=args.max_position,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(args.out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.out}: {parameters:,} parameters, {tokenizer.vocab_size} tokens")
