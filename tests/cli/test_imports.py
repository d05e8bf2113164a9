import gc
import subprocess
import sys

import pytest

from headrace.cli.imports import collector_off

COUNT = """
import gc
from headrace.cli.imports import collector_off
before = sum(generation["collections"] for generation in gc.get_stats())
with collector_off():
    import headrace.cli.worker
print(sum(generation["collections"] for generation in gc.get_stats()) - before, gc.isenabled(), gc.get_freeze_count())
"""


def test_what_a_worker_imports_is_never_looked_through_by_the_collector() -> None:
    answer = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True).stdout
    num_collections, is_enabled, num_spared = answer.split()
    assert (int(num_collections), is_enabled) == (0, "True")
    assert int(num_spared) > 100_000


def fail_to_import() -> None:
    with collector_off():
        assert not gc.isenabled()
        raise ImportError("no such module")


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    try:
        with pytest.raises(ImportError):
            fail_to_import()
        assert gc.isenabled()
    finally:
        gc.unfreeze()
