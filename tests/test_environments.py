"""Training over several turns, against transformers in float64 with the mask written out."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor

from megatron_rlsd import sft, train
from megatron_rlsd.config import Config, load_config
from megatron_rlsd.data import load_tokenizer
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.recovery.recording import read_step
from megatron_rlsd.recovery.replay import replay
from megatron_rlsd.runtime.errors import UserError
from tests.batches import plain_rows
from tests.environment_runs import CONFIGS, NAMES, conversations_config, digits_config

Row = SimpleNamespace
"""A row of the batch as lists and numbers."""
SETTINGS = {
    "rlsd": ("algorithm.rlsd_lambda=0.7",),
    # Means over responses, a term for every response, and a correction by whole responses.
    "sdar": (
        "algorithm.name=sdar",
        "algorithm.rlsd_lambda=0",
        "algorithm.loss_aggregation=sequence_mean",
        "algorithm.tis=sequence",
    ),
    "grpo_opsd": (
        "algorithm.name=grpo_opsd",
        "algorithm.rlsd_lambda=0",
        "algorithm.loss_aggregation=fixed_length",
    ),
    "agent_opsd": ("algorithm.name=agent_opsd", "algorithm.evidence_clip=0.5"),
}


def own_log_probs(model: torch.nn.Module, row: Row, prompt: list[int]) -> Tensor:
    """[own tokens, V] log p of the tokens that the policy wrote, each given all before it."""
    ids = prompt + row.response_ids
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(1)
    return log_p[[len(prompt) - 1 + t for t, own in enumerate(row.loss_mask) if own]]


def own_tokens(row: Row) -> Tensor:
    pairs = zip(row.response_ids, row.loss_mask, strict=True)
    return torch.tensor([token for token, own in pairs if own])[:, None]


def expected_loss(config: Config, rows: list[Row], model: torch.nn.Module) -> Tensor:
    """The loss at ratio 1, from its definition."""
    algorithm, terms, distances = config.algorithm, [], []
    for row in rows:
        A, chosen = row.advantage, own_tokens(row)
        log_p = own_log_probs(model, row, row.prompt_ids)
        with torch.no_grad():
            log_q = own_log_probs(model, row, row.teacher_prompt_ids)
        lp, lp_T = log_p.gather(1, chosen)[:, 0], log_q.gather(1, chosen)[:, 0]
        if algorithm.name == "agent_opsd":
            w = turn_weights(row, (lp_T - lp.detach()).tolist(), algorithm.evidence_clip)
        else:
            w = (math.copysign(1, A) * (lp_T - lp.detach())).exp()
        clip, lam = algorithm.evidence_clip, algorithm.rlsd_lambda
        A_hat = A * (1 - lam + lam * w.clamp(1 - clip, 1 + clip))
        term = -A_hat * (lp - lp.detach()).exp()
        if algorithm.sdar_coef:
            gate = torch.sigmoid(algorithm.sdar_beta * (lp_T - lp.detach()))
            term = term + algorithm.sdar_coef * gate * (lp_T - lp)
        terms.append(term)
        p, q = log_p.exp(), log_q.exp()
        m = (p + q) / 2
        distances.append(((q * (q / m).log() + p * (p / m).log()) / 2).sum(1))
    B = len(rows)
    if algorithm.loss_aggregation == "token_mean":
        return torch.cat(terms).mean()
    if algorithm.loss_aggregation == "sequence_mean":
        return sum(term.mean() for term in terms) / B
    scale = B * config.rollout.max_response_tokens
    divergence = algorithm.divergence_coef * torch.cat(distances).sum() / scale
    return torch.cat(terms).sum() / scale + divergence


def turn_weights(row: Row, gains: list[float], clip: float) -> Tensor:
    """[own tokens] 1 + b sign(A) z of the token's turn (arXiv:2608.05987)."""
    turns: list[list[float]] = []
    own_before, left = False, iter(gains)
    for own in row.loss_mask:
        if own:
            turns += [] if own_before else [[]]
            turns[-1].append(next(left))
        own_before = own
    if len(turns) < 2:
        return torch.ones(len(gains))
    start = min(max(row.group_solved_share, 1e-4), 1 - 1e-4)
    centre = sum(gains) / len(turns)
    logit, V = math.log(start / (1 - start)), [start]
    for turn in turns:
        logit += sum(turn) - centre
        V.append(1 / (1 + math.exp(-logit)))
    steps = [after - before for before, after in itertools.pairwise(V)]
    mean, spread = statistics.fmean(steps), statistics.pstdev(steps)
    weights = [1 + clip * math.copysign(1, row.advantage) * (q - mean) / spread for q in steps]
    return torch.tensor([w for w, turn in zip(weights, turns, strict=True) for _ in turn])


