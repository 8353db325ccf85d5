"""The real model and the real engine, for one small rollout: do they compute the same thing?

Collective: called on every rank of the layout (torchrun, srun).
"""

from __future__ import annotations

from pathlib import Path

from megatron_rlsd.config import Config
from megatron_rlsd.parallel.row_sharing import share_rows
from megatron_rlsd.run import Run, assemble
from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.types import TrainBatch
from megatron_rlsd.weight_sync import check_parity, trainer_scores

PROMPTS = 4
RESPONSE_TOKENS = 64


def check_engine(config: Config) -> str:
    """Publish the initial weights, sample a little, and score it again with the trainer's model.

    With servers the publication itself compares checksums and the log-probabilities of fixed text,
    as it does in a run. Raises WeightSyncError if they, or those of the sampled tokens, differ by
    more than weight_sync.parity_bound on average.
    """
    with assemble(small(config), total_updates=None, total_steps=0, program="rollout_only") as run:
        published = run.publish_weights(version=0)
        _, batch, _ = run.rollout(0)
        groups = run.process_groups
        everything = [list(range(len(batch)))] * groups.dp.size()
        found = compare(run, share_rows(batch, everything, groups))
    if not found:  # a rank that only helps
        return ""
    servers = "".join(
        f", {name.removeprefix('weight_sync/')} {value:.3g}"
        for name, value in sorted(published.items())
        if "parity" in name or "verif" in name or "checksum" in name
    )
    return (
        f"log-probabilities of {found['tokens']:.0f} sampled tokens differ by "
        f"{found['mean']:.1e} on average, {found['max']:.1e} at most{servers}"
    )


def small(config: Config) -> Config:
    """The same model, engine and layout with little to do, in a folder of its own."""
    # Not as JSON, which has masks for secrets.
    raw = config.model_dump()
    raw["run_dir"] = str(Path(config.run_dir) / "doctor")
    raw["train"] |= {"resume": "never", "steps": 0, "global_batch_size": None}
    raw["rollout"] |= {
        "prompts_per_step": PROMPTS,
        "n_samples_per_prompt": max(1, min(2, config.rollout.n_samples_per_prompt)),
        "max_response_tokens": min(RESPONSE_TOKENS, config.rollout.max_response_tokens),
        # What the comparison is made at.
        "temperature": 1.0,
    }
    raw["rollout"]["asynchronous"]["max_staleness"] = 0
    raw["algorithm"]["group_filter"] = False
    raw["weight_sync"] |= {"verify_interval": 1, "parity_interval": 1}
    raw["data"]["eval"] = []
    raw["sft"]["stop_at_accuracy"] = None
    raw["observability"] |= {"tensorboard": False, "trace": False, "progress": "none"}
    for tracker in ("wandb", "mlflow"):
        raw["observability"][tracker]["enabled"] = False
    return Config.model_validate(raw)


def compare(run: Run, batch: TrainBatch) -> dict[str, float]:
    """On rank 0 the differences of the sampled tokens' log-probabilities; empty elsewhere."""
    if not len(batch):
        raise UserError("the engine sampled no token")
    rows = [batch.rows[number] for number in range(len(batch))]
    sequences = [[*row.prompt_ids.tolist(), *row.response_ids.tolist()] for row in rows]
    scores = trainer_scores(run.actor, run.process_groups, sequences)
    if scores is None:
        return {}
    ours = [each[len(row.prompt_ids) - 1 :] for each, row in zip(scores, rows, strict=True)]
    bound = run.config.weight_sync.parity_bound
    metrics = check_parity(
        {"the rollout engine": [row.rollout_log_probs.tolist() for row in rows]},
        ours,
        bound=bound,
        version=0,
    )
    return {
        "tokens": float(sum(map(len, ours))),
        "mean": metrics["weight_sync/parity_mean"],
        "max": metrics["weight_sync/parity_max"],
    }
