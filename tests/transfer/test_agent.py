"""NIXL's bindings."""

import logging
import os
import subprocess
import sys

import pytest

from headrace.errors import ConfigError
from headrace.transfer import agent
from headrace.transfer.arena import arena_of, map_blocks


def test_loading_nixl_prints_nothing_imports_no_torch_and_leaves_logging_as_it_was():
    program = (
        "import sys, logging, headrace.transfer.nixl\n"
        "from headrace.transfer.agent import load_bindings, NixlAgent, Transport\n"
        "from headrace.transfer.arena import arena_of, map_blocks\n"
        "load_bindings()\n"
        "NixlAgent(Transport('quiet'), arena_of(map_blocks(1, 4096))).close()\n"
        "assert 'torch' not in sys.modules and logging.raiseExceptions\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_without_nixl_the_process_refuses_to_start(monkeypatch):
    monkeypatch.setattr(agent, "_PACKAGES", ("nixl_of_another_world",))
    with pytest.raises(ConfigError, match="nixl-cu12"):
        agent.load_bindings()


def test_a_transport_list_that_nixl_cannot_use_is_a_configuration_error(monkeypatch, caplog):
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setenv("UCX_TLS", "self")
    with pytest.raises(ConfigError, match="UCX_TLS"):
        agent.Transport("lonely")


def test_a_closed_agent_leaves_no_thread_though_its_transport_is_still_known():
    before = set(os.listdir("/proc/self/task"))
    transport = agent.Transport("closing")
    opened = agent.NixlAgent(transport, arena_of(map_blocks(1, 4096)))
    assert set(os.listdir("/proc/self/task")) - before
    opened.close()
    assert transport.handle is None
    assert not set(os.listdir("/proc/self/task")) - before
