"""Every algorithm's loss and gradients in float64, against its formula written out response by
response over full logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_rlsd.algorithms import (
    ScoredResponse,
    group_advantages,
    own_functions,
    part_factors,
    token_loss_weights,
    turns_of,
)
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.learner.plan import policy_loss_config
from megatron_rlsd.learner.scoring import log_mean_exp
from megatron_rlsd.ops import DivergenceConfig, divergence_loss, policy_loss
from megatron_rlsd.types import Generation, Group, Problem, RewardResult, Trajectory

D, V = 5, 31
REWARDS = [[1.0, 0.0, 0.0, 0.25], [0.5, 1.0, 0.0]]
LENGTHS = [3, 1, 6, 2, 4, 5, 2]
MAX_TOKENS = 9
FAILED = (1, 2, 6)
"""Known to be wrong, with a hint: the rows that ``divergence_rows`` failed is about."""
SOLVED_SHARES = [0.25] * 4 + [2 / 3] * 3
T = sum(LENGTHS)
B = len(LENGTHS)


@dataclass
class Data:
    """Seven responses to two questions; each list has one entry per response."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    old: list[Tensor]
    teacher: list[Tensor]
    wrong: list[Tensor]
    reference: list[Tensor]
    several_wrong: list[Tensor]
    """[3, T] each: under three wrong hints."""

    def distributions(self) -> tuple[list[Tensor], list[Tensor]]:
        """log p of the student, differentiable, and log q of the teacher, [T, V] each."""
        log_p = (self.hidden @ self.weight.T).log_softmax(1)
        log_q = (self.teacher_hidden @ self.teacher_weight.T).log_softmax(1)
        return list(log_p.split(LENGTHS)), list(log_q.split(LENGTHS))

    def log_probs(self) -> list[Tensor]:
        """Of the sampled tokens, by response."""
        log_p, _ = self.distributions()
        targets = self.targets.split(LENGTHS)
        return [rows.gather(1, y[:, None])[:, 0] for rows, y in zip(log_p, targets, strict=True)]


@pytest.fixture
def data() -> Data:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(T, D), normal(V, D)
    targets = torch.randint(V, (T,), generator=generator)
    log_probs = (hidden @ weight.T).log_softmax(1).gather(1, targets[:, None])[:, 0]
    old, teacher, wrong = (
        list((log_probs + normal(T, scale=scale)).split(LENGTHS)) for scale in (1.2, 0.4, 0.4)
    )
    return Data(
        *(hidden.requires_grad_(), weight.requires_grad_(), targets),
        *(hidden.detach() + normal(T, D, scale=0.3), weight.detach() + normal(V, D, scale=0.3)),
        *(old, teacher, wrong),
        list((log_probs + normal(T, scale=0.6)).split(LENGTHS)),
        list((log_probs + normal(3, T, scale=0.4)).split(LENGTHS, dim=1)),
    )


def by_group(mode: str) -> list[float]:
    """Advantages by their definitions."""
    found = []
    for rewards in REWARDS:
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        for r in rewards:
            others = (sum(rewards) - r) / (len(rewards) - 1)
            found.append(
                {
                    "group_std": (r - mean) / (spread + 1e-6),
                    "group_mean": r - mean,
                    "leave_one_out": r - others,
                }[mode]
            )
    return found


