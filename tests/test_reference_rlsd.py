"""examples/reference_rlsd.py and the trainer compute the same, from the same samples."""

from __future__ import annotations

import json
import random
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from examples import reference_rlsd as page
from megatron_rlsd import train
from megatron_rlsd.config import Config
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.observability.samples import read_samples
from tests.rlsd_vectors import CASES

pytestmark = pytest.mark.process

STEPS = 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INTRODUCTION, REQUEST = page.Settings().hint.split("\n\n{}\n\n")
SETTINGS = page.Settings(
    prompts_per_step=3,
    n_samples_per_prompt=4,
    max_response_tokens=10,
    temperature=0.9,
    rlsd_lambda=0.8,
    lambda_decay_steps=5,
    teacher_interval=2,
    lr=3e-3,
    weight_decay=0.1,
    clip_grad=0.2,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 whose tokens are bytes, with a tokenizer that transformers reads."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(special + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(special) + len(alphabet),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems() -> list[dict[str, str]]:
    return [
        {
            "prompt": f"What is {a} + {b}?",
            "answer": str(a + b),
            "reference_solution": f"{a} and {b} more\nare {a + b}.",
        }
        for a in range(2, 6)
        for b in range(3, 6)
    ]


@pytest.fixture
def config(make_config: Any, model_folder: Path, problems: list[dict[str, str]], tmp_path: Path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    s = SETTINGS
    return make_config(
        model={"hf_path": str(model_folder), "precision": {"layers": "local"}},
        data={"train": [{"kind": "jsonl", "path": str(questions)}], "eval": []},
        prompts={
            "format_instruction": s.format,
            "hint_introduction": INTRODUCTION,
            "hint_request": REQUEST,
        },
        rollout={
            "prompts_per_step": s.prompts_per_step,
            "n_samples_per_prompt": s.n_samples_per_prompt,
            "max_response_tokens": s.max_response_tokens,
            "temperature": s.temperature,
        },
        algorithm={"rlsd_lambda": s.rlsd_lambda, "lambda_decay_steps": s.lambda_decay_steps},
        teacher={"mode": "periodic", "interval": s.teacher_interval},
        optimizer={"lr": s.lr, "weight_decay": s.weight_decay, "clip_grad": s.clip_grad},
        train={"steps": STEPS},
        observability={"samples_per_step": s.prompts_per_step},
    )


def groups_of(rows: list[dict[str, Any]], problems: list[dict[str, str]], tokenizer: Any) -> list:
    """The page's groups, made of what the trainer dumped of a step; the prompts are its own."""
    solution = {p["prompt"]: p["reference_solution"] for p in problems}
    size, groups = SETTINGS.n_samples_per_prompt, []
    for start in range(0, len(rows), size):
        group = rows[start : start + size]
        (question,) = {row["question"] for row in group}
        groups.append(
            (
                page.prompt_ids(tokenizer, question, SETTINGS),
                page.prompt_ids(tokenizer, question, SETTINGS, solution[question]),
                [row["token_columns"]["id"] for row in group],
                [row["reward"] for row in group],
            )
        )
    return groups


def test_the_page_makes_the_trainers_updates(
    config: Config, model_folder: Path, problems: list[dict[str, str]]
) -> None:
    """Advantages, weights, loss, gradient norm of each update, and the weights after all."""
    train.train(config)
    run = Path(config.run_dir)
    metrics = [m for m in read_metrics(run / "metrics.jsonl") if "train/loss" in m]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)

    def load(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    student = load(model_folder)
    teacher, optimizer, s = deepcopy(student), page.adamw(student, SETTINGS), SETTINGS
    compared = 0
    for step, line in enumerate(metrics):
        rows = read_samples(run / f"samples/step_{step:06d}.jsonl")
        groups = groups_of(rows, problems, tokenizer)
        lam = s.rlsd_lambda * max(0.0, 1 - (step + 1) / s.lambda_decay_steps)
        assert line["algorithm/lambda"] == pytest.approx(lam, rel=1e-12)
        result = page.update(student, teacher, optimizer, groups, lam, s)
        if (step + 1) % s.teacher_interval == 0:
            teacher.load_state_dict(student.state_dict())
        # Rounding moves what Adam makes of small gradients a little with every update.
        tight = 2e-6 * 5**step
        assert result["loss"] == pytest.approx(line["train/loss"], rel=tight, abs=tight)
        assert result["grad_norm"] == pytest.approx(line["train/grad_norm"], rel=tight)
        assert result["grad_norm"] > s.clip_grad  # so the clip is compared as well
        expected = torch.tensor([row["advantage"] for row in rows])
        torch.testing.assert_close(torch.cat(result["advantages"]), expected, rtol=1e-6, atol=1e-7)
        weights = iter(result["weights"])
        for row in rows:
            if row["advantage"]:
                # A dump has five significant digits.
                dumped = torch.tensor(row["token_columns"]["evidence_weight"])
                torch.testing.assert_close(next(weights), dumped, rtol=6e-5, atol=0)
                compared += len(dumped)
        assert next(weights, None) is None
    assert len(metrics) == STEPS
    assert compared > 100
    initial, trained = load(model_folder).state_dict(), load(run / "hf/final").state_dict()
    for name, weight in student.state_dict().items():
        moved = (trained[name] - initial[name]).norm()
        assert moved > 0, name
        assert (weight - trained[name]).norm() < 1e-4 * moved, name


KNOWN = {"clip_low", "clip_high", "evidence_clip", "lambda", "temperature", "dual_clip"}
"""Settings of the published cases that the page knows; it leaves the optional terms out."""


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if set(case["config"]) <= KNOWN])
def test_the_pages_loss_is_the_published_vectors_loss(name: str) -> None:
    """Also away from a ratio of 1, where the clips of the policy ratio act."""
    case = CASES[name]
    settings, expected = case["config"], case["expected"]
    s = page.Settings(
        eps_clip=(settings["clip_low"], settings["clip_high"]),
        evidence_clip=settings["evidence_clip"],
        dual_clip=settings.get("dual_clip") or float("inf"),
    )
    keys = ("old_logprobs", "teacher_logprobs", "advantages")
    old, teacher, advantages = (torch.tensor(case[k], dtype=torch.float64) for k in keys)
    lp = torch.tensor(expected["logp"], dtype=torch.float64)
    loss, weight = page.token_loss(lp, old, teacher, advantages, settings["lambda"], s)
    for actual, key in ((loss, "loss"), (weight, "evidence")):
        wanted = torch.tensor(expected[key], dtype=torch.float64)
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_the_pages_own_loop_learns_from_its_verifier(
    model_folder: Path, problems: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With a reward that a random model earns now and then, a few steps raise it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    monkeypatch.setattr(page, "verifier", lambda text, _: float(sum(c < "m" for c in text) > 5))
    torch.manual_seed(0)
    random.seed(0)
    settings = SETTINGS._replace(n_samples_per_prompt=16, lr=5e-3, clip_grad=1.0)
    page.train(model, tokenizer, problems, settings, steps=12)
    rewards = [float(line.split()[3].rstrip(",")) for line in capsys.readouterr().out.splitlines()]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.3


def test_the_page_fits_on_a_page_and_needs_nothing_of_ours() -> None:
    text = Path(page.__file__).read_text()
    assert len(text.splitlines()) <= 150
    assert not re.search(r"^\s*(import|from) (megatron|tests|tools)", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [("#### 12", "12", 1), ("#### 1\n#### -3.", "-3", 1), ("12", "12", 0), ("#### 2", "12", 0)],
)
def test_the_pages_verifier(response: str, answer: str, reward: float) -> None:
    assert page.verifier(response, answer) == reward
