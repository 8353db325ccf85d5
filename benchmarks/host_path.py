"""Microseconds and bytes a token from a server's answer to packed micro-batches.

Each size runs in a process of its own. Answers have the form in which SGLang 0.5.23 sends them:
compact JSON, [log-probability, id, null] a token, float32 log-probabilities written as doubles.
Times are CPU seconds of the one thread that works. ``json.loads`` reads the same bodies in between,
so that both meet the same machine. Memory is what stays resident of the process beyond what it had
before the first answer; a body is dropped when it has been read, as in a run.

    python -m benchmarks.host_path --tokens 1M 4M --out results.json
    python -m benchmarks.host_path --tokens 4M --ranks 4     # rows sent over gloo on this machine

The text of a response is decoded by the tokenizer before it is rewarded: with ``--tokenizer`` that
is measured too, and is in no sum.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.results_file import ResultsFile
from megatron_rlsd.actor.balance import PackShape, plan_micro_batches
from megatron_rlsd.actor.packing import build_micro_batch, response_offsets
from megatron_rlsd.config import TokenizerConfig
from megatron_rlsd.data.tokenizers import load_tokenizer
from megatron_rlsd.experience.batch import train_batch
from megatron_rlsd.learner.scoring import student_sequence
from megatron_rlsd.parallel.row_sharing import share_outlines, share_rows
from megatron_rlsd.parallel.train_batches import train_batch_of, train_batch_tensors
from megatron_rlsd.rollout.sglang.replies import parse_generation, read_response
from megatron_rlsd.types import (
    Generation,
    GenerationRequest,
    Group,
    Problem,
    RewardInput,
    SamplingParams,
    TrainBatch,
    TrainRow,
    Trajectory,
)

CPU = torch.device("cpu")
RID, VOCAB = "0123456789ab-0-0.", 151_936
PROMPT, SAMPLES, MAX_PACK = 512, 16, 32_768
DIFFERENT_BODIES = 32
TO_BATCH = ("parse", "check", "hand over", "pack", "unpack")
MALLOC = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


def body_of(rng: random.Random, length: int) -> bytes:
    """An answer of ``length`` tokens as SGLang writes it."""
    ids = [rng.randrange(VOCAB) for _ in range(length)]
    # Most tokens are nearly certain, so that many log-probabilities have an exponent.
    values = np.array(
        [-rng.expovariate(2) * 10 ** -rng.choice([0, 0, 0, 1, 2, 5]) for _ in ids], np.float32
    )
    label = "rlsd-0123456789ab@host,127.0.0.1,43433/8"
    meta = {
        "id": RID,
        "finish_reason": {"type": "length", "length": length},
        "prompt_tokens": PROMPT,
        "weight_version": label,
        "num_retractions": 0,
        "input_token_logprobs": [],
        "output_token_logprobs": [[v, i, None] for v, i in zip(values.tolist(), ids, strict=True)],
        "output_token_logprobs_length": length,
        "reasoning_tokens": 0,
        "completion_tokens": length,
        "cached_tokens": 0,
        "weight_versions": [{"version": label, "start": 0, "end": length}],
        "cached_tokens_details": None,
        "dp_rank": None,
        "e2e_latency": 32.19643197500409,
        "response_sent_to_client_ts": 1795751729.8542807,
    }
    return json.dumps({"output_ids": ids, "meta_info": meta}, separators=(",", ":")).encode()


class Stages:
    """CPU seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.thread_time()
        yield
        self.seconds[name] += time.thread_time() - began


