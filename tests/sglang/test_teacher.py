"""A teacher behind a server scores as transformers does with the same weights."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rlsd import train
from megatron_rlsd.config import TeacherServerConfig
from megatron_rlsd.diagnosis.model import check_teacher
from megatron_rlsd.observability import read_metrics
from megatron_rlsd.rollout import EngineError
from megatron_rlsd.rollout.sglang import SGLangEngine
from megatron_rlsd.rollout.sglang.scorer import SGLangScorer
from megatron_rlsd.teacher.external import ExternalTeacher
from tests.algorithm_runs import small_config
from tests.distributed.ranks import run_on_ranks
from tests.sglang.conftest import MAX_POSITIONS, VOCAB_SIZE, Publisher


def make_scorer(
    engine: SGLangEngine, vocab_size: int = VOCAB_SIZE, **settings: Any
) -> SGLangScorer:
    url = engine.fleet.servers[0].url
    config = TeacherServerConfig(**{"url": url, "api_key": "a key", **settings})
    return SGLangScorer(config, vocab_size)


@pytest.fixture
def teacher_folder(published: Publisher, tiny_model: Path, tmp_path: Path) -> Path:
    """The weights that the servers have now, as a Hugging Face folder."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_model, folder)
    published.reference.model.save_pretrained(folder)
    return folder


def test_scores_are_those_of_transformers(engine: SGLangEngine, teacher_folder: Path) -> None:
    rng = random.Random(3)
    sequences = [
        ([rng.randrange(VOCAB_SIZE) for _ in range(prompt)],
         [rng.randrange(VOCAB_SIZE) for _ in range(response)])
        for prompt, response in ((1, 1), (9, 30), (200, 3), (4, 300))
    ]  # fmt: skip
    sequences += [([5, 6], [VOCAB_SIZE - 1, 7, VOCAB_SIZE - 1]), ([VOCAB_SIZE - 1], [0, 1])]
    # The same prompt again: its beginning is in the server's cache by then.
    sequences += [(sequences[2][0], [8, 9]), sequences[2]]
    expected = ExternalTeacher(
        str(teacher_folder),
        vocab_size=VOCAB_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    ).log_probs([(np.array(p, np.int32), np.array(r, np.int32)) for p, r in sequences], 1.0, [])
    scorer = make_scorer(engine)
    scorer.check()
    for _ in range(2):
        for row, wanted in zip(scorer.score(sequences), expected, strict=True):
            torch.testing.assert_close(torch.tensor(row), wanted, atol=1e-4, rtol=0)
    assert scorer.score([]) == []


@pytest.mark.parametrize(("vocab_size", "which"), [(319, "more"), (321, "fewer")])
def test_another_vocabulary_is_refused(engine: SGLangEngine, vocab_size: int, which: str) -> None:
    with pytest.raises(EngineError, match=f"embeds {which} tokens than the student's {vocab_size}"):
        make_scorer(engine, vocab_size).check()


def test_what_goes_wrong_is_told_in_time(engine: SGLangEngine) -> None:
    with pytest.raises(EngineError, match=r"the teacher failed 2 times, last: http://127.0.0.1:9/"):
        make_scorer(engine, url="http://127.0.0.1:9", max_attempts=2).check()
    with pytest.raises(EngineError, match="is the configured api_key the server's"):
        make_scorer(engine, api_key="another").check()
    with pytest.raises(EngineError, match=r"HTTP 400.*context length"):
        make_scorer(engine).score([([1] * MAX_POSITIONS, [2, 3])])
    with pytest.raises(EngineError, match=r"scored \d of 3 responses within 0.001 s"):
        make_scorer(engine, score_timeout_seconds=0.001).score([([1] * 500, [2] * 300)] * 3)


def test_the_doctor_asks_the_teacher(engine: SGLangEngine, make_config: Any) -> None:
    def examine(vocab_size: int) -> str:
        url = engine.fleet.servers[0].url
        server = {"url": url, "api_key": "a key", "score_timeout_seconds": 50}
        config = make_config(
            algorithm={"name": "opd", "rlsd_lambda": 0.0}, teacher={"sglang": server}
        )
        return check_teacher(config, vocab_size)

    assert "scores tokens of the student's vocabulary" in examine(VOCAB_SIZE)
    with pytest.raises(EngineError, match="embeds more tokens"):
        examine(VOCAB_SIZE - 1)


def train_with_server(folder: str, model: str, url: str) -> None:
    """On every rank."""
    server = "{url: '" + url + "', api_key: a key, score_timeout_seconds: 50}"
    run = Path(folder) / "served"
    changes = ("teacher.hf_path=null", f"teacher.sglang={server}")
    train.train(small_config("opd", run, Path(model), Path(), *changes))


def test_opd_takes_the_steps_that_it_takes_with_the_models_folder(
    engine: SGLangEngine, teacher_folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    train.train(small_config("opd", tmp_path / "folder", tiny_model, teacher_folder))
    url = engine.fleet.servers[1].url
    run_on_ranks(train_with_server, 2, str(tmp_path), str(tiny_model), url, seconds=400)
    expected, measured = (
        [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in line]
        for name in ("folder", "served")
    )
    assert len(expected) == len(measured) == 2
    for key in ("train/loss", "train/grad_norm", "algorithm/gain_abs_mean"):
        assert abs(expected[0][key]) > 1e-3
        assert measured[0][key] == pytest.approx(expected[0][key], rel=1e-4), key
        assert measured[1][key] == pytest.approx(expected[1][key], rel=1e-3), key
