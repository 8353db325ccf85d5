"""Tokens per second of the embedded engine beside transformers' generate, one sequence at a time.

Builds a small random Qwen3, so the numbers are about the decoding loop, not about a model. Both
sides run in this process, in float32, on the same prompts, greedily, and must agree on the tokens.
``--sampled`` makes the engine sample from the whole vocabulary instead (the agreement is then not
checked), with ``--samples`` responses per prompt.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, Qwen3Config

from megatron_rlsd.rollout import EmbeddedEngine
from megatron_rlsd.types import GenerationRequest, SamplingParams


def build_model(folder: str, hidden_size: int, num_layers: int, vocab_size: int) -> None:
    config = Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        head_dim=32,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def build_requests(args: argparse.Namespace) -> list[GenerationRequest]:
    rng = random.Random(0)
    params = SamplingParams(args.new_tokens, temperature=1.0 if args.sampled else 0.0)
    requests = []
    for index in range(args.batch_size):
        if index % args.samples == 0:
            length = max(1, args.prompt_tokens + rng.randint(-8, 8))
            prompt = [rng.randrange(args.vocab_size) for _ in range(length)]
        requests.append(GenerationRequest(prompt, params, seed=index))
    return requests


def one_at_a_time(
    model: torch.nn.Module, requests: list[GenerationRequest]
) -> tuple[list[list[int]], float]:
    """Token ids of each response, and tokens per second."""
    responses = []
    start = time.perf_counter()
    for request in requests:
        prompt = torch.tensor([request.prompt_ids])
        output = model.generate(  # type: ignore[operator]
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.params.max_new_tokens,
            do_sample=False,
        )
        responses.append(output[0, prompt.shape[1] :].tolist())
    seconds = time.perf_counter() - start
    return responses, sum(map(len, responses)) / seconds


def batched(
    engine: EmbeddedEngine, requests: list[GenerationRequest]
) -> tuple[list[list[int]], float]:
    start = time.perf_counter()
    generations = engine.generate(requests)
    seconds = time.perf_counter() - start
    responses = [generation.token_ids.tolist() for generation in generations]
    return responses, sum(map(len, responses)) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=1, help="responses per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=40, help="mean; lengths vary by 8")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="of the engine; the median counts")
    parser.add_argument("--reference-requests", type=int, default=8, help="run one at a time")
    parser.add_argument("--sampled", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    requests = build_requests(args)
    with tempfile.TemporaryDirectory() as folder:
        build_model(folder, args.hidden_size, args.layers, args.vocab_size)
        engine = EmbeddedEngine(folder, torch.float32, args.batch_size)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    batched(engine, requests[:2])
    one_at_a_time(model, requests[:1])
    expected, reference_rate = one_at_a_time(model, requests[: args.reference_requests])
    runs = [batched(engine, requests) for _ in range(args.repeats)]
    rate = statistics.median(run_rate for _, run_rate in runs)
    if not args.sampled and runs[0][0][: len(expected)] != expected:
        raise SystemExit("the engine's greedy tokens differ from transformers' generate")

    parameters = sum(p.numel() for p in model.parameters())
    print(f"machine        {platform.machine()}, {cpu_name()}, {args.threads} thread(s)")
    print(
        f"versions       Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    print(
        f"workload       Qwen3 {parameters / 1e6:.1f}M float32, batch {args.batch_size}, "
        f"{args.samples} per prompt, prompts ~{args.prompt_tokens}, {args.new_tokens} new tokens, "
        f"{'sampled' if args.sampled else 'greedy'}"
    )
    print(f"transformers   {reference_rate:9.0f} tokens/s  model.generate, one at a time")
    print(f"embedded       {rate:9.0f} tokens/s  median of {args.repeats}")
    print(f"ratio          {rate / reference_rate:9.1f}")


def cpu_name() -> str:
    """The processor's model name; Linux alone says it in a file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
