"""Memory and speed of checkpoint conversion beside ``cp`` of the same files, in the same run.

Writes a random Llama in bfloat16 (about 7 GB unless ``--layers`` says otherwise), converts it to
Megatron and back in processes of their own, and copies the source before each. Every step begins
with its input out of the page cache and ends when its output is on disk. Needs three times the
checkpoint's size of free disk, in ``--folder``.

Memory is what the kernel says of the converting process: RssAnon is its own, RssFile is mapped
files (libraries here: the converter maps no weights). The growth is over the moment before the
conversion, when everything is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlsd.conversion.compare import tensor_hash
from megatron_rlsd.conversion.convert import BUCKET_BYTES, Sizes, to_hf, to_megatron
from megatron_rlsd.hf_bridge import SafetensorsFolder, family_for
from megatron_rlsd.hf_bridge.reader import SINGLE_NAME
from megatron_rlsd.hf_bridge.safetensors_writer import Described, shard_files, write_safetensors
from megatron_rlsd.hf_bridge.writer import write_index

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128003,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CHILD = "--child"
STEPS = {"to-megatron": ("hf", "megatron"), "to-hf": ("megatron", "back")}


def write_random(folder: Path, layers: int) -> dict[str, Described]:
    config = CONFIG | {"num_hidden_layers": layers}
    family = family_for(config)
    shapes = family.hf_shapes(family.dims(config))
    described = {name: Described(shape, torch.bfloat16) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(10_000_019, generator=generator, dtype=torch.float32).bfloat16()

    def values(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            count = torch.Size(described[name].shape).numel()
            start = sum(name.encode()) * 7919 % len(noise)  # other values in every layer
            repeated = noise.roll(-start).repeat(-(-count // len(noise)))[:count]
            yield name, repeated.view(described[name].shape)

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    files = shard_files(described, 5_000_000_000, SINGLE_NAME)
    for file, names in files.items():
        write_safetensors(folder / file, {n: described[n] for n in names}, values(names))
    weight_map = {name: file for file, names in files.items() for name in names}
    write_index(folder, weight_map, sum(d.nbytes for d in described.values()))
    return described


def drop_from_cache(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, out: Path) -> tuple[float, float]:
    """``cp -r``, until the copy is on disk: (seconds, seconds of processor time)."""
    drop_from_cache(source)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for path in out.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(out)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def memory(pid: int) -> dict[str, int]:
    """RssAnon and RssFile in bytes; empty once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {k: int(fields[k].split()[0]) * 1024 for k in ("RssAnon", "RssFile") if k in fields}


def convert(step: str, source: Path, out: Path) -> dict[str, float]:
    """Run one step in a process of its own; seconds, and its memory over the idle process."""
    drop_from_cache(source)
    child = subprocess.Popen(
        [sys.executable, __file__, CHILD, step, str(source), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "ready"
    idle = memory(child.pid)
    peak = dict(idle)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            for name, value in memory(child.pid).items():
                peak[name] = max(peak[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    child.stdin.write("go\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    child.stdin.close()
    if child.wait() or not answer:
        raise RuntimeError(f"{step} failed")
    max_rss, processor = answer.split()
    return {
        "seconds": seconds,
        "processor": float(processor),
        "anon_growth": peak["RssAnon"] - idle["RssAnon"],
        "file_growth": peak["RssFile"] - idle["RssFile"],
        "max_rss": float(max_rss),
    }


def child(step: str, source: str, out: str) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    before = time.process_time()
    if step == "to-megatron":
        to_megatron(source, out, Sizes(tensor=2))
    else:
        to_hf(source, out)
    lines = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    print(int(lines.split()[0]) * 1024, time.process_time() - before, flush=True)


def same_hashes(a: Path, b: Path) -> bool:
    one, other = SafetensorsFolder(a), SafetensorsFolder(b)
    return one.tensors.keys() == other.tensors.keys() and all(
        tensor_hash(one.slice(name)) == tensor_hash(other.slice(name)) for name in one.tensors
    )


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as parent:
        work = Path(parent)
        described = write_random(work / "hf", args.layers)
        size = sum(d.nbytes for d in described.values())
        largest = max(d.nbytes for d in described.values())
        print(f"{platform.platform()}, {os.cpu_count()} cores, torch {torch.__version__}")
        print(f"load average before: {os.getloadavg()[0]:.1f}")
        print(f"checkpoint: {size / 1e9:.2f} GB in {len(described)} tensors")
        bound = 2 * largest + BUCKET_BYTES
        print(f"largest tensor {largest / 1e6:.0f} MB; twice that and the bucket {bound / 1e6:.0f}")
        for step, (source, out) in STEPS.items():
            copied, copy_processor = copy_seconds(work / source, work / "copy")
            result = convert(step, work / source, work / out)
            print(
                f"{step}: {result['seconds']:.1f} s, {size / 1e6 / result['seconds']:.0f} MB/s; "
                f"cp {copied:.1f} s, {size / 1e6 / copied:.0f} MB/s; "
                f"ratio to cp {result['seconds'] / copied:.2f}; processor time "
                f"{result['processor']:.1f} s, cp {copy_processor:.1f} s"
            )
            print(
                f"  memory: own (RssAnon) grows by {result['anon_growth'] / 1e6:.0f} MB, mapped "
                f"files (RssFile) by {result['file_growth'] / 1e6:.0f} MB; process at most "
                f"{result['max_rss'] / 1e6:.0f} MB"
            )
        print(f"round trip bit-identical: {same_hashes(work / 'hf', work / 'back')}")


if __name__ == "__main__":
    main()
