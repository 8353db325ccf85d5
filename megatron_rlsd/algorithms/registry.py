"""Algorithms with functions of their own: a Variant, and what no setting can say.

Those of users, and those of ``algorithms.rules``.

``plugins`` of the configuration names the file that registers one (docs/extending.md).

Shapes: G responses to one question; N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_rlsd.algorithms.advantages import group_advantages
from megatron_rlsd.algorithms.readings import ScoreGroup
from megatron_rlsd.algorithms.token_credit import StepGate, TokenCreditRule
from megatron_rlsd.config import AlgorithmConfig, TeacherConfig
from megatron_rlsd.config.variants import VARIANTS, Variant
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import Group

Advantages = Callable[[Group], Sequence[float] | Tensor]
"""A scored group -> [G] finite advantages, in the order of its trajectories. 0: a response that
nothing is learned from. Called on rank 0, with the responses that have a verdict."""

EvidenceWeight = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(gain, advantages, log_probs), each [N] -> [N] weights in place of exp(sign(A) gain).

gain is that of ``algorithm.evidence``, advantages those of the responses, log_probs the current
policy's, without gradient. Tokens come in chunks of any size and order, so a weight may depend on
its own token alone. It is clipped to 1 -+ ``evidence_clip`` and mixed in by ``rlsd_lambda`` as
usual, and 1 where the teacher did not score the token. Called on every rank of the last stage, on
its device."""


TokenAdvantages = Callable[[Group, Sequence[float], AlgorithmConfig], Sequence[Tensor]]
"""(the responses to one question that have a verdict, their [G] advantages, the settings) -> G
tensors [T], an advantage for each of a response's tokens; those of an environment are not looked
at. Called on rank 0. A response of advantage 0 has no gradient all the same."""


Reads = Literal["policy", "teacher_entropy"]
"""policy: the log-probabilities of the policy before the update, which cost a pass.
teacher_entropy: that of the teacher's distribution at each token, which comes with its pass."""
POLICY: frozenset[Reads] = frozenset({"policy"})


@dataclass(frozen=True)
class OwnFunctions:
    """What an algorithm computes by itself; None: as the settings say."""

    advantages: Advantages | None = None
    token_advantages: TokenAdvantages | None = None
    evidence_weight: EvidenceWeight | None = None
    token_credit: TokenCreditRule | None = None
    """Called on every rank of the last stage, on its device, with each response that the teacher
    has scored; the loss then takes its advantages as they are."""
    reads: frozenset[Reads] = POLICY
    """What ``token_credit`` needs beside the teacher's log-probabilities."""
    gate: Callable[[AlgorithmConfig], StepGate] | None = None
    """Makes what switches ``token_credit`` on and off from step to step."""
    score_group: ScoreGroup | None = None
    """Called on rank 0 with each scored group: the hints that the teacher reads."""


_OWN: dict[str, OwnFunctions] = {}


