from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from megatron_rlsd.rollout import EmbeddedEngine, EngineError
from megatron_rlsd.rollout import decoding as decoding_module
from megatron_rlsd.rollout import kv_cache as kv_cache_module
from megatron_rlsd.types import Generation, GenerationRequest, SamplingParams
from tests.batches import plain

# Of the models that conftest.py builds.
VOCAB_SIZE = 97
MAX_POSITIONS = 96
FAMILIES = ["llama", "qwen2", "qwen3"]
HFFolder = Callable[..., Path]


def build_engine(folder: Path, max_batch_size: int = 8, **options: Any) -> EmbeddedEngine:
    """In float64, so that no uniform lies within rounding noise of a boundary between tokens."""
    return EmbeddedEngine(folder, torch.float64, max_batch_size, **options)


def mixed_requests(count: int = 20) -> list[GenerationRequest]:
    """Prompts of many lengths, some shared, with sampling parameters of every kind."""
    rng = random.Random(0)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.5, "stop_token_ids": tuple(range(30))},
    ]
    prompts = [
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 5, 17, 40]))] for _ in range(8)
    ]
    return [
        GenerationRequest(
            rng.choice(prompts), SamplingParams(rng.randint(1, 30), **kinds[i % len(kinds)]), seed=i
        )
        for i in range(count)
    ]


def tokens_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids.tolist() for generation in generations]


def reference_log_probs(
    model: torch.nn.Module, request: GenerationRequest, token_ids: list[int]
) -> torch.Tensor:
    """[T, V]: one forward pass over prompt and response, nothing cached, nothing batched."""
    tokens = torch.tensor([request.prompt_ids + token_ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(request.prompt_ids) - 1 : -1].double()
    return torch.log_softmax(logits / (request.params.temperature or 1.0), dim=-1)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_supports_equal_a_fresh_forward_pass(family: str, hf_folder: HFFolder):
    requests = mixed_requests()
    generations = EmbeddedEngine(hf_folder(family), torch.float32, 8).generate(requests)
    model = AutoModelForCausalLM.from_pretrained(hf_folder(family), dtype=torch.float32)
    for request, generation in zip(requests, generations, strict=True):
        params = request.params
        reference = reference_log_probs(model, request, generation.token_ids.tolist())
        chosen = reference.gather(1, torch.tensor(generation.token_ids.tolist())[:, None])
        torch.testing.assert_close(
            torch.tensor(generation.log_probs.tolist()).double(), chosen[:, 0], atol=1e-4, rtol=0
        )
        more_likely = (reference > chosen + 1e-6).sum(dim=1)
        mass_of_them = reference.exp().where(reference > chosen + 1e-6, 0.0).sum(dim=1)
        if params.temperature == 0:
            assert (more_likely == 0).all()
        if params.top_k:
            assert (more_likely < params.top_k).all()
        assert (mass_of_them < params.top_p).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family: str, hf_folder: HFFolder):
    requests = [
        replace(request, params=SamplingParams(20, temperature=0.0)) for request in mixed_requests()
    ]
    generations = build_engine(hf_folder(family)).generate(requests)
    model = AutoModelForCausalLM.from_pretrained(hf_folder(family), dtype=torch.float64)
    for request, generation in zip(requests, generations, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False
        )
        assert generation.token_ids.tolist() == output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("max_batch_size", [1, 3, 7, 64])
def test_the_rest_of_the_batch_does_not_matter(max_batch_size: int, hf_folder: HFFolder):
    requests = mixed_requests()
    expected = build_engine(hf_folder("qwen3"), 20).generate(requests)
    order = list(range(len(requests)))
    random.Random(max_batch_size).shuffle(order)
    engine = build_engine(hf_folder("qwen3"), max_batch_size)
    generations = engine.generate([requests[i] for i in order])
    for i, generation in zip(order, generations, strict=True):
        assert generation.token_ids.tolist() == expected[i].token_ids.tolist()
        assert generation.finish_reason == expected[i].finish_reason
        assert generation.log_probs.tolist() == pytest.approx(
            expected[i].log_probs.tolist(), abs=1e-6
        )


