"""GRPO with a baseline for every prefix: what several responses share is not what they differ by.

    n  responses of the group begin with the same tokens before t, V their mean advantage,
    V' that of those which have the same token at t, too
    A^ = ((n + k) V' - n V) / (n - 1 + k),  k > 0 (``prior`` of ``algorithm.params``, 1)

It is each response's A less b = (sum of the other n - 1 advantages) / (n - 1 + k), averaged over
those that took the same token after the same prefix, whose gradient is the same: the mean reward of
the others there, drawn to the group's (0) as if k more responses had it. b does not depend on the
token or on the response's own reward, so that the policy gradient stays unbiased and only its noise
falls. A token that all take gets k / (n - 1 + k) of their mean; where a response is alone, A^ = A.

Prompts are compared as well, since agents may begin otherwise. Of an episode of several training
rows the later ones keep A.

No teacher and no pass: it costs nothing. Where responses part at once, as long ones in free prose
do, it is GRPO. The rule is ours; values of prefixes from the tree of a group are TEMPO's
(arXiv:2509.18314), which adds differences of them at branches to GRPO's advantage, without leaving
the response's own reward out. With ``rlsd_lambda`` above 0 RLSD's weight acts on A^.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_rlsd.algorithms.registry import register_algorithm
from megatron_rlsd.config import AlgorithmConfig
from megatron_rlsd.config.variants import NO_AUXILIARY, Variant
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Group


def prefix_advantages(
    group: Group, advantages: Sequence[float], algorithm: AlgorithmConfig
) -> list[Tensor]:
    """G tensors [T] float64. Raises UserError for a prior that is not above 0."""
    prior = algorithm.params["prior"]
    if not prior > 0:
        raise UserError(f"algorithm.params of {algorithm.name}: expected prior > 0, got {prior:g}")
    tokens = [t.generation.token_ids.tolist() for t in group.trajectories]
    found = [
        torch.full((len(ids),), A, dtype=torch.float64)
        for ids, A in zip(tokens, advantages, strict=True)
    ]
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, trajectory in enumerate(group.trajectories):
        by_prompt[tuple(trajectory.prompt_ids.tolist())].append(number)
    open_nodes = [(0, members) for members in by_prompt.values()]
    while open_nodes:
        place, members = open_nodes.pop()
        count = len(members)
        if count < 2:
            continue
        total = sum(advantages[each] for each in members)
        children: dict[int, list[int]] = defaultdict(list)
        for each in members:
            if place < len(tokens[each]):
                children[tokens[each][place]].append(each)
        for taken in children.values():
            value = sum(advantages[each] for each in taken) / len(taken)
            for each in taken:
                found[each][place] = ((count + prior) * value - total) / (count - 1 + prior)
            open_nodes.append((place + 1, taken))
    return found


register_algorithm(
    "prefix_baseline",
    Variant(
        fixed=NO_AUXILIARY,
        defaults={"rlsd_lambda": 0.0},
        params={"prior": 1.0},
    ),
    token_advantages=prefix_advantages,
)
