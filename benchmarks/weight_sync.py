"""Seconds and bytes of a weight publication to real SGLang servers, by transport and bucket size.

Starts servers of one model on this machine, publishes its weights (two sets in turn, so that no
file of the disk transport is already there) and sets the time beside a plain copy of the same
bytes in memory, all in one run. ``load`` is the time in which servers are paused and loading,
``verify`` that of comparing every tensor's checksum on every server. Rounds visit the settings in
turn, so that a change of the machine's speed meets all of them.

The yardstick of ``load`` is one copy of the bytes and SGLang's own ``load_weights`` of the same
tensors, measured in the server's process from memory of its own (in_server/timed_loader.py): no way
through SGLang's model code could be faster than these two, one after the other.
"""

from __future__ import annotations

import argparse
import base64
import os
import pickle
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_rlsd.config import SGLangConfig
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.weight_sync import (
    BroadcastTransport,
    DiskTransport,
    IpcTransport,
    SyncSettings,
    WeightTransport,
)

MIB = 2**20
FIELDS = ("seconds", "prepare_seconds", "load_seconds", "verify_seconds")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def read_weights(folder: Path, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """The model's tensors, and a second set that differs in every one."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    first = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    return [first, {name: tensor * 1.001 for name, tensor in first.items()}]


def plain_copy(tensors: dict[str, torch.Tensor]) -> float:
    """Seconds to copy every tensor once, into memory that was written before."""
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    started = time.perf_counter()
    for name, tensor in tensors.items():
        targets[name].copy_(tensor)
    return time.perf_counter() - started


def load_alone(engine: SGLangEngine, seconds_file: Path) -> float:
    """Seconds of the server's own ``load_weights``, of a set of tensors that it holds already."""
    server = engine.fleet.servers[0]
    body = {
        "serialized_named_tensors": [base64.b64encode(pickle.dumps([])).decode()],
        "load_format": "timed_loader.timed",
        "flush_cache": False,
    }

    async def run() -> None:
        client = server.client
        await client.pause("abort", timeout=300)
        await client.begin_update(timeout=300)
        await client.call("POST", "/update_weights_from_tensor", body, timeout=300)
        await client.end_update(timeout=300)
        await client.resume(timeout=300)

    engine.call(run(), 1200)
    return float(seconds_file.read_text().split()[-1])


def build(kind: str, engine: SGLangEngine, settings: SyncSettings, folder: Path) -> WeightTransport:
    if kind == "broadcast":
        return BroadcastTransport(engine, settings)
    if kind == "ipc":
        return IpcTransport(engine, settings)
    return DiskTransport(engine, settings, folder)


def measure(
    args: argparse.Namespace,
    engine: SGLangEngine,
    folder: Path,
    sets: list[dict[str, torch.Tensor]],
) -> None:
    size = sum(t.nbytes for t in sets[0].values())
    print(
        f"workload       {args.model.name} {args.dtype}, {len(sets[0])} tensors, {size / MIB:.0f} "
        f"MiB, {args.servers} server(s) on the same machine, median of {args.rounds}",
        flush=True,
    )
    found: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    copies, own = [], []
    version = 0
    # The first call reads the tensors, too.
    load_alone(engine, folder / "seconds")
    for _ in range(args.rounds):
        copies.append(plain_copy(sets[0]))
        own.append(load_alone(engine, folder / "seconds"))
        for kind in args.transports:
            for mib in args.bucket_mib:
                settings = SyncSettings(
                    source=args.model,
                    dtype=None,
                    device=torch.device("cpu"),
                    update_seconds=300,
                    bucket_bytes=mib * MIB,
                    verify_interval=1,
                )
                transport = build(kind, engine, settings, folder / "weights")
                # The first publication also allocates, and meets in process groups.
                for _ in range(2):
                    version += 1
                    transport.publish(iter(sets[version % 2].items()), version)
                found[kind, mib].append(transport.metrics)
                transport.close()
    copy, load_own = statistics.median(copies), statistics.median(own)
    print(f"plain copy     {copy:.3f} s, {size / copy / 1e9:.2f} GB/s")
    print(f"load_weights   {load_own:.3f} s, {size / load_own / 1e9:.2f} GB/s, in the server alone")
    print("                                                                      load / (copy +")
    print("transport  bucket MiB  total s  prepare s  load s  verify s  load GB/s  load_weights)")
    for (kind, mib), rows in found.items():
        total, prepare, load, verify = (
            statistics.median(row[f"weight_sync/{name}"] for row in rows) for name in FIELDS
        )
        print(
            f"{kind:<10} {mib:>10} {total:>8.2f} {prepare:>10.2f} {load:>7.2f} {verify:>9.2f} "
            f"{args.servers * size / load / 1e9:>10.2f} {load / (copy + load_own):>14.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bucket-mib", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--transports", nargs="+", default=["disk", "broadcast", "ipc"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"machine        {processor()}, {os.cpu_count()} cores, {platform.platform()}")
    print(f"load           {os.getloadavg()[0]:.2f} before the servers started")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, SGLang 0.5.23"
    print(f"versions       {versions}")
    hf_config = load_hf_config(args.model)
    sets = read_weights(args.model, getattr(torch, args.dtype))
    with tempfile.TemporaryDirectory() as folder:
        tensors = Path(folder) / "tensors.safetensors"
        save_file(sets[0], tensors)
        engine = SGLangEngine(
            SGLangConfig(
                num_servers=args.servers,
                start_timeout_seconds=300,
                args={"custom_weight_loader": ["timed_loader.timed"]},
                env={
                    "PYTHONPATH": str(Path(__file__).parent.absolute() / "in_server"),
                    "TIMED_TENSORS": str(tensors),
                    "TIMED_SECONDS": str(Path(folder) / "seconds"),
                },
            ),
            hf_path=args.model,
            dtype=args.dtype,
            vocab_size=hf_config["vocab_size"],
            max_positions=None,
            run_dir=Path(folder),
        )
        try:
            engine.wait_until_ready()
            measure(args, engine, Path(folder), sets)
        finally:
            engine.close()


if __name__ == "__main__":
    main()
