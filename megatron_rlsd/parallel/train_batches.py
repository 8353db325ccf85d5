"""A training batch as named tensors: for messages between ranks, and for recorded steps.

B rows; a column that some rows lack (a hint, a span) lists the K rows that have it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_rlsd.parallel.exchange import ragged, unragged
from megatron_rlsd.types import TrainBatch, TrainRow

Value = TypeVar("Value")
OLD_MASKS = ("loss_masks", "response_masks")
"""Where steps recorded by release 0.1 and before have the masks, if anything is masked."""


def train_batch_tensors(batch: TrainBatch) -> dict[str, torch.Tensor]:
    """The columns of a batch all of whose rows are here.

    Ids are int32, log-probabilities float32, masks bool, advantages float64. ``NAME.lengths`` and
    ``NAME.values`` hold arrays end to end; ``NAME.rows`` [K] int64 says whose, where not all rows
    have the column.
    """
    rows = [batch.rows[number] for number in range(len(batch))]
    spans = _present(row.evidence_span for row in rows)
    routes = _present(row.routed_experts for row in rows)
    tensors = (
        ragged("prompt_ids", [row.prompt_ids for row in rows])
        | ragged("response_ids", [row.response_ids for row in rows])
        | ragged("rollout_log_probs", [row.rollout_log_probs for row in rows], np.float32)
        | ragged("loss_mask", [row.loss_mask for row in rows], np.bool_)
        | {"advantages": torch.tensor([row.advantage for row in rows], dtype=torch.float64)}
        | _optional("teacher_prompt_ids", [row.teacher_prompt_ids for row in rows])
        | _optional("weight_versions", [row.weight_versions for row in rows])
        | _optional("token_advantages", [row.token_advantages for row in rows], np.float32)
        | _several("contrast_prompt_ids", [row.contrast_prompts for row in rows])
    )
    if solved := _present(row.solved for row in rows):
        tensors["solved.rows"] = torch.tensor(list(solved), dtype=torch.int64)
        tensors["solved"] = torch.tensor(list(solved.values()), dtype=torch.bool)
    if shares := _present(row.group_solved_share for row in rows):
        tensors["group_solved_share.rows"] = torch.tensor(list(shares), dtype=torch.int64)
        tensors["group_solved_share"] = torch.tensor(list(shares.values()), dtype=torch.float64)
    if episodes := _present(row.episode for row in rows):
        tensors["episodes.rows"] = torch.tensor(list(episodes), dtype=torch.int64)
        tensors["episodes"] = torch.tensor(list(episodes.values()), dtype=torch.int64)
    if spans:
        tensors["evidence_spans.rows"] = torch.tensor(list(spans), dtype=torch.int64)
        tensors["evidence_spans"] = torch.tensor(list(spans.values()), dtype=torch.int64)
    if routes:
        tensors["routed_experts.rows"] = torch.tensor(list(routes), dtype=torch.int64)
        tensors["routed_experts"] = torch.cat(list(routes.values()))
    return tensors


def train_batch_of(tensors: dict[str, torch.Tensor]) -> TrainBatch:
    """The inverse of train_batch_tensors; it also reads steps that release 0.1 recorded."""
    prompts, responses = unragged("prompt_ids", tensors), unragged("response_ids", tensors)
    log_probs = unragged("rollout_log_probs", tensors)
    masks = _masks(tensors, responses)
    teacher = _read_optional("teacher_prompt_ids", tensors)
    contrast = _read_several("contrast_prompt_ids", tensors)
    versions, by_token = (
        # Release 0.1 has neither.
        _read_optional(name, tensors) if f"{name}.rows" in tensors else {}
        for name in ("weight_versions", "token_advantages")
    )
    spans = _read_spans(tensors)
    solved, shares = _read_values("solved", tensors), _read_values("group_solved_share", tensors)
    episodes = _read_values("episodes", tensors)
    # An engine routes all tokens but each sequence's last.
    inputs = [len(p) + len(r) - 1 for p, r in zip(prompts, responses, strict=True)]
    routes = _read_routes(tensors, inputs)
    return TrainBatch.of(
        [
            TrainRow(
                prompt_ids=prompts[number],
                response_ids=responses[number],
                loss_mask=masks[number],
                rollout_log_probs=log_probs[number],
                advantage=advantage,
                token_advantages=by_token.get(number),
                solved=solved.get(number),
                group_solved_share=shares.get(number),
                teacher_prompt_ids=teacher.get(number),
                contrast_prompts=contrast.get(number, ()),
                evidence_span=spans.get(number),
                weight_versions=versions.get(number),
                routed_experts=routes.get(number),
                episode=episodes.get(number),
            )
            for number, advantage in enumerate(tensors["advantages"].tolist())
        ]
    )


def _present(column: Iterable[Value | None]) -> dict[int, Value]:
    return {number: value for number, value in enumerate(column) if value is not None}


def _optional(
    name: str, column: list[np.ndarray | None], dtype: type[np.generic] = np.int32
) -> dict[str, torch.Tensor]:
    present = _present(column)
    rows = torch.tensor(list(present), dtype=torch.int64)
    return {f"{name}.rows": rows} | ragged(name, list(present.values()), dtype)


def _several(name: str, column: list[tuple[np.ndarray, ...]]) -> dict[str, torch.Tensor]:
    """As ``_optional``; a row that has several stands there as often."""
    rows = [number for number, each in enumerate(column) for _ in each]
    values = [ids for each in column for ids in each]
    return {f"{name}.rows": torch.tensor(rows, dtype=torch.int64)} | ragged(name, values)


def _read_several(name: str, tensors: dict[str, torch.Tensor]) -> dict[int, tuple[np.ndarray, ...]]:
    if f"{name}.rows" not in tensors:
        return {number: (ids,) for number, ids in _read_optional(name, tensors).items()}
    found: dict[int, tuple[np.ndarray, ...]] = {}
    for number, ids in zip(tensors[f"{name}.rows"].tolist(), unragged(name, tensors), strict=True):
        found[number] = (*found.get(number, ()), ids)
    return found


def _read_optional(name: str, tensors: dict[str, torch.Tensor]) -> dict[int, np.ndarray]:
    found = unragged(name, tensors)
    if f"{name}.rows" in tensors:
        return dict(zip(tensors[f"{name}.rows"].tolist(), found, strict=True))
    return {number: ids for number, ids in enumerate(found) if len(ids)}  # release 0.1


def _read_values(name: str, tensors: dict[str, torch.Tensor]) -> dict[int, Any]:
    """One value for each row that has one; release 0.1 recorded none."""
    if name not in tensors:
        return {}
    return dict(zip(tensors[f"{name}.rows"].tolist(), tensors[name].tolist(), strict=True))


def _read_spans(tensors: dict[str, torch.Tensor]) -> dict[int, tuple[int, int]]:
    if "evidence_spans.lengths" in tensors:  # release 0.1: of every row, or of none
        spans = [tuple(span.tolist()) for span in unragged("evidence_spans", tensors)]
        return dict(enumerate(spans))
    if "evidence_spans" not in tensors:
        return {}
    rows, spans = tensors["evidence_spans.rows"].tolist(), tensors["evidence_spans"].tolist()
    return {row: (start, stop) for row, (start, stop) in zip(rows, spans, strict=True)}


def _read_routes(
    tensors: dict[str, torch.Tensor], num_inputs: list[int]
) -> dict[int, torch.Tensor]:
    if "routed_experts" not in tensors:
        return {}
    every = torch.arange(len(num_inputs))  # release 0.1
    rows = tensors.get("routed_experts.rows", every).tolist()
    parts = tensors["routed_experts"].split([num_inputs[row] for row in rows])
    return dict(zip(rows, parts, strict=True))


def _masks(tensors: dict[str, torch.Tensor], responses: list[np.ndarray]) -> list[np.ndarray]:
    if "loss_mask.lengths" in tensors:
        return unragged("loss_mask", tensors)
    old = next((name for name in OLD_MASKS if f"{name}.lengths" in tensors), None)
    masks = [] if old is None else unragged(old, tensors)
    if not masks:
        return [np.ones(len(ids), np.bool_) for ids in responses]
    return [mask.astype(np.bool_) for mask in masks]
