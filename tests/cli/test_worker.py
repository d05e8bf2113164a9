import pytest

from headrace.cli.worker import make_pack
from headrace.engine.packing import PaddedRows
from headrace.techniques.prepacking.bins import FirstFitDecreasing
from headrace.worker.config import Pack


@pytest.mark.parametrize(("pack", "kind"), [(Pack.BINS, FirstFitDecreasing), (Pack.PAD, PaddedRows)])
def test_a_worker_packs_as_its_setting_says(pack, kind):
    assert isinstance(make_pack(pack), kind)


def test_varlen_packs_nothing():
    assert make_pack(Pack.VARLEN) is None
