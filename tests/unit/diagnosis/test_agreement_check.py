"""What the doctor says of the libraries that trainer and servers load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron_rlsd.config import Config
from megatron_rlsd.diagnosis import agreement
from megatron_rlsd.diagnosis.agreement import check_agreement
from megatron_rlsd.diagnosis.check import Doubt, Skip
from megatron_rlsd.rollout.sglang.agreement import Libraries
from megatron_rlsd.runtime.errors import UserError


def libraries(python: str, nccl: tuple[int, ...] | None, torch: str) -> Libraries:
    return Libraries(python, torch, "13.0", nccl, f"{python}.so.2")


@pytest.fixture
def check(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    def run(ours: Any, theirs: Any, transport: str, **settings: Any) -> str:
        monkeypatch.setattr(agreement, "own_libraries", lambda: libraries("/ours", *ours))
        found = libraries("/theirs", *theirs)
        monkeypatch.setattr(agreement, "server_libraries", lambda _: found)
        config = make_config(
            rollout={"engine": "sglang", "sglang": {"device": "cuda", **settings}},
            weight_sync={"transport": transport},
            distributed={"timeout_seconds": 3600},
        )
        return check_agreement(config)

    return run


OLD, NEW = ((2, 27, 5), "2.9.0"), ((2, 30, 7), "2.14.1")


def test_one_nccl_is_named_with_both_torches(check: Any) -> None:
    said = check(NEW, NEW, "broadcast")
    assert said == "NCCL 2.30.7 here, 2.30.7 in /theirs; torch 2.14.1 and 2.14.1"


def test_what_cannot_be_is_trouble_and_what_is_bridged_a_doubt(check: Any) -> None:
    with pytest.raises(UserError, match=r"\(/ours\) loads 2\.27\.5, the servers \(/theirs\) 2\.30"):
        check(OLD, NEW, "broadcast")
    with pytest.raises(Doubt, match="by LD_PRELOAD; any others would be refused"):
        check(NEW, ((2, 30, 5), "2.14.1"), "broadcast")
    with pytest.raises(UserError, match="refuses the CUDA IPC handles"):
        check(NEW, OLD, "ipc")
    with pytest.raises(Doubt, match="promises only the reverse"):
        check(((2, 31, 0), "2.15.0"), NEW, "ipc")


def test_servers_that_run_already_do_not_tell(check: Any) -> None:
    with pytest.raises(Doubt, match=r"do not say what they load; the trainer loads NCCL 2\.30\.7"):
        check(NEW, NEW, "broadcast", urls=["http://n:1"])


def test_what_needs_no_agreement_is_skipped(check: Any) -> None:
    for transport, settings in (("disk", {}), ("broadcast", {"device": "cpu"})):
        with pytest.raises(Skip):
            check(OLD, NEW, transport, **settings)


def test_without_a_configuration_the_projects_environments_are_compared(
    check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    check(NEW, NEW, "broadcast")
    monkeypatch.setattr(agreement, "PROJECT_PYTHON", tmp_path / "python")
    with pytest.raises(Skip):
        check_agreement()
    (tmp_path / "python").touch()
    assert check_agreement().startswith("NCCL 2.30.7 here")
    with pytest.raises(UserError):
        check(OLD, NEW, "broadcast")
    with pytest.raises(Doubt, match=r"the servers \(/theirs\) 2\.30\.7"):
        check_agreement()
