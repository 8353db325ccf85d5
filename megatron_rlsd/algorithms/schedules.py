"""The schedule of lambda, the share of the evidence weight in the advantage."""

from __future__ import annotations

from megatron_rlsd.config import AlgorithmConfig


def lambda_at(step: int, algorithm: AlgorithmConfig) -> float:
    """Lambda of the update number ``step``; the first update is step 0.

    With W warm-up, H hold and D decay steps and L = rlsd_lambda:

        s < W              L (s + 1) / W        s = W - 1 is the first at full L
        W <= s < W + H     L                    H steps at full L beyond the warm-up
        s >= W + H         L (1 - (s - W - H + 1) / D), not below 0; with D = 0: L for ever

    So step W + H is the first below L, and step W + H + D - 1, the D-th of the decay, is the first
    at exactly 0. W = 0 starts at full L; algorithm.name ``grpo`` is 0 throughout, and so are the
    variants that fix rlsd_lambda at 0.

    Raises ValueError where step is negative.
    """
    if step < 0:
        raise ValueError(f"step counts from 0, got {step}")
    if algorithm.name == "grpo":
        return 0.0
    full, warmup = algorithm.rlsd_lambda, algorithm.lambda_warmup_steps
    decay_start = warmup + algorithm.lambda_hold_steps
    if step < warmup:
        return full * ((step + 1) / warmup)
    if step < decay_start or algorithm.lambda_decay_steps == 0:
        return full
    decayed = step - decay_start + 1
    return full * max(0.0, 1 - decayed / algorithm.lambda_decay_steps)