def clip_loss(A: Tensor, rho: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    loss = -torch.minimum(A * rho, A * rho.clamp(1 - low, 1 + high))
    return loss if dual is None else torch.where(A < 0, torch.minimum(loss, -A * dual), loss)


def each(data: Data, term: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """``term(response number, its log-probabilities)`` of all responses."""
    return [term(i, lp) for i, lp in enumerate(data.log_probs())]


def token_mean(terms: list[Tensor]) -> Tensor:
    return torch.cat(terms).mean()


def grpo_terms(data: Data, mode="group_std", low=0.2, high=0.28, dual=3.0) -> list[Tensor]:
    A = by_group(mode)
    return each(
        data,
        lambda i, lp: clip_loss(
            torch.full_like(lp, A[i]), (lp - data.old[i]).exp(), low, high, dual
        ),
    )


def weighed(data: Data, clip: float, lam: float, signal, only=lambda A: True) -> Tensor:
    return token_mean(weighed_terms(data, clip, lam, signal, only))


def weighed_terms(data: Data, clip: float, lam: float, signal, only=lambda A: True) -> list[Tensor]:
    """RLSD's loss for a gain ``signal(response number, its log-probabilities)``."""
    A = by_group("group_std")

    def term(i: int, lp: Tensor) -> Tensor:
        w = (math.copysign(1, A[i]) * signal(i, lp.detach())).exp().clamp(1 - clip, 1 + clip)
        if not only(A[i]):
            w = torch.ones_like(w)
        A_hat = A[i] * ((1 - lam) + lam * w)
        return clip_loss(A_hat, (lp - data.old[i]).exp(), 0.2, 0.28, 3.0)

    return each(data, term)


def dr_grpo(data: Data) -> Tensor:
    terms = grpo_terms(data, "group_mean", 0.2, 0.2, None)
    return torch.stack([t.sum() for t in terms]).sum() / (B * MAX_TOKENS)


def rloo(data: Data) -> Tensor:
    A = by_group("leave_one_out")
    return torch.stack(each(data, lambda i, lp: -A[i] * lp.sum())).sum() / (B * MAX_TOKENS)


def gspo(data: Data) -> Tensor:
    A = by_group("group_std")

    def term(i: int, lp: Tensor) -> Tensor:
        s = ((lp - data.old[i]).sum() / len(lp)).exp()
        return -torch.minimum(A[i] * s, A[i] * s.clamp(1 - 0.3, 1 + 0.4))

    return torch.stack(each(data, term)).sum() / B


def cispo(data: Data) -> Tensor:
    A = by_group("group_std")
    return token_mean(
        each(data, lambda i, lp: -(lp - data.old[i]).exp().clamp(0, 1.2).detach() * A[i] * lp)
    )


def sdar(data: Data) -> Tensor:
    def term(i: int, lp: Tensor) -> Tensor:
        gate = 1 / (1 + (-5 * (data.teacher[i] - lp.detach())).exp())
        return 0.3 * gate * (data.teacher[i] - lp)

    return token_mean(grpo_terms(data)) + token_mean(each(data, term))


def opd(data: Data) -> Tensor:
    A = by_group("group_std")

    def term(i: int, lp: Tensor) -> Tensor:
        A_hat = A[i] - 0.7 * (lp.detach() - data.teacher[i])
        return clip_loss(A_hat, (lp - data.old[i]).exp(), 0.2, 0.28, None)

    return token_mean(each(data, term))


def distances(data: Data, kind: str, top_k: int | None = None, beta: float = 0) -> list[Tensor]:
    """D of each token, by response, weighted by exp(-beta H(q))."""
    rows = []
    for log_p, log_q in zip(*data.distributions(), strict=True):
        p, q = log_p.exp(), log_q.exp()
        if top_k is not None:
            chosen = log_q.argsort(1, descending=True)[:, :top_k]
            p, q = p.gather(1, chosen), q.gather(1, chosen)
            p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        m = 0.3 * q + 0.7 * p
        confidence = (beta * (q * q.log()).sum(1)).exp()
        rows.append(
            confidence
            * {
                "forward_kl": q * (q / p).log(),
                "reverse_kl": p * (p / q).log(),
                "jsd": 0.3 * q * (q / m).log() + 0.7 * p * (p / m).log(),
            }[kind].sum(1)
        )
    return rows


def divergence(data: Data, kind: str, without: tuple[int, ...] = (), top_k=None) -> Tensor:
    found = enumerate(distances(data, kind, top_k))
    return token_mean([rows for i, rows in found if i not in without])


def routed(data: Data, terms: list[Tensor], kind: str, beta: float = 0) -> Tensor:
    """Failed responses learn from the teacher's distribution, with coefficient 0.4."""
    found = distances(data, kind, beta=beta)
    return token_mean([0.4 * found[i] if i in FAILED else terms[i] for i in range(B)])


def sdpg(data: Data) -> Tensor:
    pull = each(data, lambda i, lp: 0.3 / 2 * (lp - data.reference[i]) ** 2)
    clipped = token_mean(grpo_terms(data, dual=None))
    return clipped + 0.2 * divergence(data, "reverse_kl") + token_mean(pull)


def agent_opsd(data: Data) -> Tensor:
    """A response's turns are its first two tokens, the next two, and the rest."""
    A = by_group("group_std")

    def term(i: int, lp: Tensor) -> Tensor:
        u = [float(each) for each in data.teacher[i] - data.old[i]]
        weights = [1.0] * len(u)
        if len(u) > 2:
            solved = SOLVED_SHARES[i]
            turns = [part for part in (u[:2], u[2:4], u[4:]) if part]
            D = [sum(part) for part in turns]
            logit, V = math.log(solved / (1 - solved)), [solved]
            for gain in D:
                logit += gain - sum(D) / len(D)
                V.append(1 / (1 + math.exp(-logit)))
            q = [after - before for before, after in itertools.pairwise(V)]
            mean = sum(q) / len(q)
            std = math.sqrt(sum((each - mean) ** 2 for each in q) / len(q))
            w = [1 + 0.3 * math.copysign(1, A[i]) * (each - mean) / std for each in q]
            weights = [
                min(max(each, 0.7), 1.3) for each, part in zip(w, turns, strict=True) for _ in part
            ]
        A_hat = A[i] * (0.4 + 0.6 * torch.tensor(weights, dtype=torch.float64))
        return clip_loss(A_hat, (lp - data.old[i]).exp(), 0.2, 0.28, 3.0)

    return token_mean(each(data, term))


def entropies(data: Data, i: int) -> list[float]:
    """H of the teacher's distributions in response i."""
    _, log_q = data.distributions()
    return [-sum(math.exp(each) * each for each in row) for row in log_q[i].tolist()]


def egrsd(data: Data) -> Tensor:
    A = by_group("group_std")

    def term(i: int, lp: Tensor) -> Tensor:
        u = (data.teacher[i] - data.old[i]).tolist()
        weights = []
        for gain, H in zip(u, entropies(data, i), strict=True):
            w = min(max(math.exp(math.copysign(1, A[i]) * gain), 0.7), 1.3)
            weights.append(0.4 + 0.6 * (0.1 + 0.9 * math.exp(-0.5 * H)) * w)
        A_hat = A[i] * torch.tensor(weights, dtype=torch.float64)
        return clip_loss(A_hat, (lp - data.old[i]).exp(), 0.2, 0.28, 3.0)

    return token_mean(each(data, term))


def antisd(data: Data) -> Tensor:
    A = by_group("group_std")

    def term(i: int, lp: Tensor) -> Tensor:
        u = (data.teacher[i] - data.old[i]).tolist()
        mean = sum(u) / len(u)
        most = 2 * math.sqrt(sum((each - mean) ** 2 for each in u) / len(u))
        bounded = [min(max(each, -most), most) for each in u]
        A_hat = [A[i] + 0.3 * (math.log(2) - math.log(1 + math.exp(each))) for each in bounded]
        rho = (lp - data.old[i]).exp()
        return clip_loss(torch.tensor(A_hat, dtype=torch.float64), rho, 0.2, 0.28, 3.0)

    return token_mean(each(data, term))


def cscr(data: Data) -> Tensor:
    A = by_group("group_std")

    def term(i: int, lp: Tensor) -> Tensor:
        m = [abs(each) for each in (data.teacher[i] - data.wrong[i]).tolist()]
        damped = [1 / (1 + 2 * each * len(m) / sum(m)) for each in m]
        weights = [0.2 + 0.8 * each * len(m) / sum(damped) for each in damped]
        A_hat = A[i] * torch.tensor(weights, dtype=torch.float64)
        return clip_loss(A_hat, (lp - data.old[i]).exp(), 0.2, 0.28, 3.0)

    return token_mean(each(data, term))


def begins_alike(data: Data) -> list[tuple[int, ...]]:
    """Tokens of the responses for rules that look at what they share: of two kinds, by parity."""
    return [tuple((ids % 2).tolist()) for ids in data.targets.split(LENGTHS)]


def prefix_baseline(data: Data) -> Tensor:
    """Each response's A less the baseline of the others there, averaged over those that go on
    alike."""
    A, ids, terms = by_group("group_std"), begins_alike(data), []
    shared = 0
    for i, lp in enumerate(data.log_probs()):
        group = range(4) if i < 4 else range(4, 7)
        A_hat = []
        for t in range(len(lp)):
            node = [j for j in group if ids[j][:t] == ids[i][:t]]
            alike = [j for j in node if ids[j][: t + 1] == ids[i][: t + 1]]
            less = [A[j] - sum(A[o] for o in node if o != j) / (len(node) + 0.5) for j in alike]
            A_hat.append(sum(less) / len(less))
            shared += len(alike) > 1
        rho = (lp - data.old[i]).exp()
        terms.append(clip_loss(torch.tensor(A_hat, dtype=torch.float64), rho, 0.2, 0.28, 3.0))
    assert 3 < shared < T - 3
    return token_mean(terms)


def rlcsd(data: Data) -> Tensor:
    A = by_group("group_std")
    apart: dict[bool, list[Tensor]] = {True: [], False: []}
    for i, lp in enumerate(data.log_probs()):
        for t in range(len(lp)):
            wrong = sum(math.exp(each) for each in data.several_wrong[i][:, t]) / 3
            e = float(data.teacher[i][t]) - math.log(wrong)
            r = min(max(1.5 * 0.6 * math.tanh(e / 0.3), -2), 2)
            shifted = max(0.0, A[i] + r) if A[i] > 0 else min(0.0, A[i] + r)
            selected = abs(r) > 0.4
            A_hat = torch.tensor(shifted if selected else A[i], dtype=torch.float64)
            rho = (lp[t] - data.old[i][t]).exp()
            apart[selected].append(clip_loss(A_hat, rho, 0.2, 0.28, 3.0))
    assert min(map(len, apart.values())) > 3
    return torch.stack(apart[False]).mean() + 0.7 * torch.stack(apart[True]).mean()


CASES: dict[str, tuple[dict[str, object], Callable[[Data], Tensor]]] = {
    "grpo": ({}, lambda d: token_mean(grpo_terms(d))),
    "dr_grpo": ({}, dr_grpo),
    "rloo": ({}, rloo),
    "dapo": ({}, lambda d: token_mean(grpo_terms(d, dual=None))),
    "gspo": ({"eps_clip_low": 0.3, "eps_clip_high": 0.4}, gspo),
    "cispo": ({"eps_clip_high": 0.2}, cispo),
    "rlsd": (
        {"rlsd_lambda": 0.6},
        lambda d: weighed(d, 0.2, 0.6, lambda i, lp: d.teacher[i] - lp),
    ),
    "rlsd, negative only": (
        {"rlsd_lambda": 0.6, "negative_only": True},
        lambda d: weighed(d, 0.2, 0.6, lambda i, lp: d.teacher[i] - lp, lambda A: A < 0),
    ),
    "rlrt": (
        {"rlsd_lambda": 0.6},
        lambda d: weighed(d, 1.0, 0.6, lambda i, lp: lp - d.teacher[i], lambda A: A > 0),
    ),
    "rlrt, both signs": (
        {"rlsd_lambda": 0.6, "positive_only": False, "evidence_clip": 0.2},
        lambda d: weighed(d, 0.2, 0.6, lambda i, lp: lp - d.teacher[i]),
    ),
    "ectr": (
        {"rlsd_lambda": 0.6},
        lambda d: weighed(d, 0.5, 0.6, lambda i, lp: d.teacher[i] - d.wrong[i]),
    ),
    "purified_opsd": (
        {"rlsd_lambda": 0.4},
        lambda d: weighed(d, 0.5, 0.4, lambda i, lp: d.teacher[i] - d.wrong[i]),
    ),
    "agent_opsd": ({"rlsd_lambda": 0.6, "evidence_clip": 0.3}, agent_opsd),
    "rlcsd": (
        {
            "rlsd_lambda": 0.6,
            "params": {"tau": 0.3, "beta": 1.5, "delta": 0.4, "eta": 0.7},
        },
        rlcsd,
    ),
    "egrsd": (
        {"rlsd_lambda": 0.6, "evidence_clip": 0.3, "params": {"floor": 0.1, "slope": 0.5}},
        egrsd,
    ),
    "antisd": ({"rlsd_lambda": 0.6}, antisd),
    "cscr": ({"rlsd_lambda": 0.8, "params": {"damping": 2.0}}, cscr),
    "prefix_baseline": ({"params": {"prior": 1.5}}, prefix_baseline),
    "sdar": ({"sdar_coef": 0.3}, sdar),
    "opd": ({"opd_coef": 0.7}, opd),
    "opsd": ({"divergence": "jsd", "jsd_beta": 0.3}, lambda d: divergence(d, "jsd")),
    "opsd, forward": ({"divergence": "forward_kl"}, lambda d: divergence(d, "forward_kl")),
    "opsd, top 4": (
        {"divergence": "jsd", "jsd_beta": 0.3, "divergence_top_k": 4},
        lambda d: divergence(d, "jsd", top_k=4),
    ),
    "sdpo": (
        {"divergence": "reverse_kl"},
        lambda d: divergence(d, "reverse_kl", without=(0, 4)),
    ),
    "grpo_opsd": (
        {"divergence": "reverse_kl", "divergence_coef": 0.2},
        lambda d: token_mean(grpo_terms(d)) + 0.2 * divergence(d, "reverse_kl"),
    ),
    "sdpg": ({"divergence_coef": 0.2, "kl_coef": 0.3}, sdpg),
    "srpo": (
        {"divergence_coef": 0.4, "divergence_confidence": 0.7, "jsd_beta": 0.3},
        lambda d: routed(d, grpo_terms(d), "jsd", beta=0.7),
    ),
    "h2sd": (
        {"divergence_coef": 0.4, "rlsd_lambda": 0.6},
        lambda d: routed(
            d,
            weighed_terms(d, 0.2, 0.6, lambda i, lp: d.teacher[i] - lp, lambda A: A > 0),
            "reverse_kl",
        ),
    ),
}


def contrast(data: Data, name: str) -> list[Tensor]:
    """The second score of each response."""
    return [*map(log_mean_exp, data.several_wrong)] if name == "rlcsd" else data.wrong


def scored(data: Data, name: str, i: int, A: float, lam: float) -> ScoredResponse:
    q = [rows.detach() for rows in data.distributions()[1]]
    # An environment wrote two tokens after the second one, and one after the fourth.
    places = torch.tensor([0, 1, 4, 5, 7, 8, 9])[: LENGTHS[i]]
    return ScoredResponse(
        advantage=A,
        rlsd_lambda=lam,
        log_probs=data.old[i],
        teacher_log_probs=data.teacher[i],
        contrast_log_probs=contrast(data, name)[i],
        teacher_entropy=-(q[i].exp() * q[i]).sum(1),
        turns=turns_of(places),
        group_solved_share=SOLVED_SHARES[i],
    )


def scored_group(tokens: list[tuple[int, ...]], rewards: list[float]) -> Group:
    problem = Problem("1", ({"role": "user", "content": "?"},), "7")
    return Group(
        problem,
        [
            Trajectory(
                problem=problem,
                prompt_ids=np.zeros(1, np.int32),
                generation=Generation.of(ids, [0.0] * len(ids), "stop", 0),
                reward=RewardResult(reward, {}),
            )
            for ids, reward in zip(tokens, rewards, strict=True)
        ],
    )


def operators(data: Data, algorithm: AlgorithmConfig, without: tuple[int, ...]) -> Tensor:
    """The same loss as the learner forms it: advantages, weights, and the operators of ops."""
    lengths = torch.tensor(LENGTHS)
    assert algorithm.advantage != "own"
    A = torch.cat([group_advantages(rewards, algorithm.advantage) for rewards in REWARDS])
    advantages = list(A.repeat_interleave(lengths).split(LENGTHS))
    lam = 0.0 if algorithm.name == "grpo" else algorithm.rlsd_lambda
    if (spread := own_functions(algorithm).token_advantages) is not None:
        ids = begins_alike(data)
        of_tokens: list[Tensor] = []
        for places, rewards in ((range(4), REWARDS[0]), (range(4, 7), REWARDS[1])):
            group = scored_group([ids[i] for i in places], rewards)
            of_tokens += spread(group, [float(A[i]) for i in places], algorithm)
        advantages = of_tokens
    if (rule := own_functions(algorithm).token_credit) is not None:
        responses = (scored(data, algorithm.name, i, float(A[i]), lam) for i in range(B))
        credits = [rule(each, algorithm) for each in responses]
        advantages, lam = [c if isinstance(c, Tensor) else c.advantages for c in credits], 0.0
    weights = token_loss_weights(LENGTHS, algorithm.loss_aggregation, MAX_TOKENS)
    factors = torch.ones(T, dtype=torch.float64)
    if rule is not None and not isinstance(credits[0], Tensor):
        selected = torch.cat([c.selected for c in credits if not isinstance(c, Tensor)])
        each_token = weights.repeat_interleave(lengths)
        factors = part_factors(selected, each_token, float(each_token.sum()), lambda sums: sums)
    distilled_weights = weights
    if algorithm.divergence_rows == "failed":
        has_failed = torch.tensor([i in FAILED for i in range(B)])
        weights, distilled_weights = weights * ~has_failed, weights * has_failed
    loss, _ = policy_loss(
        data.hidden,
        data.weight,
        data.targets,
        advantages=torch.cat(advantages) * factors,
        loss_weights=weights.repeat_interleave(lengths),
        config=policy_loss_config(algorithm, lam),
        old_log_probs=torch.cat(data.old),
        teacher_log_probs=torch.cat(data.teacher),
        ref_log_probs=torch.cat(data.reference) if algorithm.kl_coef else None,
        contrast_log_probs=torch.cat(data.wrong) if algorithm.contrasts_hints else None,
        sequence_ids=torch.arange(B).repeat_interleave(lengths),
    )
    if algorithm.divergence_coef:
        if algorithm.divergence_rows == "hinted":
            taught = [0 if i in without else length for i, length in enumerate(LENGTHS)]
            distilled_weights = token_loss_weights(taught, algorithm.loss_aggregation, MAX_TOKENS)
        distilled, _ = divergence_loss(
            *(data.hidden, data.weight, data.teacher_hidden, data.teacher_weight),
            torch.arange(T),
            loss_weights=algorithm.divergence_coef * distilled_weights.repeat_interleave(lengths),
            config=DivergenceConfig(
                *(algorithm.divergence, algorithm.jsd_beta, algorithm.divergence_top_k),
                confidence=algorithm.divergence_confidence,
            ),
        )
        loss = loss + distilled
    return loss


@pytest.mark.parametrize("case", CASES)
def test_the_operators_compute_the_formula(case, data):
    settings, formula = CASES[case]
    name = case.split(",")[0]
    loss = operators(data, AlgorithmConfig(name=name, **settings), (0, 4) if case == "sdpo" else ())
    expected = formula(data)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    leaves = [data.hidden, data.weight]
    ours, theirs = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)
    assert all(g.abs().max() > 1e-3 for g in theirs)
    for gradient, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-11)


def test_every_algorithm_has_a_case_and_the_cases_differ(data):
    from megatron_rlsd.config.variants import VARIANTS

    assert {case.split(",")[0] for case in CASES} == set(VARIANTS)
    values = [round(formula(data).item(), 9) for _, formula in CASES.values()]
    assert len(set(values)) == len(values)