def test_small_cache_steps_and_split_prefills_change_nothing(
    hf_folder: HFFolder, monkeypatch: pytest.MonkeyPatch
):
    requests = mixed_requests()
    expected = tokens_of(build_engine(hf_folder("llama")).generate(requests))
    monkeypatch.setattr(kv_cache_module, "GROWTH_COLUMNS", 3)
    monkeypatch.setattr(decoding_module, "PREFILL_TOKENS", 1)
    assert tokens_of(build_engine(hf_folder("llama")).generate(requests)) == expected


def test_a_long_prompt_that_ends_at_once_leaves_its_neighbours_whole(hf_folder: HFFolder):
    # The rows after it move into its place before any decoding step has seen their length.
    ends_at_once = GenerationRequest(list(range(40)), SamplingParams(1), seed=0)
    goes_on = GenerationRequest(list(range(1, 41)), SamplingParams(12), seed=1)
    engine = build_engine(hf_folder("llama"))
    alone = engine.generate([goes_on])
    assert (
        engine.generate([ends_at_once, goes_on])[1].token_ids.tolist()
        == alone[0].token_ids.tolist()
    )


def test_shared_prompts_are_prefilled_once(hf_folder: HFFolder, monkeypatch: pytest.MonkeyPatch):
    engine = build_engine(hf_folder("llama"), 16)
    prefilled: list[list[tuple[int, ...]]] = []
    prefill = decoding_module.DecodingBatch._prefill

    def recording(self, prompts, samples):
        prefilled.append(prompts)
        prefill(self, prompts, samples)

    monkeypatch.setattr(decoding_module.DecodingBatch, "_prefill", recording)
    params = SamplingParams(8)
    first, second, longer = [5, 6, 7], [5, 6, 8], [5, 6, 7, 8]
    engine.generate(
        [GenerationRequest([*p], params, seed=i) for i, p in enumerate([first, second, longer] * 4)]
    )
    assert sorted(map(sorted, prefilled)) == [[tuple(first), tuple(second)], [tuple(longer)]]


def test_samples_of_one_prompt_differ_by_seed_and_repeat_by_seed(hf_folder: HFFolder):
    engine = build_engine(hf_folder("llama"))
    requests = [GenerationRequest([1, 2, 3], SamplingParams(20), seed=s) for s in (1, 2, 3, 1)]
    tokens = tokens_of(engine.generate(requests))
    assert tokens[0] == tokens[3]
    assert len(set(map(tuple, tokens))) == 3
    assert tokens_of(engine.generate(requests)) == tokens
    longer = [replace(request, params=SamplingParams(30)) for request in requests]
    assert [t[:20] for t in tokens_of(engine.generate(longer))] == tokens


def test_first_token_frequencies_follow_the_model(hf_folder: HFFolder):
    count = 4000
    request = GenerationRequest([3, 1, 4, 1, 5], SamplingParams(1, temperature=1.5), seed=0)
    engine = build_engine(hf_folder("qwen3"), 256)
    generations = engine.generate([replace(request, seed=s) for s in range(count)])
    model = AutoModelForCausalLM.from_pretrained(hf_folder("qwen3"), dtype=torch.float32)
    probs = reference_log_probs(model, request, [0])[0].exp()
    observed = torch.bincount(
        torch.tensor([g.token_ids[0] for g in generations]), minlength=VOCAB_SIZE
    )
    # Pool the rare tokens, for which the chi-square statistic would not hold.
    common = probs * count >= 5
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * count
    counts = torch.cat([observed[common], observed[~common].sum()[None]]).double()
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    degrees = int(common.sum())
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_stop_tokens_and_lengths_are_each_requests_own(hf_folder: HFFolder):
    engine = build_engine(hf_folder("llama"))
    free = GenerationRequest([9, 8, 7], SamplingParams(25), seed=4)
    (unstopped,) = engine.generate([free])
    assert (len(unstopped.token_ids.tolist()), unstopped.finish_reason) == (25, "length")

    stop = unstopped.token_ids.tolist()[10]
    first = unstopped.token_ids.tolist().index(stop)
    stopping = replace(free, params=SamplingParams(25, stop_token_ids=(stop,)))
    short = replace(free, params=SamplingParams(2))
    stopped, cut, full = engine.generate([stopping, short, free])
    assert stopped.token_ids.tolist() == unstopped.token_ids.tolist()[: first + 1]
    assert stopped.finish_reason == "stop"
    assert len(stopped.log_probs) == len(stopped.token_ids)
    assert (cut.token_ids.tolist(), cut.finish_reason) == (
        unstopped.token_ids.tolist()[:2],
        "length",
    )
    assert full.token_ids.tolist() == unstopped.token_ids.tolist()


