"""One step of every algorithm, against transformers in float64: the loss, and its gradient's norm.

The program's part is everything between the configuration and the update: hints, advantages, which
responses the teacher scores, weights, passes and operators. Its reference here is full logits of
another implementation of the model, autograd, and the formula.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_rlsd import train
from megatron_rlsd.config import Config
from megatron_rlsd.data import load_tokenizer
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.recovery.recording import read_step
from megatron_rlsd.recovery.replay import choose_base, replay
from megatron_rlsd.runtime.errors import UserError
from tests.algorithm_runs import NAMES, small_config
from tests.batches import plain_rows
from tests.models import save_random_model

Row = SimpleNamespace
"""A row of the batch as lists and numbers."""


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory) -> Path:
    """A teacher of the same vocabulary and tokenizer, but with other weights and another width."""
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    config.hidden_size, config.initializer_range = 48, 0.1
    folder = tmp_path_factory.mktemp("other") / "model"
    return save_random_model(config, folder, seed=5, tokenizer_of=tiny_model)


class Scorer:
    """log p [T, V] of a HF model in float64 at the response's positions."""

    def __init__(self, folder: str | Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)

    def __call__(self, prompt: list[int], response: list[int]) -> Tensor:
        logits = self.model(torch.tensor([prompt + response])).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(1)


def sampled(log_p: Tensor, response: list[int]) -> Tensor:
    return log_p.gather(1, torch.tensor(response)[:, None])[:, 0]


@torch.no_grad()
def second_score(row: Row, Q: Scorer) -> Tensor:
    """The logarithm of the mean probability under the row's further prompts."""
    scores = [sampled(Q(each, row.response_ids), row.response_ids) for each in row.contrast_prompts]
    return torch.stack(scores).exp().mean(0).log()


def selected_tokens(config: Config, row: Row, Q: Scorer) -> Tensor:
    """[T] bool: those that RLCSD moves."""
    if not (row.advantage and row.teacher_prompt_ids and row.contrast_prompts):
        return torch.zeros(len(row.response_ids), dtype=torch.bool)
    with torch.no_grad():
        lp_T = sampled(Q(row.teacher_prompt_ids, row.response_ids), row.response_ids)
    r = config.algorithm.rlsd_lambda * ((lp_T - second_score(row, Q)) / 0.02).tanh()
    return r.abs() > 0.02


def token_terms(config: Config, row: Row, S: Scorer, Q: Scorer) -> Tensor:
    """L_t of one response at ratio 1, without the divergence over the vocabulary."""
    algorithm, response, A = config.algorithm, row.response_ids, row.advantage
    lp = sampled(S(row.prompt_ids, response), response)
    A_hat = torch.full_like(lp, A).detach()
    with torch.no_grad():
        teacher = row.teacher_prompt_ids
        lp_T = sampled(Q(teacher, response), response) if teacher else None
    sign, lam = math.copysign(1, A), algorithm.rlsd_lambda
    name, clip = algorithm.name, algorithm.evidence_clip

    def reweighted(gain: Tensor) -> Tensor:
        w = (sign * gain).exp().clamp(1 - clip, 1 + clip)
        if row.evidence_span:
            start, stop = row.evidence_span
            w[:start], w[stop:] = 1, 1
        return A * ((1 - lam) + lam * w)

    extra = torch.zeros_like(lp)
    if name == "h2sd" and lp_T is not None and A > 0:
        A_hat = reweighted(lp_T - lp.detach())
    elif name == "rlsd":
        lam = algorithm.rlsd_lambda * (1 - 1 / algorithm.lambda_decay_steps)
        A_hat = reweighted(lp_T - lp.detach())
    elif name == "rlrt" and lp_T is not None and A > 0:
        A_hat = reweighted(lp.detach() - lp_T)
    elif name in ("ectr", "purified_opsd") and row.contrast_prompts:
        A_hat = reweighted(lp_T - second_score(row, Q))
    elif name == "egrsd":
        with torch.no_grad():
            log_q = Q(teacher, response)
        gate = 0.2 + 0.8 * (log_q.exp() * log_q).sum(1).exp()
        w = (sign * (lp_T - lp.detach())).exp().clamp(1 - clip, 1 + clip)
        A_hat = A * ((1 - lam) + lam * gate * w)
    elif name == "antisd":
        gain = lp_T - lp.detach()
        bound = 2 * gain.std(correction=0)
        A_hat = A + lam / 2 * (math.log(2) - (1 + gain.clamp(-bound, bound).exp()).log())
        A_hat = A_hat if A else torch.zeros_like(gain)
    elif name == "cscr":
        m = (lp_T - second_score(row, Q)).abs()
        w = 1 / (1 + m / m.mean())
        A_hat = A * w / w.mean()
    elif name == "rlcsd" and A and lp_T is not None and row.contrast_prompts:
        r = lam * ((lp_T - second_score(row, Q)) / 0.02).tanh()
        moved = (A + r).clamp(min=0) if A > 0 else (A + r).clamp(max=0)
        A_hat = torch.where(r.abs() > 0.02, moved, A)
    elif name == "prefix_baseline":
        A_hat = torch.tensor(of_tokens(row))
    elif name == "opd":
        A_hat = A_hat - algorithm.opd_coef * (lp.detach() - lp_T)
    elif name == "sdar":
        gate = torch.sigmoid(algorithm.sdar_beta * (lp_T - lp.detach()))
        extra = algorithm.sdar_coef * gate * (lp_T - lp)
    if name in ("rloo", "cispo"):
        return -A_hat * lp
    return -A_hat * (lp - lp.detach()).exp() + extra


