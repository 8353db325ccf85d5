"""Every layout computes what one process computes, and one process what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from megatron_rlsd.actor.packing import Sequence
from tests.distributed.layout_matrix import CORE, LAYOUTS, REFERENCES
from tests.distributed.layouts import (
    LEARNING_RATE,
    LOSS,
    STEPS,
    TEMPERATURE,
    Layout,
    Measured,
    batch,
    check_state,
    differences,
    measure,
    save_models,
)

TOLERANCE = 1e-5

GROUPS = [
    pytest.param(group, marks=[pytest.mark.megatron_range] if group in CORE else [])
    for group in LAYOUTS
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory) -> dict[Layout, Measured]:
    return measure(REFERENCES, models, tmp_path_factory.mktemp("one"))


@pytest.mark.megatron_range
def test_one_process_equals_transformers(models, one_process):
    for name, path in models.items():
        expected = transformers_run(path)
        measured = one_process[Layout(1, model=name)].series
        assert measured["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-4), name
        assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-5), name
        assert measured["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), name


@pytest.mark.parametrize("group", GROUPS)
def test_layouts_equal_one_process(group, models, one_process, tmp_path):
    for layout, measured in measure(LAYOUTS[group], models, tmp_path).items():
        different = {
            name: error
            for name, error in differences(measured, one_process[layout.reference]).items()
            if error > TOLERANCE
        }
        assert not different, (layout.key, different)
        check_state(layout, measured)


def transformers_run(path: Path) -> dict[str, list[float]]:
    """The same steps by plain torch: full logits, autograd, torch's AdamW and clipping."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )

    def log_softmax(of: torch.nn.Module, sequence: Sequence) -> torch.Tensor:
        ids = torch.tensor([sequence.token_ids.tolist()])
        logits = of(ids).logits[0, len(sequence.prompt_ids) - 1 : -1]
        return (logits / TEMPERATURE).log_softmax(-1)

    def pick(log_probs: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        return log_probs.gather(-1, torch.tensor(sequence.response_ids.tolist())[:, None])[:, 0]

    sequences, hinted, advantages = batch()
    total = sum(len(s.response_ids) for s in sequences)
    with torch.no_grad():
        old = [pick(log_softmax(model, sequence), sequence) for sequence in sequences]
        hints = [pick(log_softmax(teacher, sequence), sequence) for sequence in hinted]
    result: dict[str, list[float]] = {
        "loss": [],
        "grad_norm": [],
        "log_probs": torch.cat(old).tolist(),
    }
    for _ in range(STEPS):
        loss = torch.zeros(())
        for i, sequence in enumerate(sequences):
            log_probs = log_softmax(model, sequence)
            student = pick(log_probs, sequence)
            gain = (hints[i] - student).detach()
            weight = torch.exp(gain if advantages[i] > 0 else -gain).clamp(0.8, 1.2)
            credit = advantages[i] * (0.5 + 0.5 * weight)
            ratio = (student - old[i]).exp()
            term = torch.min(credit * ratio, credit * ratio.clamp(0.8, 1.28))
            if advantages[i] < 0:
                term = torch.max(term, LOSS.dual_clip * credit)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            loss = loss - (term + 0.01 * entropy).sum() / total
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        result["loss"].append(loss.item())
        result["grad_norm"].append(float(norm))
    return result
