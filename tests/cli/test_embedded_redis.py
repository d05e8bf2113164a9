"""The Redis of a local cluster starts from its configuration, keeps its password, and lets nobody in without."""

import signal
import stat
import subprocess
from pathlib import Path

import pytest
import redis
from redis.exceptions import AuthenticationError

from headrace.cli.embedded_redis import prepare
from headrace.cli.ports import Ports
from headrace.testing.index_log import PATIENCE_S


@pytest.fixture
def port(tmp_path):
    ports = Ports("127.0.0.1", tmp_path / "ports")
    yield ports.take(18600)
    ports.close()


def started(folder: Path, port: int) -> tuple[subprocess.Popen[bytes], str]:
    command, url = prepare(folder, "127.0.0.1", port)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.02), int(PATIENCE_S / 0.02))
    with redis.Redis.from_url(url, retry=retry, retry_on_error=[redis.ConnectionError]) as client:
        client.ping()
    return process, url


@pytest.mark.parametrize("name", ["redis", 'with "quotes" and blanks'])
def test_data_and_password_outlive_the_server(tmp_path, port, name):
    process, url = started(tmp_path / name, port)
    with redis.Redis.from_url(url) as client:
        client.set("kept", "1")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    process, same_url = started(tmp_path / name, port)
    with redis.Redis.from_url(same_url) as client:
        assert client.get("kept") == b"1"
    process.kill()
    process.wait()
    assert same_url == url


def test_nobody_comes_in_without_the_password(tmp_path, port):
    process, url = started(tmp_path / "redis", port)
    try:
        with redis.Redis(port=port) as client, pytest.raises(AuthenticationError):
            client.ping()
    finally:
        process.kill()
        process.wait()
    password = url.split("@")[0].removeprefix("redis://:")
    files = [file for file in (tmp_path / "redis").rglob("*") if file.is_file()]
    readable = [file for file in files if password in file.read_text(errors="replace")]
    assert readable
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in readable)
