"""A second HF model as the teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from megatron_rlsd.runtime.errors import UserError
from megatron_rlsd.teacher.external import ExternalTeacher
from tests.models import save_random_model

SEQUENCES = [
    (np.array(prompt, np.int32), np.array(response, np.int32))
    for prompt, response in (([3, 1, 4], [1, 5, 9]), ([2], [6]), ([5, 3], [5, 8, 9, 7]))
]


def save(folder: Path, kind: str = "Qwen3", **settings: object) -> str:
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            **settings,
        }
    )
    return str(save_random_model(config, folder))


def load(path: str, vocab_size: int = 40) -> ExternalTeacher:
    return ExternalTeacher(
        path, vocab_size=vocab_size, dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_those_of_the_models_own_logits(tmp_path, tied):
    path = save(tmp_path, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    rows = load(path).log_probs(SEQUENCES, 0.7, [])
    for (prompt, response), row in zip(SEQUENCES, rows, strict=True):
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(1)[range(len(response)), response]
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-5)
    assert load(path).log_probs([], 1.0, []) == []


def test_what_does_not_fit_the_student_is_named(tmp_path):
    with pytest.raises(UserError, match="no config"):
        load(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="embeds 40 tokens and the student 41"):
        load(save(tmp_path / "plain"), vocab_size=41)
    with pytest.raises(UserError, match="GraniteForCausalLM does more to its logits"):
        load(save(tmp_path / "scaled", "Granite", logits_scaling=4.0))