def of_tokens(row: Row) -> list[float]:
    """[T]: a group in which all fare alike has no advantages of tokens."""
    return row.token_advantages or [row.advantage] * len(row.response_ids)


def less_the_baselines(group: list[Row], i: int) -> Tensor:
    """[T] A^ of ``prefix_baseline``: the mean, over those that go on alike, of A less the baseline
    of the others that began alike."""
    own, found = group[i].response_ids, []
    for t in range(len(own)):
        there = [row for row in group if row.response_ids[:t] == own[:t]]
        alike = [row for row in there if row.response_ids[: t + 1] == own[: t + 1]]
        sums = [sum(other.advantage for other in there if other is not row) for row in alike]
        less = [row.advantage - s / len(there) for row, s in zip(alike, sums, strict=True)]
        found.append(sum(less) / len(less))
    return torch.tensor(found)


def divergence(config: Config, log_p: Tensor, log_q: Tensor) -> Tensor:
    """[T] by the definition."""
    algorithm = config.algorithm
    p, q = log_p.exp(), log_q.exp()
    if algorithm.divergence_top_k is not None:
        chosen = q.topk(algorithm.divergence_top_k, dim=1).indices
        p, q = p.gather(1, chosen), q.gather(1, chosen)
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    m = algorithm.jsd_beta * q + (1 - algorithm.jsd_beta) * p
    forward, backward = q * (q / m).log(), p * (p / m).log()
    entropy = -torch.special.xlogy(q, q).sum(1)
    return (-algorithm.divergence_confidence * entropy).exp() * {
        "forward_kl": q * (q / p).log(),
        "reverse_kl": p * (p / q).log(),
        "jsd": algorithm.jsd_beta * forward + (1 - algorithm.jsd_beta) * backward,
    }[algorithm.divergence].sum(1)


def expected_loss(config: Config, rows: list[Row], S: Scorer, Q: Scorer) -> Tensor:
    algorithm, B = config.algorithm, len(rows)

    def distance(row: Row) -> Tensor:
        with torch.no_grad():
            log_q = Q(row.teacher_prompt_ids, row.response_ids)
        return divergence(config, S(row.prompt_ids, row.response_ids), log_q)

    if algorithm.divergence_rows == "failed":
        terms = [
            algorithm.divergence_coef * distance(row)
            if row.solved is False and row.teacher_prompt_ids
            else token_terms(config, row, S, Q)
            for row in rows
        ]
    else:
        terms = [token_terms(config, row, S, Q) for row in rows]
    if algorithm.name == "rlcsd":
        every, chosen = (
            torch.cat(terms),
            torch.cat([selected_tokens(config, row, Q) for row in rows]),
        )
        assert chosen.any()
        return every[~chosen].mean() + every[chosen].mean()
    loss = {
        "token_mean": lambda: torch.cat(terms).mean(),
        "sequence_mean": lambda: torch.stack([t.mean() for t in terms]).sum() / B,
        "fixed_length": lambda: torch.stack([t.sum() for t in terms]).sum() / (B * 10),
    }[algorithm.loss_aggregation]()
    if algorithm.divergence_coef and algorithm.divergence_rows == "hinted":
        distances = [distance(row) for row in rows if row.teacher_prompt_ids]
        loss = loss + algorithm.divergence_coef * torch.cat(distances).mean()
    return loss


def first_step(config: Config) -> dict[str, Any]:
    train.train(config)
    lines = read_metrics(Path(config.run_dir) / "metrics.jsonl")
    return next(line for line in lines if "train/loss" in line)