def one_step(config: Config) -> tuple[list[Row], dict[str, float]]:
    train.train(config)
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    rows = plain_rows(read_step(Path(config.run_dir), 0).batch)
    return rows, next(x for x in lines if "train/loss" in x)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_over_several_turns_has_the_loss_and_gradient_of_the_formula(
    name, tiny_model, tmp_path
):
    config = digits_config(tmp_path / "run", tiny_model, *SETTINGS[name])
    rows, metrics = one_step(config)
    assert sum(False in row.loss_mask for row in rows) >= 4
    assert any(row.advantage for row in rows)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    loss = expected_loss(config, rows, model)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    # Products over responses of probabilities in float32 differ from 1 by about 1e-5.
    tolerance = 2e-6 if name == "sdar" else 2e-7
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=2e-5, abs=tolerance)
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 1e-3
    # The engine's probabilities of what it sampled, and of nothing else, are compared.
    assert metrics["train/rollout_log_prob_diff_max"] < 1e-4
    if name == "rlsd":
        with torch.no_grad():
            log_p = [own_log_probs(model, row, row.prompt_ids) for row in rows]
        entropy = torch.cat(
            [
                -(each.exp() * each).sum(1)
                for each, row in zip(log_p, rows, strict=True)
                if row.advantage
            ]
        )
        assert metrics["train/entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
        assert metrics["noise/gain_abs_max"] < 1e-4
        check_dump(config, rows, log_p)
        replayed = replay(config, 0).metrics
        assert replayed["train/loss"] == metrics["train/loss"]
        assert replayed["train/grad_norm"] == metrics["train/grad_norm"]


def check_dump(config: Config, rows: list[Row], log_p: list[Tensor]) -> None:
    """The sample dump has the update's numbers at the model's tokens, and none at the others."""
    text = (Path(config.run_dir) / "samples/step_000000.jsonl").read_text()
    for row, scores, line in zip(rows, log_p, text.splitlines(), strict=True):
        columns = json.loads(line)["token_columns"]
        columns.setdefault("log_probs", [None] * len(columns["id"]))
        mask = row.loss_mask
        assert columns["id"] == row.response_ids
        assert columns.get("own", mask) == mask
        lp = iter(scores.gather(1, own_tokens(row))[:, 0].tolist())
        for t, own in enumerate(mask):
            found = columns["rollout_log_probs"][t]
            assert (found is None) == (not own)
            scored = columns["log_probs"][t]
            assert (scored is None) == (not own or row.advantage == 0)
            if own:
                assert found == pytest.approx(next(lp), abs=1e-3)
                assert scored is None or scored == pytest.approx(found, abs=1e-3)


def test_a_supervised_step_learns_every_turn_of_the_assistant_and_nothing_else(
    tiny_model, tmp_path
):
    """Against whole conversations as the chat template renders them, the prompt by hand."""
    config = conversations_config(tmp_path / "run", tiny_model, "sft.steps=1", "data.eval=[]")
    sft.train(config)
    measured = read_metrics(Path(config.run_dir) / "metrics.jsonl")[0]
    tokenizer = load_tokenizer(config.tokenizer, tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
    terms = []
    for line in (tmp_path / "games.jsonl").read_text().splitlines():
        told = json.loads(line)
        question, *turns = told["messages"]
        hint = ["A good line of guesses:", told["reference_solution"], "Now guess."]
        paragraphs = [question["content"], *(hint if told["privileged"] else [])]
        content = "\n\n".join([*paragraphs, "Guess like #### 5"])
        messages = [{"role": "user", "content": content}, *turns]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(1)
        for at in range(1, len(messages), 2):
            start = len(tokenizer.apply_chat_template(messages[:at]))
            stop = len(
                tokenizer.apply_chat_template(messages[: at + 1], add_generation_prompt=False)
            )
            terms += [-log_p[t - 1, ids[t]] for t in range(start, stop)]
    loss = torch.stack(terms).mean()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert measured["train/target_tokens"] == len(terms)
    assert measured["train/loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert measured["train/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_rl_refuses_conversations(tiny_model, tmp_path):
    config = conversations_config(tmp_path / "run", tiny_model)
    with pytest.raises(UserError, match=r"games\.jsonl:\d+ ends with the assistant's turn"):
        train.train(config)


def test_without_a_hint_the_gain_over_a_trajectory_is_exactly_zero(tiny_model, tmp_path):
    settings = ("teacher.hint=none", "teacher.mode=live", "algorithm.rlsd_lambda=1")
    rows, metrics = one_step(digits_config(tmp_path / "run", tiny_model, *settings))
    assert any(False in row.loss_mask for row in rows)
    assert metrics["algorithm/gain_abs_max"] == 0
    assert metrics["algorithm/evidence_weight_mean"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_example_asks_for_the_environment_it_is_named_after(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.environment.name == name
    assert [each.name for each in config.reward.functions] == ["environment"]


def test_the_guides_own_environment_trains(tiny_model, tmp_path, monkeypatch):
    """docs/environments.md: its file and its configuration, as they stand there."""
    text = (CONFIGS.parents[2] / "docs/environments.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (settings,) = re.findall(r"```yaml\n(# my_run.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("second_try.py").write_text(code)
    Path("my_run.yaml").write_text(settings)
    config = load_config(
        "my_run.yaml",
        [
            f"model.hf_path={tiny_model}",
            "environment.workers=1",
            "environment.max_turn_tokens=8",
            "environment.on_error=stop",
            "rollout.prompts_per_step=1",
            "reward.workers=1",
            "train.steps=1",
            "train.record_steps=all",
            "observability.tensorboard=false",
            "observability.progress=none",
        ],
    )
    _, metrics = one_step(config)
    assert metrics["rollout/environment_error_share"] == 0
    assert metrics["rollout/turns_mean"] > 1
