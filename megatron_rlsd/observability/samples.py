"""run_dir/samples: what the model wrote, with what became of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rlsd.observability.leakage import leakage
from megatron_rlsd.observability.metrics_file import finite_or_none
from megatron_rlsd.runtime.errors import UserError, naming
from megatron_rlsd.types import Group, Trajectory

SIGNIFICANT_DIGITS = 5


def write_samples(
    folder: Path, step: int, groups: list[Group], decode: Callable[[list[int]], str] | None = None
) -> Path:
    """One line per trajectory to ``folder``/step_000012.jsonl, in the order of the groups.

    With ``decode`` (token ids to text) each line has its tokens' columns, see ``token_columns``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.jsonl"
    rows = [sample_row(t, decode) for group in groups for t in group.trajectories]
    with naming(path):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of one step's file. Raises ValueError that names the line that is not a sample."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line:
            try:
                row = json.loads(line)
                row["response"], row["problem_id"]
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}:{number} is not a sample: {line[:80]!r}") from error
            rows.append(row)
    return rows


def sample_files(folder: Path) -> dict[int, Path]:
    """Step -> its file, in the order of the steps."""
    files = {}
    for path in sorted(folder.glob("step_*.jsonl")):
        number = path.stem.removeprefix("step_")
        if number.isdigit():
            files[int(number)] = path
    return files


def sample_row(
    trajectory: Trajectory, decode: Callable[[list[int]], str] | None = None
) -> dict[str, Any]:
    problem, generation, reward = trajectory.problem, trajectory.generation, trajectory.reward
    question = problem.messages[-1]["content"]
    leaks = leakage(trajectory.response_text, question, problem.answer)
    row: dict[str, Any] = {
        "problem_id": problem.id,
        "source": problem.source,
        "question": question,
        "answer": problem.answer,
        "response": trajectory.response_text,
        "reward": None if reward is None or reward.value is None else finite_or_none(reward.value),
        "reward_parts": {} if reward is None else reward.parts,
        "reward_errors": {} if reward is None else reward.errors,
        "advantage": finite_or_none(trajectory.advantage),
        "finish_reason": generation.finish_reason,
        "tokens": sum(len(each.generation.token_ids) for each in trajectory.rows),
        "weight_version": generation.weight_version,
        "leakage": {"phrases": leaks.phrases, "answer_first": leaks.answer_first},
    }
    if decode is not None:
        row["token_columns"] = token_columns(trajectory, decode)
    if trajectory.environment_error:
        row["environment_error"] = trajectory.environment_error
    if trajectory.further:
        row["further_rows"] = [_further(each, decode) for each in trajectory.further]
    return row


def _further(row: Trajectory, decode: Callable[[list[int]], str] | None) -> dict[str, Any]:
    """A training row after an episode's first."""
    question = row.problem.messages[-1]["content"]
    told: dict[str, Any] = {"question": question, "response": row.response_text}
    return told if decode is None else {**told, "token_columns": token_columns(row, decode)}


def token_columns(
    trajectory: Trajectory, decode: Callable[[list[int]], str]
) -> dict[str, list[Any]]:
    """Columns of one entry per response token; a number that was not computed is null.

    ``text`` (joined: the response), ``id``, ``rollout_log_probs`` of the engine, and where the
    update used the response those of TokenCredit. Where an environment wrote tokens also ``own``:
    1 for the model's, 0 for the environment's.
    """
    generation = trajectory.generation
    ids, mask = generation.token_ids.tolist(), generation.loss_mask
    own = [True] * len(ids) if mask is None else mask.tolist()
    columns: dict[str, list[Any]] = {
        "id": ids,
        "text": token_texts(decode, ids),
        "rollout_log_probs": [
            _rounded(value) if sampled else None
            for value, sampled in zip(generation.log_probs.tolist(), own, strict=True)
        ],
    }
    if mask is not None:
        columns["own"] = [int(sampled) for sampled in own]
    if trajectory.credit is not None:
        for name, values in vars(trajectory.credit).items():
            columns[name] = [_rounded(value) for value in values.tolist()]
    return columns


def drop_samples_from(folder: Path, step: int) -> None:
    """Remove the files of ``step`` and later, which a resumed run writes again."""
    for number, path in sample_files(folder).items():
        if number >= step:
            path.unlink()


def _rounded(value: float) -> float | None:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None


UNFINISHED = "\ufffd"
"""What decoders put in place of a character whose bytes are not all there yet."""
MAX_PENDING = 8
"""A character has at most four bytes; after so many tokens the bytes are not a character at all."""


def token_texts(decode: Callable[[list[int]], str], token_ids: list[int]) -> list[str]:
    """[T] pieces of text, which joined are the decoded response.

    A token that ends in the middle of a character, or has no text (a special token), gets "" and
    the character goes to the token that completes it. ``decode`` must not be able to change earlier
    text when tokens follow, other than that of unfinished characters.
    """
    texts: list[str] = []
    start = done = 0  # tokens before ``start`` are settled; up to ``done`` their text is given out
    for end in range(1, len(token_ids) + 1):
        # Decoded together with the tokens before it: some decoders drop a leading blank.
        before = decode(token_ids[start:done])
        now = decode(token_ids[start:end])
        last = end == len(token_ids) or end - done >= MAX_PENDING
        if now.endswith(UNFINISHED) and not last:
            texts.append("")
            continue
        texts.append(now[len(before) :])
        if now != before or end - start > 2 * MAX_PENDING:  # a token without text is not context
            start = done
        done = end
    return texts
