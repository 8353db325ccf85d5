"""One cluster for all tests of this folder, or the reason why there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from megatron_rlsd.rollout.sglang.process import PROJECT_PYTHON
from tests.slurm.cluster import Cluster, why_not_here


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not_here()
    if reason is None and not (PROJECT_PYTHON.parents[1] / ".ready").is_file():
        reason = "no SGLang environment: `make sglang-cpu` has not succeeded here"
    if reason is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield cluster
    cluster.stop()
    assert not cluster.processes(), "a job left processes behind"
