"""What the converter writes is what SGLang loads: real weights, several files, the tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_rlsd.config import RewardConfig
from megatron_rlsd.conversion.convert import Sizes, to_hf, to_megatron
from megatron_rlsd.hf_bridge import load_hf_config
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.types import GenerationRequest, Problem, RewardInput, SamplingParams
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
    check_judge(engine.fleet.servers[0].url)
    engine.close()


def check_judge(url: str) -> None:
    """The server that speaks OpenAI's language judges a response, as grammar holds it to."""
    entry = {"name": "http", "weight": 0, "timeout_seconds": 300}
    chat = {**entry, "url": f"{url}/v1", "form": "chat", "model": "judge"}
    held = {"prompt": "Is it {{ response }}?", "body": {"regex": "Score: [01]", "max_tokens": 16}}
    cut = {"prompt": "{{ response }}", "body": {"max_tokens": 2}}
    likelihood = {
        "url": f"{url}/generate",
        "request": {
            "text": "{{ response }}",
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
        },
        "score": "meta_info.input_token_logprobs.1.0",
    }
    no_reward_model = {"url": url, "form": "sglang_reward_model", "prompt": "{{ response }}"}
    functions = [
        {**chat, **held, "weight": 1},
        {**chat, **cut},
        {**entry, **likelihood},
        {**entry, **no_reward_model},
    ]
    config = RewardConfig.model_validate({"functions": functions, "max_error_share": 1})
    problem = Problem("p", ({"role": "user", "content": "What is the capital of France?"},), "")
    with RewardPool(config) as pool:
        (result,) = pool.score([RewardInput(problem, "Paris is it", 5, 10, "stop")])
    assert result.value in (0.0, 1.0)
    assert 'the judge ended by "length"' in result.errors["http#2"]
    likely = result.parts["http#3"]
    assert likely is not None
    assert likely < 0
    assert "HTTP 400" in result.errors["http#4"]
    assert "does not appear to be an emb" in result.errors["http#4"]
