"""Real clusters, one at a time: the machine has room for one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.testing.cluster import LocalCluster

StartCluster = Callable[..., LocalCluster]


class Running:
    """The cluster that lives now; asking for another shape ends it."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._key: tuple[object, ...] | None = None
        self._cluster: LocalCluster | None = None

    def start(self, workers: str = "prefill=1,decode=1", dtype: str = "fp32", *settings: str) -> LocalCluster:
        key = (workers, dtype, settings)
        if self._cluster is None or key != self._key:
            self.stop()
            run_dir: Path = self._folders.mktemp("run")
            self._cluster = LocalCluster(run_dir, workers=workers, dtype=dtype, settings=settings).__enter__()
            self._key = key
        return self._cluster

    def stop(self) -> None:
        if self._cluster is not None:
            self._cluster.__exit__()
            self._cluster = None


@pytest.fixture(scope="session")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartCluster]:
    """Start a cluster, or return the one that lives if it has the same shape."""
    running = Running(tmp_path_factory)
    yield running.start
    running.stop()


@pytest.fixture
def cluster(start_cluster: StartCluster) -> LocalCluster:
    """One prefill and one decode worker, precision as `headrace up` chooses it."""
    return start_cluster(dtype="auto")
