"""``rlsd reward-server``, a real process, asked by the reward ``http`` of a trainer's pool."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_rlsd.commands import main
from megatron_rlsd.config import RewardConfig
from megatron_rlsd.rewards import RewardPool
from megatron_rlsd.rewards.http import asking
from megatron_rlsd.types import RewardInput
from tests.reward_servers import reward_server

pytestmark = pytest.mark.process

Sample = Callable[..., RewardInput]
KEY = "sk-4711"
RULE = """
import os, time

def rule(sample, factor):
    if sample.response == "sleep": time.sleep(60)
    if sample.response == "die": os._exit(3)
    if sample.response == "raise": raise KeyError("missing thing")
    return factor * len(sample.response)
"""
SECONDS = 60


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    rule = tmp_path_factory.mktemp("rule") / "rule.py"
    rule.write_text(RULE)
    one = {"name": f"{rule}:rule", "params": {"factor": 2}}
    return {"functions": [one, {"name": "exact_match"}], "workers": 3, "timeout_seconds": 2}


@pytest.fixture(scope="module")
def url(functions: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = {"port": 0, "api_key": "env:REWARD_KEY", "max_queued": 50}
    folder = tmp_path_factory.mktemp("server")
    with reward_server(folder, {**functions, "server": server}, REWARD_KEY=KEY) as line:
        assert line.startswith("scoring with rule, exact_match in 3 workers at http://127.0.0.1:")
        yield line.split()[-1]


def remote(url: str | list[str], *, weight: float = 1, key: str = KEY, **settings: Any) -> Any:
    entry: dict[str, Any] = {"name": "http", "form": "reward_server", "url": url, "api_key": key}
    entry |= {"batch_size": settings.pop("batch_size", 4), "weight": weight}
    raw = {"functions": [entry], "max_error_share": 1, **settings}
    return RewardPool(RewardConfig.model_validate(raw))


def test_a_server_says_what_a_pool_of_ones_own_says(
    url: str, functions: dict[str, Any], sample: Sample
) -> None:
    texts = ["", "7", "raise", "sleep", "x \ud800 \x00", "die", "7", "long " * 1000]
    samples = [sample(text, id=f"p{i}", metadata={"i": i}) for i, text in enumerate(texts)]
    own = RewardPool(RewardConfig.model_validate({**functions, "max_error_share": 1}))
    with own as pool, remote(url, weight=0.5) as far:
        expected, results = pool.score(samples), far.score(samples)
    for one, other in zip(expected, results, strict=True):
        assert other.value == (None if one.value is None else 0.5 * one.value)
        assert other.parts == {"http": one.value}
        reasons = "; ".join(f"{name}: {reason}" for name, reason in one.errors.items())
        assert other.errors == ({"http": reasons} if reasons else {})
        assert other.timed_out == (("http",) if one.timed_out else ())
    assert [r.value is None for r in results] == [t in ("raise", "sleep", "die") for t in texts]


def test_a_time_limit_there_stops_no_run_here(url: str, sample: Sample) -> None:
    with remote(url, on_error="stop") as far:
        slow, fine = far.score([sample("sleep"), sample("abc")])
    assert (slow.value, slow.timed_out, fine.value) == (None, ("http",), 6)


def test_more_than_it_keeps_is_asked_again_later(
    url: str, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "FIRST_PAUSE_SECONDS", 0.01)
    samples = [sample("x" * n) for n in range(200)]
    with remote(url, batch_size=20) as far:
        assert [r.value for r in far.score(samples)] == [2.0 * n for n in range(200)]


@pytest.mark.parametrize(
    ("body", "key", "status", "said"),
    [
        ({"samples": []}, "another", 401, "is not reward.server.api_key"),
        ({"samples": []}, None, 401, "is not reward.server.api_key"),
        ({"sample": []}, KEY, 400, 'expected {"samples": [...]}'),
        ({"samples": [{"problem": {"id": "1"}}]}, KEY, 400, "samples.0: TypeError"),
        ({"samples": [[]]}, KEY, 400, "samples.0: TypeError"),
        ([], KEY, 400, "expected"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    url: str, body: Any, key: str | None, status: int, said: str
) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url}/score", json.dumps(body).encode(), headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=SECONDS)
    assert caught.value.code == status
    assert said in json.loads(caught.value.read())["error"]


def test_what_cannot_serve_ends_with_one_message(
    url: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rewards.yaml"
    taken = url.rpartition(":")[2]
    for changes, said in {
        f"reward.server.port={taken}": "Address already in use",
        "reward.functions.0.name=nothing": "unknown reward 'nothing'",
        "reward.server.api_key=env:NOT_SET_ANYWHERE": "NOT_SET_ANYWHERE is not set",
        "reward.workers=0": "reward.workers",
    }.items():
        path.write_text("reward: {functions: [{name: exact_match}]}")
        assert main(["reward-server", str(path), changes]) == 2
        assert said in capfd.readouterr().err
