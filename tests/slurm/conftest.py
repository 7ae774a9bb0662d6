"""Clusters for tests. Where there can be none the tests are skipped and say why; in CI that is a failure."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from slurm.cluster import Cluster, cluster, missing
from slurm.settings import Settings


def require_slurm() -> None:
    reason = missing()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(f"in CI these tests must run: {reason}")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """Two nodes of two GPUs, which share the loopback network."""
    require_slurm()
    with cluster(Settings(grace=2)) as running:
        yield running


@pytest.fixture
def wired() -> Iterator[Cluster]:
    """The same, with a network that can be cut."""
    require_slurm()
    with cluster(Settings(own_network=True)) as running:
        yield running