def test_a_stop_token_in_the_last_place_counts_as_stop(hf_folder: HFFolder):
    engine = build_engine(hf_folder("llama"))
    request = GenerationRequest([9], SamplingParams(1, stop_token_ids=tuple(range(VOCAB_SIZE))), 0)
    (generation,) = engine.generate([request])
    assert generation.finish_reason == "stop"


def test_a_sequence_may_fill_every_position_but_not_one_more(hf_folder: HFFolder):
    engine = build_engine(hf_folder("llama"))
    fits = GenerationRequest([1] * 90, SamplingParams(MAX_POSITIONS - 90), seed=0)
    assert len(engine.generate([fits])[0].token_ids) == MAX_POSITIONS - 90
    too_long = replace(fits, params=SamplingParams(MAX_POSITIONS - 89))
    with pytest.raises(EngineError, match=r"request 1: 90 prompt tokens \+ 7 .* 97 .* 96"):
        engine.generate([fits, too_long])


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, VOCAB_SIZE], {}, rf"\[{VOCAB_SIZE}\] are outside the vocabulary of {VOCAB_SIZE}"),
        ([-1], {}, "outside the vocabulary"),
        ([1], {"stop_token_ids": (VOCAB_SIZE,)}, "outside the vocabulary"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"temperature": -0.5}, "temperature"),
        ([1], {"temperature": math.nan}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
        ([1], {"top_p": 1.1}, "top_p"),
        ([1], {"top_k": -1}, "top_k"),
    ],
)
def test_requests_that_cannot_be_served(
    prompt: list[int], params: dict, message: str, hf_folder: HFFolder
):
    engine = build_engine(hf_folder("llama"))
    request = GenerationRequest(prompt, SamplingParams(**{"max_new_tokens": 4, **params}), seed=0)
    with pytest.raises(EngineError, match=message):
        engine.generate([request])