def run_one_step(config: Config) -> tuple[list[Row], dict[str, Any]]:
    metrics = first_step(config)
    return plain_rows(read_step(Path(config.run_dir), 0).batch), metrics


@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_the_loss_and_the_gradient_of_the_formula(
    name, tiny_model, other_model, tmp_path
):
    config = small_config(
        *(name, tmp_path / "run", tiny_model, other_model),
        *("train.steps=1", "train.global_batch_size=null", "train.record_steps=all"),
        "data.train.0.params={min_terms: 2, max_terms: 3, min_digits: 1, max_digits: 1}",
    )
    rows, metrics = run_one_step(config)
    assert name in ("opd", "opsd", "sdpo") or any(row.advantage for row in rows)
    if config.algorithm.divergence_rows == "failed":
        hinted = {(row.solved, bool(row.teacher_prompt_ids)) for row in rows if row.advantage}
        assert {(True, True), (False, True)} <= hinted
    if name == "rlcsd":
        assert max(len(row.contrast_prompts) for row in rows) > 1
    if name == "prefix_baseline":
        groups = [rows[start : start + 4] for start in range(0, len(rows), 4)]
        expected = torch.cat([less_the_baselines(group, i) for group in groups for i in range(4)])
        found = torch.tensor([each for row in rows for each in of_tokens(row)])
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found[1:], found[:-1])
    student = Scorer(tiny_model)
    teacher = Scorer(other_model) if name == "opd" else student
    loss = expected_loss(config, rows, student, teacher)
    loss.backward()
    gradients = [p.grad for p in student.model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=2e-5, abs=2e-7)
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 1e-3


@pytest.mark.parametrize("name", ["rlsd", "gspo"])
def test_truncated_responses_leave_the_loss_and_its_mean(name, tiny_model, other_model, tmp_path):
    """Means over tokens, and over responses; their rewards stay in the groups' means."""
    settings = (
        *("train.steps=1", "train.global_batch_size=null", "train.record_steps=all"),
        f"rollout.stop_token_ids={list(range(20, 90, 5))}",
    )
    whole = small_config(name, tmp_path / "whole", tiny_model, other_model, *settings)
    masked = small_config(
        *(name, tmp_path / "masked", tiny_model, other_model, *settings),
        "algorithm.mask_truncated=true",
    )
    before, _ = run_one_step(whole)
    rows, metrics = run_one_step(masked)
    assert [row.advantage for row in rows] == [row.advantage for row in before]
    kept = [row for row in rows if all(row.loss_mask)]
    assert not any(any(row.loss_mask) for row in rows if row not in kept)
    assert 1 - len(kept) / len(rows) == pytest.approx(metrics["rollout/truncated_share"])
    assert 0.2 < metrics["rollout/truncated_share"] < 0.8
    student = Scorer(tiny_model)
    loss = expected_loss(masked, kept, student, student)
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=2e-5, abs=2e-7)
    assert loss.item() != pytest.approx(expected_loss(masked, rows, student, student).item())


class SetScorer(Scorer):
    """log p [T, V] over the tokens that could be sampled, -inf elsewhere, whatever the prompt."""

    def __init__(self, folder: str | Path, rows: list[Row], top_p: float, top_k: int) -> None:
        super().__init__(folder)
        self.sets: dict[tuple[int, ...], Tensor] = {}
        for row in rows:
            with torch.no_grad():
                p = super().__call__(row.prompt_ids, row.response_ids).exp()
            ordered, order = p.sort(1, descending=True)
            inside = ordered.cumsum(1) - ordered < top_p
            inside[:, top_k:] = False
            inside = torch.zeros_like(inside).scatter(1, order, inside)
            self.sets[tuple(row.response_ids)] = inside

    def __call__(self, prompt: list[int], response: list[int]) -> Tensor:
        log_p = super().__call__(prompt, response)
        return log_p.masked_fill(~self.sets[tuple(response)], -math.inf).log_softmax(1)


