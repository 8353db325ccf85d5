"""A reward of one's own: a number near the right one earns a part of the point.

reward:
  functions:
    - {name: exact_match, params: {pattern: "#### (-?[0-9]+)"}}
    - name: examples/extensions/reward/closeness.py:closeness
      weight: 0.5
      params: {tolerance: 0.2}
"""

from __future__ import annotations

import re

from megatron_rlsd.types import RewardInput

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def closeness(sample: RewardInput, *, tolerance: float) -> float:
    """1 where the response's last number is the answer, falling to 0 where it is off by
    ``tolerance`` of it; 0 for a response that was cut off or has no number.

    Raises ValueError where the problem's answer is not a number: the response then has no verdict,
    and the share of such calls is a metric.
    """
    found = NUMBER.findall(sample.response)
    if sample.finish_reason != "stop" or not found:
        return 0.0
    right = float(sample.problem.answer)
    error = abs(float(found[-1]) - right) / max(abs(right), 1.0)
    return max(0.0, 1 - error / tolerance)