def test_no_requests_no_generations(hf_folder: HFFolder):
    assert build_engine(hf_folder("llama")).generate([]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_updated_weights_are_those_that_generate(family: str, hf_folder: HFFolder):
    requests = mixed_requests(8)
    new_weights = weights_of(hf_folder(family, seed=1))
    expected = build_engine(hf_folder(family, seed=1)).generate(requests)
    engine = build_engine(hf_folder(family))
    before = engine.generate(requests)
    assert {g.weight_version for g in before} == {0}

    engine.update_weights(new_weights.items(), version=3)
    after = engine.generate(requests)
    assert tokens_of(after) == tokens_of(expected) != tokens_of(before)
    assert engine.weight_version == 3
    assert {g.weight_version for g in after} == {3}

    empty = build_engine(hf_folder(family), load_weights=False)
    with pytest.raises(EngineError, match="no weights yet"):
        empty.generate(requests)
    empty.update_weights(new_weights.items(), version=1)
    assert tokens_of(empty.generate(requests)) == tokens_of(expected)


def test_buffers_that_checkpoints_have_are_weights(hf_folder: HFFolder):
    weights = weights_of(hf_folder("deepseek_v3"))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert weights[bias].abs().max() > 0.1
    engine = EmbeddedEngine(hf_folder("deepseek_v3"), torch.bfloat16, 8, load_weights=False)
    without = {name: tensor for name, tensor in weights.items() if name != bias}
    with pytest.raises(EngineError, match=rf"{bias}: missing"):
        engine.update_weights(without.items(), version=1)
    with pytest.raises(EngineError, match=r"inv_freq: unknown"):
        engine.update_weights({**weights, "model.rotary_emb.inv_freq": weights[bias]}.items(), 1)
    engine.update_weights(weights.items(), version=1)
    held = dict(engine._model.named_buffers())[bias]
    # Experts are compared by it: rounded, it would choose others than the trainer does.
    assert held.dtype == torch.float32
    assert torch.equal(held, weights[bias])
    moved = EmbeddedEngine(hf_folder("deepseek_v3", seed=1), torch.float32, 8)
    moved.update_weights(weights.items(), version=1)
    expected = EmbeddedEngine(hf_folder("deepseek_v3"), torch.float32, 8)
    requests = mixed_requests(6)
    assert tokens_of(moved.generate(requests)) == tokens_of(expected.generate(requests))


def test_the_stream_may_reuse_its_buffers(hf_folder: HFFolder):
    new_weights = weights_of(hf_folder("qwen3", seed=1))

    def reusing() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in new_weights.items():
            buffer = tensor.double()  # the engine's own dtype: nothing to convert
            yield name, buffer
            buffer.fill_(torch.nan)

    engine = build_engine(hf_folder("qwen3"))
    engine.update_weights(reusing(), version=1)
    expected = build_engine(hf_folder("qwen3", seed=1)).generate(mixed_requests(4))
    assert tokens_of(engine.generate(mixed_requests(4))) == tokens_of(expected)


def test_tied_embeddings_come_once_or_twice_but_equal(hf_folder: HFFolder):
    embedding = "model.embed_tokens.weight"
    weights = weights_of(hf_folder("llama", seed=1))
    assert "lm_head.weight" not in weights
    expected = tokens_of(build_engine(hf_folder("llama", seed=1)).generate(mixed_requests(4)))
    both = {**weights, "lm_head.weight": weights[embedding]}
    head_only = {name: tensor for name, tensor in both.items() if name != embedding}
    for stream in (both, head_only):
        engine = build_engine(hf_folder("llama"))
        engine.update_weights(stream.items(), version=1)
        assert tokens_of(engine.generate(mixed_requests(4))) == expected
    unequal = {**weights, "lm_head.weight": weights[embedding] + 1}
    with pytest.raises(EngineError, match=r"lm_head\.weight: differs"):
        engine.update_weights(unequal.items(), version=2)


def test_damaged_streams_leave_the_old_weights(hf_folder: HFFolder):
    engine = build_engine(hf_folder("qwen3"))
    weights = weights_of(hf_folder("qwen3", seed=1))
    engine.update_weights(weights_of(hf_folder("qwen3")).items(), version=5)
    before = engine.generate(mixed_requests(6))
    norm, head = "model.norm.weight", "lm_head.weight"
    without_norm = [item for item in weights.items() if item[0] != norm]

    def breaking() -> Iterator[tuple[str, torch.Tensor]]:
        yield from without_norm
        raise ConnectionError("the sender is gone")

    damaged = {
        rf"{norm}: missing": without_norm,
        r"model.extra: unknown": [*weights.items(), ("model.extra", torch.zeros(1))],
        rf"{head}: repeated": [*weights.items(), (head, weights[head])],
        rf"{norm}: shape \[31\], expected \[48\]": [*without_norm, (norm, torch.zeros(31))],
        rf"(?s)extra: unknown.*{norm}: missing": [*without_norm, ("extra", torch.zeros(1))],
    }
    for message, stream in damaged.items():
        with pytest.raises(EngineError, match=message):
            engine.update_weights(stream, version=6)
    with pytest.raises(ConnectionError):
        engine.update_weights(breaking(), version=6)
    assert engine.weight_version == 5
    again = engine.generate(mixed_requests(6))
    assert list(map(plain, again)) == list(map(plain, before))


def test_a_damaged_stream_is_read_to_its_end(hf_folder: HFFolder):
    # The other ranks of a collective would wait forever for one that stopped early.
    stream = iter([("unknown", torch.zeros(1)), *weights_of(hf_folder("qwen3")).items()])
    with pytest.raises(EngineError):
        build_engine(hf_folder("qwen3")).update_weights(stream, version=1)
    assert next(stream, None) is None


def test_weights_that_yield_nan_are_reported(hf_folder: HFFolder):
    engine = build_engine(hf_folder("qwen3"))
    weights = weights_of(hf_folder("qwen3"))
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    engine.update_weights(weights.items(), version=1)
    with pytest.raises(EngineError, match="NaN at position 2"):
        engine.generate([GenerationRequest([1, 2], SamplingParams(3), seed=0)])


def test_bfloat16_stays_close_to_float32_log_probs(hf_folder: HFFolder):
    engine = EmbeddedEngine(hf_folder("qwen3"), torch.bfloat16, 8)
    requests = mixed_requests(8)
    generations = engine.generate(requests)
    model = AutoModelForCausalLM.from_pretrained(hf_folder("qwen3"), dtype=torch.bfloat16)
    for request, generation in zip(requests, generations, strict=True):
        reference = reference_log_probs(model, request, generation.token_ids.tolist())
        chosen = reference.gather(1, torch.tensor(generation.token_ids.tolist())[:, None])[:, 0]
        error = (torch.tensor(generation.log_probs.tolist()).double() - chosen).abs()
        assert error.max() < 0.5  # logits of about 10 in steps of 2 ** -4
        assert error.mean() < 0.1


@pytest.mark.parametrize("load_weights", [True, False])
def test_the_engine_leaves_the_global_random_state_alone(load_weights: bool, hf_folder: HFFolder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    engine = build_engine(hf_folder("qwen3"), load_weights=load_weights)
    engine.update_weights(weights_of(hf_folder("qwen3")).items(), version=1)
    engine.generate(mixed_requests(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_folders_that_do_not_fit_are_refused(hf_folder: HFFolder, tmp_path: Path):
    with pytest.raises(EngineError, match=r"no config\.json"):
        build_engine(tmp_path)
    source = hf_folder("qwen3")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(EngineError, match="cannot load weights"):
        build_engine(tmp_path)
    build_engine(tmp_path, load_weights=False)
    weights = weights_of(source)
    norm = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"missing_keys: \['model.norm.weight'\]"):
        build_engine(tmp_path)
    weights |= {"model.norm.weight": norm, "extra": torch.zeros(1)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"unexpected_keys: \['extra'\]"):
        build_engine(tmp_path)


def test_sliding_window_attention_is_refused(tmp_path: Path):
    MistralConfig(sliding_window=8).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"mistral has .*sliding_attention"):
        build_engine(tmp_path, load_weights=False)


def test_a_closed_engine_serves_nothing(hf_folder: HFFolder):
    engine = build_engine(hf_folder("llama"))
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.generate(mixed_requests(1))
    with pytest.raises(EngineError, match="closed"):
        engine.update_weights([], version=1)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_model_knows(
    hf_folder: HFFolder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """transformers 5.24 renamed it; whichever is installed, models of both kinds decode alike."""
    requests = mixed_requests(4)
    expected = tokens_of(build_engine(hf_folder("qwen3")).generate(requests))
    engine = build_engine(hf_folder("qwen3"))
    own, forward = kv_cache_module.cache_name(engine._model), engine._model.forward

    def renamed(**arguments: object) -> object:
        return forward(**{own if key == name else key: each for key, each in arguments.items()})

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)]
    renamed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    monkeypatch.setattr(engine._model, "forward", renamed)
    assert tokens_of(engine.generate(requests)) == expected
