"""A client command means the cluster that runs here, unless it is told otherwise."""

import os

import pytest

from headrace.cli import state
from headrace.cli.connect import router_address
from headrace.errors import ConfigError


def write_cluster(run_dir, started_s):
    cluster = state.ClusterState(
        supervisor=os.getpid(),
        supervisor_started_s=started_s,
        http="http://127.0.0.1:1",
        grpc="127.0.0.1:7777",
        processes=(),
    )
    state.write(run_dir, cluster)


def test_the_running_cluster_is_meant_when_none_is_named(tmp_path):
    write_cluster(tmp_path, state.start_of(os.getpid()))
    assert router_address(None, tmp_path) == "127.0.0.1:7777"


def test_a_named_address_comes_first(tmp_path):
    write_cluster(tmp_path, state.start_of(os.getpid()))
    assert router_address("127.0.0.1:5", tmp_path) == "127.0.0.1:5"


def test_no_cluster_means_the_default_port(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HEADRACE_RUN_DIR", raising=False)
    assert router_address(None, None) == "127.0.0.1:50051"


def test_a_folder_that_is_named_must_have_a_cluster(tmp_path):
    """What listens on the default port may be anybody's."""
    with pytest.raises(ConfigError, match="no cluster runs"):
        router_address(None, tmp_path)
    write_cluster(tmp_path, started_s=1.0)
    with pytest.raises(ConfigError, match="no cluster runs"):
        router_address(None, tmp_path)
    assert router_address("127.0.0.1:5", tmp_path) == "127.0.0.1:5"