@pytest.mark.parametrize(("name", "top_k"), [("rlsd", 0), ("rlcsd", 120)])
def test_all_log_probs_are_over_the_tokens_that_could_be_sampled(
    name, top_k, tiny_model, other_model, tmp_path
):
    """The policy's, the teacher's and those under wrong hints; the engine's are made so."""
    config = small_config(
        *(name, tmp_path / "run", tiny_model, other_model),
        *("train.steps=1", "train.global_batch_size=null", "train.record_steps=all"),
        *("rollout.top_p=0.8", f"rollout.top_k={top_k}"),
    )
    rows, metrics = run_one_step(config)
    student = SetScorer(tiny_model, rows, 0.8, top_k or 1000)
    loss = expected_loss(config, rows, student, student)
    loss.backward()
    gradients = [p.grad for p in student.model.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=2e-5, abs=2e-7)
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    plain = expected_loss(config, rows, Scorer(tiny_model), Scorer(tiny_model))
    assert abs(plain.item() - loss.item()) > 1e-4

    trained = [row for row in rows if row.advantage]
    sizes = torch.cat([student.sets[tuple(row.response_ids)].sum(1) for row in trained])
    assert 1 < sizes.double().mean() < (top_k or 300) + 1
    assert metrics["train/kept_tokens_mean"] == pytest.approx(sizes.double().mean().item())
    assert 0.3 < metrics["train/kept_mass_mean"] < 0.9
    assert metrics["train/kept_disagreement_share"] == 0
    assert metrics["train/rollout_log_prob_diff_max"] < 1e-4
    assert metrics["train/approx_kl"] < 1e-9
    replayed = replay(config, 0).metrics
    for key in ("train/loss", "train/grad_norm", "train/kept_tokens_mean"):
        assert replayed[key] == metrics[key], key


