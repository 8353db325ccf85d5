"""A data source's own variables of the chat template: Qwen3's enable_thinking, per source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlsd.config import JsonlSource, PromptConfig, TeacherConfig, TokenizerConfig
from megatron_rlsd.data import (
    ChatTurns,
    PromptBuilder,
    TurnText,
    build_sources,
    evaluation_problems,
    load_tokenizer,
)
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Problem

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>none{% endif %}{% endif %}"
)


def source(folder: Path, name: str, **options: object) -> JsonlSource:
    path = folder / f"{name}.jsonl"
    row = {"prompt": "1 + 1?", "answer": "2", "reference_solution": "two"}
    path.write_text(json.dumps(row) + "\n")
    return JsonlSource(kind="jsonl", path=str(path), chat_template_kwargs=options)


def of_two_sources(folder: Path) -> tuple[Problem, Problem]:
    """Of one without options, and of one that thinks not."""
    sources = [source(folder, "plain"), source(folder, "quick", enable_thinking=False)]
    plain, quick = build_sources(sources, 0).next(2)
    assert (plain.source, quick.source) == ("plain", "quick")
    return plain, quick


def test_every_text_of_a_source_has_its_options(hf_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(chat_template=TEMPLATE), hf_folder)
    prompts = PromptBuilder(PromptConfig(), TeacherConfig(), tokenizer)
    turns, texts = ChatTurns(tokenizer, "user"), TurnText(tokenizer)
    ids = tokenizer.encode("4")
    for problem, begun in zip(of_two_sources(tmp_path), ("", "<think>none"), strict=True):
        options = problem.chat_template_kwargs
        for prompt in (prompts.student(problem), prompts.teacher(problem)):
            assert tokenizer.decode(prompt, special=True).endswith(f"assistant\n{begun}")
        between = turns.between(ids, "and?", options)
        assert tokenizer.decode(between, special=True).endswith(f"assistant\n{begun}")
        assert texts.of(ids, options) == ("4", f"{begun}4" if begun else None)


def test_a_source_wins_over_the_tokenizers_own(hf_folder: Path, tmp_path: Path) -> None:
    config = TokenizerConfig(
        chat_template=TEMPLATE, chat_template_kwargs={"enable_thinking": False}
    )
    tokenizer = load_tokenizer(config, hf_folder)
    prompts = PromptBuilder(PromptConfig(), TeacherConfig(), tokenizer)
    (problem,) = evaluation_problems(source(tmp_path, "slow", enable_thinking=True), None)
    plain, _ = of_two_sources(tmp_path)
    assert "<think>" not in tokenizer.decode(prompts.student(problem))
    assert "<think>" in tokenizer.decode(prompts.student(plain))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_thinkin": False}, "a data source sets enable_thinkin, which the chat template"),
        ({"messages": []}, "a data source cannot set messages"),
    ],
)
def test_an_option_that_the_template_does_not_read_is_refused(
    hf_folder: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(chat_template=TEMPLATE), hf_folder)
    prompts = PromptBuilder(PromptConfig(), TeacherConfig(), tokenizer)
    (problem,) = build_sources([source(tmp_path, "a", **options)], 0).next(1)
    with pytest.raises(UserError, match=message):
        prompts.student(problem)
