"""Tokens per second through our client beside SGLang's own benchmark client, on the same server.

SGLang's is ``sglang.benchmark.serving`` in SGLang's environment, asked for the same work: as many
requests at once, token ids in, log-probabilities out, no streaming, the same lengths. Runs
alternate, each pair gives a ratio, and every run starts with an empty prefix cache. The model's
configuration is copied without its end tokens, so that every response has its full length.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import megatron_rlsd.rollout.sglang
from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.rollout.sglang.process import PROJECT_PYTHON
from megatron_rlsd.types import GenerationRequest, SamplingParams

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

CPU_FOLDER = Path(megatron_rlsd.rollout.sglang.__file__).parent / "cpu"
# Without the preparation that its CPU server gets SGLang cannot be imported here, nor without the
# package datasets, which no random prompt needs.
THEIR_CLIENT = f"""
import importlib.util, sys, types
sys.path.insert(0, {str(CPU_FOLDER)!r})
if importlib.util.find_spec("datasets") is None:
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].load_dataset = None
import launch
from sglang.benchmark.serving import cli_main
cli_main()
"""


def without_end(model: Path, folder: Path) -> Path:
    """A folder with the same weights whose responses end at their longest only."""
    folder.mkdir()
    config = json.loads((model / "config.json").read_text()) | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    for file in (*model.glob("*.safetensors"), *(model / name for name in TOKENIZER_FILES)):
        (folder / file.name).symlink_to(file.absolute())
    return folder


def small_model(folder: Path, tokenizer: Path) -> Path:
    """Random weights; so fast that the clients' own time counts."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in TOKENIZER_FILES:
        (folder / name).symlink_to((tokenizer / name).absolute())
    return folder


def ours(engine: SGLangEngine, args: argparse.Namespace, vocab_size: int, seed: int) -> float:
    rng = random.Random(seed)
    params = SamplingParams(args.new_tokens, temperature=1.0)
    requests = [
        GenerationRequest(rng.choices(range(vocab_size), k=args.prompt_tokens), params, index)
        for index in range(args.requests)
    ]
    client = engine.fleet.servers[0].client
    engine.call(client.call("POST", "/flush_cache", timeout=60), 90)
    started = time.perf_counter()
    generations = engine.generate(requests)
    seconds = time.perf_counter() - started
    tokens = sum(len(generation.token_ids) for generation in generations)
    assert tokens == args.requests * args.new_tokens, "a response ended early"
    return tokens / seconds


def theirs(engine: SGLangEngine, args: argparse.Namespace, model: Path, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        command = [str(PROJECT_PYTHON), "-c", THEIR_CLIENT, "--backend", "sglang"]
        command += ["--base-url", engine.fleet.servers[0].url, "--model", str(model)]
        command += ["--dataset-name", "random-ids", "--tokenize-prompt"]
        command += ["--random-input-len", str(args.prompt_tokens)]
        command += ["--random-output-len", str(args.new_tokens), "--random-range-ratio", "1"]
        command += ["--num-prompts", str(args.requests), "--temperature", "1"]
        command += ["--disable-stream", "--return-logprob", "--flush-cache", "--disable-tqdm"]
        command += ["--seed", str(seed), "--output-file", str(out)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=600, check=False
        )
        if ended.returncode or not out.is_file():
            raise RuntimeError(
                f"{' '.join(command)}:\n{ended.stdout[-2000:]}{ended.stderr[-3000:]}"
            )
        result = json.loads(out.read_text().splitlines()[-1])
    tokens = result["total_output_tokens"]
    assert tokens == args.requests * args.new_tokens, f"{tokens} tokens came"
    return float(tokens / result["duration"])


def measure(args: argparse.Namespace, name: str, model: Path, folder: Path) -> None:
    vocab_size = load_hf_config(model)["vocab_size"]
    total = args.requests * (args.prompt_tokens + args.new_tokens)
    engine = SGLangEngine(
        SGLangConfig(
            start_timeout_seconds=300,
            args={"max_total_tokens": 2 * total, "max_running_requests": args.requests},
        ),
        hf_path=model,
        dtype="float32",
        vocab_size=vocab_size,
        max_positions=None,
        run_dir=folder / name,
    )
    try:
        engine.wait_until_ready()
        ours(engine, args, vocab_size, seed=0)
        rows = []
        for pair in range(1, args.pairs + 1):
            # Whoever comes first finds the machine as the other left it: take turns.
            if pair % 2:
                here = ours(engine, args, vocab_size, pair)
                there = theirs(engine, args, model, pair)
            else:
                there = theirs(engine, args, model, pair)
                here = ours(engine, args, vocab_size, pair)
            rows.append((here, there))
    finally:
        engine.close()
    print(f"model          {name}")
    print(
        "pairs          " + ", ".join(f"{a:.0f} / {b:.0f}" for a, b in rows) + "  (ours / theirs)"
    )
    print(f"our client     {statistics.median(a for a, _ in rows):>8.0f} tokens/s, median")
    print(f"SGLang's       {statistics.median(b for _, b in rows):>8.0f} tokens/s, median")
    print(f"ratio          {statistics.median(a / b for a, b in rows):>8.2f}, median", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    print(f"machine        {platform.machine()}, {os.cpu_count()} cores, {platform.platform()}")
    print(f"load           {os.getloadavg()[0]:.2f} before the server started")
    print(
        f"versions       Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, SGLang 0.5.23"
    )
    print(
        f"workload       {args.requests} requests at once, {args.prompt_tokens} prompt tokens, "
        f"{args.new_tokens} new tokens, temperature 1, log-probabilities returned"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = small_model(folder / "small", args.model)
        measure(args, "random 3.2M", small, folder)
        measure(args, args.model.name, without_end(args.model, folder / "large"), folder)


if __name__ == "__main__":
    main()