@pytest.mark.parametrize("name", ["rlrt", "sdpo", "ectr"])
def test_hints_come_from_the_group_and_their_absence_is_counted(
    name, tiny_model, other_model, tmp_path
):
    config = small_config(
        *(name, tmp_path / "run", tiny_model, other_model),
        *("train.steps=1", "train.record_steps=all"),
    )
    rows, metrics = run_one_step(config)
    tokenizer = load_tokenizer(config.tokenizer, tiny_model)
    texts = [tokenizer.decode(ids) for ids in (row.response_ids for row in rows)]
    solved = [
        sum(c in "02468" for c in text if c.isdigit()) / max(1, sum(map(str.isdigit, text))) >= 0.5
        for text in texts
    ]
    prompts = [row.teacher_prompt_ids for row in rows]
    if name == "ectr":
        prompts = [row.contrast_prompts[0] if row.contrast_prompts else None for row in rows]
    wanted = [not each for each in solved] if name == "ectr" else solved
    for i, prompt in enumerate(prompts):
        group = range(i // 4 * 4, i // 4 * 4 + 4)
        others = [texts[j].strip() for j in group if wanted[j] and j != i and texts[j].strip()]
        assert bool(prompt) == bool(others)
        if prompt:
            assert any(text in tokenizer.decode(prompt) for text in others)
    missing = sum(not prompt for prompt in prompts) / len(prompts)
    assert metrics["teacher/without_hint_share"] == pytest.approx(missing)
    if name == "sdpo":
        assert 0 < missing < 1
        assert metrics["teacher/skipped_share"] == pytest.approx(missing)


def test_a_span_limits_the_evidence_to_its_tokens(tiny_model, other_model, tmp_path):
    config = small_config(
        *("rlsd", tmp_path / "run", tiny_model, other_model),
        *("train.steps=1", "train.record_steps=all", "algorithm.span_end='1'"),
    )
    rows, metrics = run_one_step(config)
    tokenizer = load_tokenizer(config.tokenizer, tiny_model)
    spans = [(row.response_ids, row.evidence_span) for row in rows]
    assert any(stop < len(ids) for ids, (_, stop) in spans)
    for ids, (start, stop) in spans:
        assert start == 0
        assert "1" not in tokenizer.decode(ids[: max(0, stop - 1)])
        assert stop == len(ids) or "1" in tokenizer.decode(ids[: stop + 1])
    student = Scorer(tiny_model)
    loss = expected_loss(config, rows, student, student).item()
    assert metrics["train/loss"] == pytest.approx(loss, rel=2e-5, abs=2e-7)
    for row in rows:
        row.evidence_span = None
    assert expected_loss(config, rows, student, student).item() != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", ["sdpo", "rlrt", "ectr"])
def test_a_step_in_which_nobody_has_a_hint_ends(name, tiny_model, other_model, tmp_path):
    """sdpo then has nothing to learn from, the others are GRPO."""
    threshold = "reward.solved_threshold=" + ("-1" if name == "ectr" else "2")
    settings = (threshold, "train.steps=1", "rollout.n_samples_per_prompt=4")
    config = small_config(name, tmp_path / "run", tiny_model, other_model, *settings)
    metrics = first_step(config)
    assert metrics["teacher/without_hint_share"] == 1
    assert metrics["teacher/skipped_share"] == 1
    if name == "sdpo":
        assert metrics["train/grad_norm"] == 0
        return
    plain = small_config("grpo", tmp_path / "grpo", tiny_model, other_model, *settings)
    grpo = first_step(plain)
    assert metrics["train/grad_norm"] == grpo["train/grad_norm"]
    assert metrics["train/loss"] == grpo["train/loss"]


def test_critiques_come_from_the_data_and_a_wrong_key_is_named(tiny_model, other_model, tmp_path):
    lines = [
        {"prompt": f"What is {n} + 2?", "answer": str(n + 2), "metadata": {"note": f"Add {n}."}}
        for n in range(8)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = (
        f"data.train=[{{kind: jsonl, path: '{data}'}}]",
        "teacher.hint=critique",
        "train.steps=1",
        "train.record_steps=all",
    )
    wrong = small_config("sdpo", tmp_path / "wrong", tiny_model, other_model, *settings)
    with pytest.raises(UserError, match=r"metadata\['critique'\]"):
        train.train(wrong)
    right = small_config(
        *("sdpo", tmp_path / "right", tiny_model, other_model, *settings),
        "teacher.critique_key=note",
    )
    rows, metrics = run_one_step(right)
    tokenizer = load_tokenizer(right.tokenizer, tiny_model)
    assert all("Add " in tokenizer.decode(row.teacher_prompt_ids) for row in rows)
    assert metrics["teacher/without_hint_share"] == 0
    assert metrics["train/grad_norm"] > 0


@pytest.mark.parametrize("name", ["ectr", "opd"])
def test_a_replayed_step_needs_no_teacher(name, tiny_model, other_model, tmp_path):
    """Its scores are recorded, those under a wrong hint and another model's included."""
    config = small_config(
        *(name, tmp_path / "run", tiny_model, other_model),
        *("train.steps=1", "train.record_steps=all"),
    )
    _, metrics = run_one_step(config)
    replayed = replay(config, 0).metrics
    assert replayed["train/loss"] == metrics["train/loss"]
    assert replayed["train/grad_norm"] == metrics["train/grad_norm"]


def test_the_gate_of_a_rule_goes_on_after_a_restart_and_in_a_replay(
    tiny_model, other_model, tmp_path
):
    """antisd's warm-up takes three steps, of which the second start makes the last; then every
    teacher is too sure."""
    settings = (
        *("train.record_steps=all", "checkpoint.interval=2", "checkpoint.keep=null"),
        "algorithm.params={warmup: 3, low: 100, high: 200}",
    )

    def run(steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        config = small_config(
            *("antisd", tmp_path / "run", tiny_model, other_model, f"train.steps={steps}"),
            *settings,
        )
        train.train(config)
        state = tmp_path / f"run/checkpoints/step_{steps:08d}/state.json"
        lines = read_metrics(tmp_path / "run/metrics.jsonl")
        return [m for m in lines if "train/loss" in m], json.loads(state.read_text())["learner"]

    first, state = run(2)
    entropies = [step["teacher/entropy_mean"] for step in first]
    assert state["gate"] == {"first": pytest.approx(entropies), "is_open": True}
    steps, state = run(4)
    assert state["gate"]["first"][:2] == pytest.approx(entropies)
    assert (len(state["gate"]["first"]), state["gate"]["is_open"]) == (3, False)
    assert [step["algorithm/gate_open"] for step in steps] == [1, 1, 1, 0]
    config = small_config(
        *("antisd", tmp_path / "run", tiny_model, other_model, "train.steps=4", *settings)
    )
    replayed = replay(config, 3).metrics
    for key in ("train/loss", "train/grad_norm", "algorithm/gate_open"):
        assert replayed[key] == steps[3][key], key


def test_a_replayed_step_that_compares_distributions_has_its_teacher(
    tiny_model, other_model, tmp_path
):
    """One that follows the student, from the start and from a checkpoint."""
    config = small_config(
        *("sdpo", tmp_path / "run", tiny_model, other_model),
        *("train.steps=4", "train.record_steps=all", "checkpoint.interval=2", "optimizer.lr=0.01"),
        *("teacher.mode=ema", "teacher.ema_decay=0.5", "checkpoint.keep=null"),
    )
    train.train(config)
    steps = [m for m in read_metrics(tmp_path / "run/metrics.jsonl") if "train/loss" in m]
    for step, folder in ((3, "step_00000002"), (1, None)):
        chosen, first = choose_base(config, step, None)
        assert (chosen and chosen.name, first) == (folder, 2 if folder else 0)
        replayed = replay(config, step).metrics
        assert steps[step]["algorithm/divergence_mean"] > 0
        for key in ("train/loss", "train/grad_norm", "algorithm/divergence_mean"):
            assert replayed[key] == steps[step][key], key