def register_algorithm(
    name: str,
    variant: Variant,
    *,
    advantages: Advantages | None = None,
    token_advantages: TokenAdvantages | None = None,
    evidence_weight: EvidenceWeight | None = None,
    token_credit: TokenCreditRule | None = None,
    reads: Collection[Reads] = POLICY,
    gate: Callable[[AlgorithmConfig], StepGate] | None = None,
    score_group: ScoreGroup | None = None,
) -> None:
    """Make ``variant`` known as ``algorithm.name`` ``name``.

    With ``advantages`` the key ``algorithm.advantage`` is fixed at ``own``. ``token_credit`` takes
    the place of the evidence weight and of ``token_advantages``, so that it is given without them;
    of what it ``reads`` the rest is not computed. A ``gate`` needs ``teacher_entropy`` to be read.
    With ``score_group`` the variant fixes the key ``evidence`` at ``own_hints`` where the readings
    hold contrasts, and ``teacher.hint`` at ``own`` where they choose the hint as well.
    Raises UserError for a name that is taken and for keys that a section does not have.
    """
    for other, given in (
        ("evidence_weight", evidence_weight),
        ("token_advantages", token_advantages),
    ):
        if given is not None and token_credit is not None:
            article = "an" if other[0] in "aeiou" else "a"
            raise UserError(
                f"algorithm {name!r}: it has {article} {other} and a token_credit, which takes its "
                "place; expected one of them"
            )
    if gate is not None and "teacher_entropy" not in reads:
        raise UserError(
            f"algorithm {name!r}: it has a gate, which observes the teacher's entropy, but does "
            "not read teacher_entropy"
        )
    if name in VARIANTS:
        raise UserError(f"an algorithm named {name!r} is registered already")
    for section, keys, known in (
        ("algorithm", {**variant.fixed, **variant.defaults}, AlgorithmConfig.model_fields),
        (
            "teacher",
            {**variant.teacher_fixed, **variant.teacher_defaults},
            TeacherConfig.model_fields,
        ),
    ):
        if unknown := sorted(keys.keys() - known.keys()):
            raise UserError(
                f"algorithm {name!r}: {section} has no key {', '.join(unknown)}; "
                f"it has: {', '.join(known)}"
            )
    if advantages is not None:
        own = {"advantage": ("own", "it computes its own advantages")}
        variant = replace(variant, fixed={**variant.fixed, **own})
    VARIANTS[name] = variant
    _OWN[name] = OwnFunctions(
        advantages=advantages,
        token_advantages=token_advantages,
        evidence_weight=evidence_weight,
        token_credit=token_credit,
        reads=frozenset(reads),
        gate=gate,
        score_group=score_group,
    )


def own_functions(algorithm: AlgorithmConfig) -> OwnFunctions:
    """Those that the algorithm was registered with."""
    return _OWN.get(algorithm.name, OwnFunctions())


def response_advantages(group: Group, algorithm: AlgorithmConfig) -> list[float]:
    """[G] the advantages of a scored group, as ``algorithm`` forms them.

    A response without a verdict has no part in them: the others are compared with each other, and
    its own advantage is 0.

    Raises UserError where a user's function returns anything but G finite numbers.
    """
    judged = group.judged
    found = iter(_judged_advantages(judged, algorithm) if judged.trajectories else [])
    return [next(found) if each.has_verdict else 0.0 for each in group.trajectories]


def _judged_advantages(group: Group, algorithm: AlgorithmConfig) -> list[float]:
    function = own_functions(algorithm).advantages
    if function is None:
        if algorithm.advantage == "own":
            raise UserError(
                f"algorithm.advantage=own, but nothing is registered for {algorithm.name}"
            )
        return [float(each) for each in group_advantages(group.rewards, algorithm.advantage)]
    found = [float(each) for each in function(group)]
    if len(found) != len(group.trajectories) or not all(map(math.isfinite, found)):
        raise UserError(
            f"algorithm.name={algorithm.name}: its advantages of {group.problem.id} are {found}, "
            f"expected {len(group.trajectories)} finite numbers"
        )
    return found


def token_advantages(
    group: Group, advantages: Sequence[float], algorithm: AlgorithmConfig
) -> list[NDArray[np.float32] | None]:
    """[G] the advantages of each response's tokens; None: all have the response's own.

    ``advantages``: [G], as ``response_advantages`` found them.
    Raises UserError where a user's function returns anything but T finite numbers for each.
    """
    function = own_functions(algorithm).token_advantages
    places = [i for i, each in enumerate(group.trajectories) if each.has_verdict]
    if function is None or not any(advantages):
        return [None] * len(advantages)
    judged = group.judged
    found = function(judged, [advantages[i] for i in places], algorithm)
    lengths = [len(each.generation.token_ids) for each in judged.trajectories]
    if [each.shape for each in found] != [(length,) for length in lengths] or not all(
        each.isfinite().all() for each in found
    ):
        raise UserError(
            f"algorithm.name={algorithm.name}: its token_advantages of {group.problem.id} are "
            f"{found!r:.200}, expected finite numbers for responses of {lengths} tokens"
        )
    of_all: list[NDArray[np.float32] | None] = [None] * len(advantages)
    for i, each in zip(places, found, strict=True):
        of_all[i] = each.to("cpu", torch.float32).numpy()
    return of_all