def resident() -> int:
    """Bytes of this process that are in memory, once what is free has been given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def handed_over(generations: list[Generation], request: GenerationRequest) -> list[Group]:
    """What the rewards and the tokenizer are given of each response, and the groups."""
    groups = []
    for start in range(0, len(generations), SAMPLES):
        problem = Problem(id=str(start), messages=({"role": "user", "content": "?"},), answer="1")
        prompt = np.asarray(request.prompt_ids, np.int32)
        group = Group(problem, [])
        for generation in generations[start : start + SAMPLES]:
            generation.token_ids.tolist()  # for the tokenizer
            RewardInput(
                problem=problem,
                response="",
                num_tokens=len(generation.token_ids),
                max_tokens=request.params.max_new_tokens,
                finish_reason=generation.finish_reason,
            )
            group.trajectories.append(
                Trajectory(problem=problem, prompt_ids=prompt, generation=generation, advantage=1.0)
            )
        groups.append(group)
    return groups


def measured(tokens: int, length: int, tokenizer: str | None) -> dict[str, Any]:
    """All stages for ``tokens`` tokens in responses of ``length``."""
    rng = random.Random(0)
    params = SamplingParams(length)
    request = GenerationRequest([rng.randrange(VOCAB) for _ in range(PROMPT)], params, 0)
    bodies = [body_of(rng, length) for _ in range(DIFFERENT_BODIES)]
    label = json.loads(bodies[0])["meta_info"]["weight_version"]
    stage, memory = Stages(), {}

    def answer(body: bytes) -> Generation:
        with stage("parse"):
            reply = read_response(body, "server 0")
        with stage("check"):
            return parse_generation(
                *(reply, request),
                rid=RID,
                vocab_size=VOCAB,
                versions={label: 8},
                server="server 0",
            )

    for body in bodies[:2]:  # imports and first calls
        answer(body)
    stage.seconds.clear()
    before = resident()
    generations = []
    for number in range(tokens // length):
        body = bodies[number % len(bodies)]
        with stage("json.loads"):
            json.loads(body)
        generations.append(answer(body))
    count = len(generations) * length
    memory["held by rank 0"] = (resident() - before) / count
    with stage("hand over"):
        groups = handed_over(generations, request)
    if tokenizer is not None:
        decode = load_tokenizer(TokenizerConfig(), tokenizer).decode
        with stage("decode"):
            for generation in generations[: max(1, 1_000_000 // length)]:
                decode(generation.token_ids.tolist())
        stage.seconds["decode"] *= count / (min(len(generations), 1_000_000 // length) * length)
    with stage("pack"):
        batch = train_batch(groups)
        tensors = train_batch_tensors(batch)
    memory["rank 0 while it sends"] = (resident() - before) / count
    alone = resident()
    with stage("unpack"):
        rows = train_batch_of({name: tensor.clone() for name, tensor in tensors.items()})
    memory["another rank, of its own rows"] = (resident() - alone) / count
    del tensors
    with stage("micro-batches"):
        sequences = [student_sequence(row) for row in rows.rows.values()]
        offsets, shape = response_offsets(sequences), PackShape()
        plan = plan_micro_batches([[s.num_inputs for s in sequences]], MAX_PACK, shape)
        for members, pack in zip(plan.members[0], plan.pack_lengths[0], strict=True):
            build_micro_batch(
                *(sequences, members, offsets),
                pack_length=pack,
                shape=shape,
                device=torch.device("cpu"),
            )
    each = {name: 1e6 * seconds / count for name, seconds in stage.seconds.items()}
    to_batch = sum(each[name] for name in TO_BATCH)
    return {
        "tokens": count,
        "response tokens": length,
        "body bytes a token": len(bodies[0]) / length,
        "microseconds a token": {name: round(value, 4) for name, value in each.items()},
        "body to batch": round(to_batch, 4),
        "of json.loads": round(to_batch / each["json.loads"], 3),
        "bytes a token": {name: round(value, 1) for name, value in memory.items()},
    }


def on_ranks(rank: int, ranks: int, tokens: int, length: int, port: int) -> None:
    """Rows from rank 0 to ``ranks`` data-parallel ranks; rank 1 prints what it cost."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    world, alone = dist.group.WORLD, [dist.new_group([each]) for each in range(ranks)]
    groups: Any = SimpleNamespace(
        rank=rank,
        dp=world,
        control=world,
        replica=alone[rank],
        replica_leads=list(range(ranks)),
    )
    batch = None
    if rank == 0:
        ids = np.arange(length, dtype=np.int32)
        rows = [
            TrainRow(
                prompt_ids=ids[:PROMPT],
                response_ids=ids.copy(),
                loss_mask=np.ones(length, np.bool_),
                rollout_log_probs=np.zeros(length, np.float32),
                advantage=1.0,
            )
            for _ in range(tokens // length)
        ]
        batch = TrainBatch.of(rows)
    dist.barrier()
    before, began, cpu = resident(), time.perf_counter(), time.process_time()
    known = share_outlines(batch, groups)
    by_rank = [list(range(start, len(known), ranks)) for start in range(ranks)]
    found = share_rows(known, by_rank, groups)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    held = resident() - before
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    count = len(found.rows) * length
    if rank < 2:
        figures = {
            "of": "all rows" if rank == 0 else "its own rows",
            "microseconds a token": round(1e6 * cpu / count, 4),
            "seconds": round(seconds, 3),
            "bytes a token": round(held / count, 1),
            "bytes a token at its most": round((peak - before) / count, 1),
        }
        print(json.dumps({f"rank {rank} of {ranks}": figures}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def number(text: str) -> int:
    return int(float(text.removesuffix("M")) * (1_000_000 if text.endswith("M") else 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=number, default=[1_000_000, 4_000_000])
    parser.add_argument("--length", type=int, default=8192, help="tokens of a response")
    parser.add_argument("--tokenizer", help="a folder with tokenizer.json")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=int, help="send the rows to so many ranks on this machine")
    parser.add_argument("--one", action="store_true", help="measure one size in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.tokens[0], args.length, args.tokenizer)))
        return
    if args.ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        given = (args.ranks, args.tokens[0], args.length, port)
        mp.start_processes(on_ranks, given, nprocs=args.ranks, start_method="spawn")
        return
    facts = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, numpy {np.__version__}",
    }
    out = ResultsFile(args.out, facts) if args.out else None
    for tokens in args.tokens:
        command = [sys.executable, "-m", "benchmarks.host_path", "--one"]
        command += ["--tokens", str(tokens), "--length", str(args.length)]
        command += ["--tokenizer", args.tokenizer] if args.tokenizer else []
        found = subprocess.run(
            command, env=os.environ | MALLOC, capture_output=True, text=True, check=False
        )
        if found.returncode:
            sys.exit(found.stderr)
        figures = json.loads(found.stdout.splitlines()[-1])
        if out is not None:
            out.add(f"{figures['tokens']} tokens", figures)
        else:
            print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
