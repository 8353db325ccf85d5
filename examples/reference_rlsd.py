"""RLSD (arXiv:2604.03128) on one page: what megatron_rlsd computes, in torch and transformers.

    python examples/reference_rlsd.py MODEL QUESTIONS.jsonl OUT [STEPS]

Each line of QUESTIONS.jsonl has prompt, answer and reference_solution. The page leaves speed and
scale out: it takes one response at a time and makes full logits. The trainer's numbers are tested
against it. Numbers in brackets are the paper's equations; G responses, T tokens of a response.
"""

import json
import random
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


class Settings(NamedTuple):
    prompts_per_step: int = 16
    n_samples_per_prompt: int = 8
    max_response_tokens: int = 256
    temperature: float = 1.0
    rlsd_lambda: float = 0.5
    lambda_decay_steps: int = 60
    evidence_clip: float = 0.2
    eps_clip: tuple[float, float] = (0.2, 0.28)
    dual_clip: float = 3.0
    teacher_interval: int = 20
    lr: float = 1e-6
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    format: str = "Show your steps and end with #### and the answer."
    hint: str = "Here is a reference solution:\n\n{}\n\nNow solve the problem in your own way."


def prompt_ids(tokenizer, question: str, s: Settings, solution: str | None = None) -> list[int]:
    """The student's prompt; with a solution the teacher's, which differs by the hint alone."""
    hint = [] if solution is None else [s.hint.format(solution)]
    message = {"role": "user", "content": "\n\n".join([question, *hint, s.format])}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


@torch.no_grad()
def sample_responses(model, tokenizer, prompt: list[int], s: Settings) -> list[list[int]]:
    """G responses, each up to and with the end-of-turn token."""
    eos = tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": s.temperature, "top_k": 0, "top_p": 1.0}
    limits = {"max_new_tokens": s.max_response_tokens, "eos_token_id": eos, "pad_token_id": eos}
    ids = torch.tensor([prompt] * s.n_samples_per_prompt, device=model.device)
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), **sampling, **limits)
    return [r[: r.index(eos) + 1] if eos in r else r for r in rows[:, len(prompt) :].tolist()]


def verifier(response: str, answer: str) -> float:
    """The reward, which decides the direction of the update: is the last #### number right?"""
    found = re.findall(r"#### (-?[0-9]+)", response)
    return float(bool(found) and found[-1] == answer)


def group_advantages(rewards: Tensor) -> Tensor:
    """[G] A_i = (R_i - mean) / (std + 1e-6); 0 for a group whose rewards are all equal."""
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std(correction=1) + 1e-6)


def response_log_probs(model, prompt: list[int], response: list[int], s: Settings) -> Tensor:
    """[T] log-probability of each token of the response after this prompt."""
    ids = torch.tensor([prompt + response], device=model.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float() / s.temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def token_loss(lp: Tensor, lp_old: Tensor, lp_T: Tensor, A: Tensor, lam: float, s: Settings):
    """[T] the loss L_t of each token, and its evidence weight before the clip."""
    gain = (lp_T - lp).detach()  # (13) privileged information gain
    weight = (A.sign() * gain).exp()  # (14) evidence weight: positive, so it never turns A's sign
    clipped = weight.clamp(1 - s.evidence_clip, 1 + s.evidence_clip)  # (15)
    A = A * ((1 - lam) + lam * clipped)  # lambda = 0 is GRPO
    ratio = (lp - lp_old).exp()
    loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - s.eps_clip[0], 1 + s.eps_clip[1]))
    return torch.where(A < 0, torch.minimum(loss, -A * s.dual_clip), loss), weight


def update(student, teacher, optimizer, groups: list[tuple], lam: float, s: Settings) -> dict:
    """One optimizer step on groups: prompt, teacher's prompt, G responses, G rewards."""
    num_tokens = sum(len(r) for _, _, responses, _ in groups for r in responses)
    total, advantages, weights = 0.0, [], []
    for prompt, teacher_prompt, responses, rewards in groups:
        A = group_advantages(torch.tensor(rewards, dtype=torch.float64)).float()
        advantages.append(A)
        for advantage, response in zip(A.to(student.device), responses, strict=True):
            if advantage == 0:  # nothing to learn: no teacher, no gradient
                continue
            with torch.no_grad():
                lp_T = response_log_probs(teacher, teacher_prompt, response, s)
            lp = response_log_probs(student, prompt, response, s)
            # lp.detach(): with one update a rollout, the old policy is the current one
            losses, weight = token_loss(lp, lp.detach(), lp_T, advantage, lam, s)
            loss = losses.sum() / num_tokens  # the mean over all tokens of the step
            loss.backward()
            total += loss.item()
            weights.append(weight)
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), s.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": total, "grad_norm": norm.item(), "advantages": advantages, "weights": weights}


def adamw(model, s: Settings) -> torch.optim.AdamW:
    """As is usual, norms and biases do not decay."""
    matrices: dict = {"params": [p for p in model.parameters() if p.ndim > 1]}
    vectors: dict = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=s.lr, weight_decay=s.weight_decay)


def train(student, tokenizer, problems: list[dict], s: Settings, steps: int) -> None:
    """The whole loop: sample, verify, update with the teacher's evidence."""
    teacher, optimizer = deepcopy(student), adamw(student, s)
    for step in range(steps):
        groups = []
        for problem in random.sample(problems, s.prompts_per_step):
            prompt = prompt_ids(tokenizer, problem["prompt"], s)
            hinted = prompt_ids(tokenizer, problem["prompt"], s, problem["reference_solution"])
            responses = sample_responses(student, tokenizer, prompt, s)
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            rewards = [verifier(text, problem["answer"]) for text in texts]
            groups.append((prompt, hinted, responses, rewards))
        lam = s.rlsd_lambda * max(0.0, 1 - (step + 1) / s.lambda_decay_steps)
        result = update(student, teacher, optimizer, groups, lam, s)
        if (step + 1) % s.teacher_interval == 0:
            teacher.load_state_dict(student.state_dict())
        reward = sum(sum(rewards) for *_, rewards in groups) / len(groups) / len(rewards)
        print(f"step {step}: reward {reward:.3f}, gradient norm {result['grad_norm']:.3f}")


if __name__ == "__main__":
    base, questions, out, *steps = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    problems = [json.loads(line) for line in Path(questions).read_text().splitlines()]
    train(model, tokenizer, problems, Settings(), int(steps[0]) if steps else 100)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
