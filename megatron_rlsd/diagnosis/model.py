"""The model's folder: configuration, weights, tokenizer, and the layout over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rlsd.config import Config
from megatron_rlsd.conversion.describe import describe
from megatron_rlsd.conversion.tokenizer_fit import check_token_ids
from megatron_rlsd.data import Tokenizer, load_tokenizer
from megatron_rlsd.data.hf_tokenizer import HFTokenizer
from megatron_rlsd.diagnosis.check import Doubt, Skip
from megatron_rlsd.hf_bridge import Family, ModelDims, SafetensorsFolder, load_hf_config
from megatron_rlsd.parallel.eight_bit import check_eight_bit
from megatron_rlsd.parallel.layout import LayoutError, check_layout
from megatron_rlsd.parallel.memory import rank_parameters
from megatron_rlsd.rollout.sglang import SGLangScorer
from megatron_rlsd.runtime.errors import UserError

PHRASE = "Is 17 + 25 = 42?"


def check_hf_config(family: Family, hf_config: dict[str, Any]) -> str:
    """Raises UserError that lists every value that is not supported."""
    dims = family.dims(hf_config)
    family.model_fields(hf_config)
    return (
        f"{family.name}: {dims.num_layers} layers, hidden size {dims.hidden_size}, "
        f"vocabulary {dims.vocab_size}"
    )


def check_weights(config: Config) -> str:
    """Headers and index of every file, and each tensor's name, shape and dtype."""
    description, _ = describe(Path(config.model.hf_path))
    if description.problems:
        raise UserError("\n".join(description.problems))
    facts = description.facts
    return f"{facts['tensors']} tensors, {facts['bytes']} bytes, {facts['dtypes']}"


def check_teacher(config: Config, vocab_size: int) -> str:
    """The other model that on-policy distillation learns from."""
    path, server = config.teacher.hf_path, config.teacher.sglang
    if server.url is not None:
        SGLangScorer(
            server.model_copy(update={"request_timeout_seconds": 10.0, "max_attempts": 1}),
            vocab_size,
        ).check()
        return f"{server.url} scores tokens of the student's vocabulary"
    if path is None:
        raise Skip("teacher.hf_path is not set: the student is its own teacher")
    found = load_hf_config(path).get("vocab_size")
    if found != vocab_size:
        raise UserError(
            f"teacher.hf_path={path} embeds {found} tokens and the student {vocab_size}"
        )
    return f"{len(SafetensorsFolder(path).tensors)} tensors in {path}"


def check_tokenizer(config: Config, vocab_size: int) -> str:
    """It fits the embedding, and text survives encoding, decoding and the chat template."""
    tokenizer = load_tokenizer(config.tokenizer, config.model.hf_path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids but the model in "
            f"{config.model.hf_path} embeds {vocab_size}"
        )
    folder = Path(config.tokenizer.path or config.model.hf_path)
    if folder.is_dir():
        check_token_ids(folder, vocab_size)
    decoded = tokenizer.decode(tokenizer.encode(PHRASE))
    if decoded.strip() != PHRASE:
        raise UserError(f"the tokenizer turns {PHRASE!r} into {decoded!r}")
    found = f"{tokenizer.vocab_size} ids; {_check_template(tokenizer)}"
    if isinstance(tokenizer, HFTokenizer) and (what := tokenizer.difference_from_transformers()):
        raise Doubt(
            f"{found}; AutoTokenizer, as programs that read an export may use it, does not go by "
            f"{tokenizer.folder / 'tokenizer.json'}: {what}"
        )
    return found


def _check_template(tokenizer: Tokenizer) -> str:
    messages = [{"role": "user", "content": PHRASE}]
    prompt = tokenizer.apply_chat_template(messages)
    closed = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    if closed == prompt:
        # Models without a generation prompt exist, but then the template must end the turn.
        if not prompt or prompt[-1] not in tokenizer.stop_token_ids:
            raise UserError("the chat template opens no turn for the assistant to answer in")
        return f"chat template of {len(prompt)} tokens without a generation prompt"
    answer = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "Yes."}], add_generation_prompt=False
    )
    if tokenizer.end_of_turn_id not in answer[len(closed) :]:
        raise UserError(
            f"the chat template does not end an answer with the end-of-turn token "
            f"{tokenizer.end_of_turn_id}, so no response would learn to stop"
        )
    return f"the chat template keeps the message and ends turns with {tokenizer.end_of_turn_id}"


def check_parallel(config: Config, model: ModelDims, world_size: int | None) -> str:
    """``world_size`` None: of the trainer is not known, so any that the layout can have."""
    parallel = config.parallel
    product = parallel.tensor * parallel.context * parallel.pipeline
    experts = parallel.expert * parallel.expert_tensor_size * parallel.pipeline
    sizes = [world_size] if world_size else [product * n for n in range(1, experts + 1)]
    problem: LayoutError | None = None
    for size in sizes:
        try:
            check_layout(parallel, size, model)
            check_eight_bit(model, parallel, config.model.precision)
        except LayoutError as error:
            problem = problem or error
            continue
        held = rank_parameters(model, parallel, stage=0).total
        known = "" if world_size else ", or a multiple of them"
        return f"possible on {size} processes{known}; {held:,} parameters on the first rank"
    assert problem is not None
    raise problem
