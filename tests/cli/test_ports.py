import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.cli.ports import Ports
from headrace.errors import ConfigError

HOST = "127.0.0.1"


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[Ports]:
    taken = Ports(HOST, tmp_path)
    yield taken
    taken.close()


def test_a_taken_port_is_not_given_twice(ports: Ports) -> None:
    first = ports.take(18200)
    assert ports.take(first) == first + 1


def test_a_port_held_by_another_cluster_is_passed_over(ports: Ports, tmp_path: Path) -> None:
    other = Ports(HOST, tmp_path)
    held = other.take(18200)
    assert ports.take(held) == held + 1
    other.close()
    assert ports.take(held) == held


def test_a_port_that_a_stranger_listens_on_is_passed_over(ports: Ports) -> None:
    with socket.create_server((HOST, 0), reuse_port=True) as stranger:
        port = stranger.getsockname()[1]
        assert ports.take(port) != port


def test_a_port_is_free_right_after_its_server_ended(ports: Ports) -> None:
    server = socket.create_server((HOST, 0))
    port = server.getsockname()[1]
    with socket.create_connection((HOST, port)) as client:
        accepted, _ = server.accept()
        accepted.close()  # the server closes first, so its side stays in TIME_WAIT
        client.recv(1)
    server.close()
    assert ports.take(port) == port


def test_no_free_port_is_an_error(ports: Ports, tmp_path: Path) -> None:
    other = Ports(HOST, tmp_path)
    while other.take(65530) != 65535:
        pass
    with pytest.raises(ConfigError, match="no free port"):
        ports.take(65530)
    other.close()
