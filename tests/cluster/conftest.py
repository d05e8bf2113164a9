"""Real clusters, started once per shape and shared by the tests of a session."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from headrace.testing.cluster import LocalCluster

StartCluster = Callable[..., LocalCluster]


@pytest.fixture(scope="module")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartCluster]:
    """Start clusters that live until the module's tests are done; the same options give the same cluster."""
    with ExitStack() as stack:
        running: dict[tuple[object, ...], LocalCluster] = {}

        def start(workers: str = "prefill=1,decode=1", dtype: str = "fp32", *settings: str) -> LocalCluster:
            key = (workers, dtype, settings)
            if key not in running:
                run_dir: Path = tmp_path_factory.mktemp("run")
                cluster = LocalCluster(run_dir, workers=workers, dtype=dtype, settings=settings)
                running[key] = stack.enter_context(cluster)
            return running[key]

        yield start


@pytest.fixture(scope="module")
def cluster(start_cluster: StartCluster) -> LocalCluster:
    """One prefill and one decode worker in fp32."""
    return start_cluster()
