"""Real clusters, one at a time: the machine has room for one."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headrace.testing.cluster import LocalCluster

FOLDER = Path(__file__).parent
StartCluster = Callable[..., LocalCluster]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share the usual cluster come one after the other, before those that ask for another shape."""
    here = [index for index, item in enumerate(items) if item.path.parent == FOLDER]
    by_shape = sorted((items[index] for index in here), key=lambda item: "cluster" not in item.fixturenames)
    for index, item in zip(here, by_shape, strict=True):
        items[index] = item


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
    """One prefill and one decode worker, precision as `headrace up` chooses it; whatever a test before has killed."""
    found = start_cluster(dtype="auto")
    found.wait_connected()
    return found
