"""What the metrics that matter first are called where people read them."""

from __future__ import annotations

TITLES = {
    "rollout/reward_mean": "reward",
    "rollout/solved_share": "solved",
    "eval/": "evaluation",
    "rollout/response_tokens_mean": "response length",
    "rollout/truncated_share": "cut at the limit",
    "train/entropy": "entropy",
    "algorithm/gain_mean": "information gain",
    "algorithm/gain_abs_mean": "|information gain|",
    "train/approx_kl": "KL to the old policy",
    "train/ref_kl": "KL to the reference",
    "train/rollout_log_prob_diff_mean": "engine to trainer",
    "train/grad_norm": "gradient norm",
    "train/loss": "loss",
    "perf/tokens_per_second": "tokens per second",
    "perf/tokens_per_second_per_gpu": "tokens/s per GPU",
    "perf/mfu": "MFU of the update",
    "memory/peak_gib": "GPU memory, GiB",
}
"""Metric -> title, the most telling first; ``eval/`` is where evaluations stand."""
EVALUATED = ("greedy_pass@1", "sampled_pass@1")
"""Ends of the names of an evaluation's main results."""
EVALUATION_TITLES = {"greedy_pass@1": "greedy", "sampled_pass@1": "sampled"}


def title(metric: str) -> str:
    """The metric's title; of an evaluation's main result ``SET, greedy``; else its own name."""
    if metric.startswith("eval/") and metric.endswith(EVALUATED):
        name, _, kind = metric.removeprefix("eval/").rpartition("/")
        return f"{name}, {EVALUATION_TITLES[kind]}" if kind in EVALUATION_TITLES else metric
    return TITLES.get(metric, metric)


def in_order(metrics: list[str]) -> list[str]:
    """Those of the metrics that matter first, in the order of TITLES."""
    found: list[str] = []
    for name in TITLES:
        if name == "eval/":
            found += [each for each in metrics if each.startswith(name) and title(each) != each]
        elif name in metrics:
            found.append(name)
    return found
