"""Ratios of whole responses whose tokens lie on several ranks equal those of whole responses."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_rlsd.ops import PolicyLossConfig, policy_loss
from megatron_rlsd.ops.reference import reference_policy_loss
from megatron_rlsd.ops.token_loss import TokenInputs
from tests.distributed.ranks import run_on_ranks

N, D, V = 31, 6, 40
CONFIG = PolicyLossConfig(
    importance_ratio="sequence", eps_clip_low=0.05, eps_clip_high=0.05, kl_coef=0.1
)


@pytest.mark.parametrize(("tensor", "context"), [(1, 2), (1, 3), (2, 2)])
def test_split_responses_equal_whole_ones(tensor, context):
    run_on_ranks(_check, tensor * context, tensor, context, seconds=120)


def _check(tensor: int, context: int) -> None:
    dist.init_process_group("gloo")
    tp_rank, cp_rank = dist.get_rank() % tensor, dist.get_rank() // tensor
    tp_groups = [dist.new_group(list(range(c * tensor, (c + 1) * tensor))) for c in range(context)]
    cp_groups = [dist.new_group(list(range(t, tensor * context, tensor))) for t in range(tensor)]

    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(N, D), normal(V, D)
    targets = torch.randint(V, (N,), generator=generator)
    ids = torch.arange(N) // 7
    advantages = normal(5)[ids]
    near = [(hidden @ weight.T).log_softmax(1)[torch.arange(N), targets] + 0.1 * normal(N)]
    near += [near[0] + 0.1 * normal(N) for _ in range(2)]
    old, teacher, ref = near
    tokens = TokenInputs(
        advantages=advantages,
        loss_weights=(torch.arange(N) % 5 != 0) / 8,
        old_log_probs=old,
        teacher_log_probs=teacher,
        ref_log_probs=ref,
    )

    whole = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    expected = reference_policy_loss(
        *whole, targets, tokens=tokens, config=CONFIG, sequence_ids=ids, softcap=2.0
    )
    expected.backward()
    # A zigzag as context parallelism cuts it; the last rank has nothing that counts.
    zigzag = torch.where(torch.arange(N) % 4 < 2, torch.arange(N) % 2, 0)
    own = zigzag == cp_rank
    split_hidden = hidden[own].clone().requires_grad_()
    shard = weight.chunk(tensor)[tp_rank].clone().requires_grad_()
    loss, _ = policy_loss(
        split_hidden,
        shard,
        targets[own],
        **vars(tokens.select(own)),
        config=CONFIG,
        sequence_ids=ids[own],
        tp_group=tp_groups[cp_rank],
        cp_group=cp_groups[tp_rank],
        softcap=2.0,
        chunk_tokens=4,
    )
    loss.backward()
    total, d_weight = loss.detach().clone(), shard.grad.clone()
    for sums in (total, d_weight):
        dist.all_reduce(sums, group=cp_groups[tp_rank])
    torch.testing.assert_close(total, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(split_hidden.grad, whole[0].grad[own], rtol=1e-9, atol=1e-12)
    expected_shard = whole[1].grad.chunk(tensor)[tp_rank]
    torch.testing.assert_close(d_weight, expected_shard, rtol=1e-9, atol=1e-12)
    dist.destroy_process_group()
