"""Reading UCX's own words."""

import asyncio
import subprocess
import threading

import pytest

from headrace.transfer.connector import PoolDescriptor
from headrace.transfer.lane import parse_lane, probe_lane

HEAD = "[1.0] [vm:1:0]   | "
TABLE = """{head}main intra-node cfg#1                                            |
{head}remote memory read by ucp_get*(multi) into host memory from host |
{head}--------+-------------+-------------------------------------------+
{head} 0..inf | {how} | {where} |
{head}active message by ucp_am_send* from host memory |
{head} 0..92 | short | sysv/memory |
"""


def table(how: str, where: str) -> str:
    return TABLE.format(head=HEAD, how=how, where=where)


@pytest.mark.parametrize(
    ("how", "where", "lane"),
    [
        ("zero-copy", "cma/memory", "cma"),
        ("software emulation", "tcp/lo", "tcp"),
        ("zero-copy", "52% on tcp/lo and 48% on tcp/eth0", "tcp"),
        ("zero-copy", "50% on rc_mlx5/mlx5_0:1 and 50% on tcp/eth0", "rc_mlx5+tcp"),
    ],
)
def test_the_lane_is_the_transport_of_large_reads(how, where, lane):
    assert parse_lane("noise\n" + table(how, where)) == lane


def test_the_last_table_counts_for_ucx_prints_one_before_it_is_connected():
    assert parse_lane(table("software emulation", "tcp/lo") + table("zero-copy", "cma/memory")) == "cma"


def test_no_table_is_no_lane():
    assert parse_lane("remote memory write by ucp_put* from host memory to host |\n | 0..inf | cma/memory |") is None
    assert parse_lane("") is None


async def test_a_cancellation_that_meets_the_answer_is_not_lost(monkeypatch):
    asked, answers = threading.Event(), threading.Event()

    def run(*_: object, **__: object) -> subprocess.CompletedProcess[bytes]:
        asked.set()
        answers.wait(10)
        return subprocess.CompletedProcess([], 0, b"")

    monkeypatch.setattr(subprocess, "run", run)
    pool = PoolDescriptor(
        agent_name="a", agent_metadata=b"", base_address=0, block_bytes=8, num_blocks=1, device_id=0, epoch="e"
    )
    probing = asyncio.create_task(probe_lane(pool))
    await asyncio.to_thread(asked.wait, 10)
    answers.set()
    probing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probing
