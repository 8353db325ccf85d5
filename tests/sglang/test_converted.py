"""What the converter writes is what SGLang loads: real weights, several files, the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_rlsd.conversion.convert import Sizes, to_hf, to_megatron
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.types import GenerationRequest, SamplingParams
from tests.sglang.conftest import Reference

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="no models/SmolLM2-135M-Instruct (make test)")
def test_a_server_loads_a_converted_folder_and_computes_the_same(
    sglang_environment: None, make_engine: Callable[..., SGLangEngine], tmp_path: Path
) -> None:
    to_megatron(SMOLLM2, tmp_path / "megatron", Sizes(tensor=3, pipeline=4))
    to_hf(tmp_path / "megatron", tmp_path / "hf", max_shard_bytes=100_000_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    eos = load_hf_config(SMOLLM2)["eos_token_id"]
    engine = make_engine(
        hf_path=tmp_path / "hf",
        vocab_size=len(tokenizer),
        args={"skip_tokenizer_init": False},
    )
    questions = ("What is the capital of France?", "Count from one to five.")
    requests = [
        GenerationRequest(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                add_generation_prompt=True,
                return_dict=False,
            ),
            SamplingParams(12, temperature, stop_token_ids=(eos,)),
            seed=0,
        )
        for question in questions
        for temperature in (0.0, 1.0)
    ]
    generations = engine.generate(requests)
    Reference(SMOLLM2).check(requests, generations)
    assert "Paris" in tokenizer.decode(generations[0].token_ids.tolist())
    engine.close()
