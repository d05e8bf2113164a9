"""Ways to reach Redis."""

import asyncio
from pathlib import Path

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from headrace import settings
from headrace.clock import WallClock
from headrace.errors import ConfigError
from headrace.index.connection import RedisConfig, connect, disconnect
from headrace.index.log import IndexLog, Lifetime, Written
from headrace.index.publisher import IndexPublisher
from headrace.index.replica import IndexReplica
from headrace.testing.index import SimpleIndex
from headrace.testing.index_log import block, running, stored, until
from headrace.testing.redis import redis_server
from headrace.testing.tls import make_certificate, tls_proxy

LIFE = Lifetime(location="w1", epoch="a", started_unix_ms=1)


async def begins(config):
    client = connect(config)
    try:
        return await IndexLog(client).begin(LIFE, 0) is Written.DONE
    finally:
        await disconnect(client)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis",
        "localhost:6379",
        "http://:hunter2@host",
        "redis://:hunter2@",
        "redis://:hunter2@host:port",
        "redis://:hunter2@host:99999",
        "redis://:hunter2@host/zero",
        "redis://:hunter2@host/0/1",
        "redis://:hunter2@host/-3",
        "unix://:hunter2@/run/redis.sock?db=-3",
        "redis://:hunter2@a,b/0",
        "redis://host?password=hunter2",
        "unix://:hunter2@",
        "unix:///socket?password=hunter2",
        "redis+sentinel://:hunter2@a,b",
        "redis+sentinel://:hunter2@a,,b/service",
        "redis+sentinel://:hunter2@a/service/one",
    ],
)
def test_a_bad_url_is_refused_and_its_password_not_shown(url):
    with pytest.raises(ConfigError, match=r"redis\.url is not understood") as refused:
        RedisConfig(url=url)
    assert refused.value.field == "redis.url"
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("url", ["redis://me:hunter2@host/7", "redis+sentinel://:hunter2@host,other/service"])
def test_a_password_is_neither_printed_nor_described(url):
    env = {"HEADRACE_REDIS_URL": url}
    loaded = settings.load(RedisConfig, file=None, section="redis", env=env, overrides={})
    assert loaded.value.url == url
    assert "hunter2" not in loaded.describe() + repr(loaded.value)
    assert "://***@host" in loaded.describe()


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"redis\.ca_file names no file"):
        connect(RedisConfig(url="rediss://host", ca_file=Path("/nowhere")))
    with pytest.raises(ConfigError, match=r"cannot read redis\.password_file"):
        connect(RedisConfig(url="redis://host", password_file=Path("/nowhere")))
    with pytest.raises(ConfigError, match=r"redis\.url is not set"):
        connect(RedisConfig())


async def test_a_password_and_an_acl_user_are_used(tmp_path):
    rights = "~{headrace:index}* +@read +@write +@scripting +@transaction +time"
    with redis_server(tmp_path, "requirepass p%40ss/", f"user indexer on >se:cret {rights}") as server:
        secret = tmp_path / "password"
        secret.write_text("p%40ss/\n")
        assert await begins(RedisConfig(url=f"redis://:p%2540ss%2F@{server.address}/0"))
        assert await begins(RedisConfig(url=server.url, password_file=secret))
        indexer = RedisConfig(url=f"redis://indexer:se%3Acret@{server.address}")
        assert await begins(indexer)
        with pytest.raises(RedisError):
            await begins(RedisConfig(url=f"redis://:hunter2@{server.address}"))
        client = connect(indexer)
        log = IndexLog(client)
        publisher = IndexPublisher(log, LIFE, WallClock(), least_snapshot_bytes=1)
        index = SimpleIndex()
        replica = IndexReplica(log, index, WallClock())
        for number in range(4):
            publisher.note([stored([number])])
            await publisher.step()
            await replica.step(0.0)
        await disconnect(client)
        assert len(index.blocks("w1")) == 4


async def test_a_socket_and_a_db_are_used(tmp_path, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "redis.sock"
    with redis_server(tmp_path, f"unixsocket {path}") as server:
        assert await begins(RedisConfig(url=f"unix://{path}?db=3"))
        client = connect(RedisConfig(url=f"{server.url}/3"))
        assert set(await IndexLog(client).registered()) == {"w1"}
        await disconnect(client)


async def test_tls_is_used_and_the_certificate_checked(tmp_path):
    cert, key = make_certificate(tmp_path)
    with redis_server(tmp_path / "redis") as server:
        async with tls_proxy(server.port, cert, key) as port:
            url = f"rediss://127.0.0.1:{port}"
            assert await begins(RedisConfig(url=url, ca_file=cert))
            with pytest.raises(RedisConnectionError, match="certificate verify failed"):
                await begins(RedisConfig(url=url))


@pytest.mark.cluster
async def test_publishers_and_replicas_follow_a_sentinel_failover(tmp_path, monkeypatch):
    monkeypatch.setattr("headrace.index.publisher.HEARTBEAT_S", 0.1)
    with (
        redis_server(tmp_path / "first", "repl-diskless-sync-delay 0") as first,
        redis_server(tmp_path / "second", f"replicaof 127.0.0.1 {first.port}") as second,
        redis_server(
            tmp_path / "sentinel",
            f"sentinel monitor cluster 127.0.0.1 {first.port} 1",
            "sentinel down-after-milliseconds cluster 300",
            "sentinel failover-timeout cluster 2000",
            is_sentinel=True,
        ) as sentinel,
    ):
        client = connect(RedisConfig(url=f"redis+sentinel://{sentinel.address}/cluster/0", connect_timeout_s=0.5))
        standby = connect(RedisConfig(url=second.url))
        watch = connect(RedisConfig(url=sentinel.url))
        log, index = IndexLog(client), SimpleIndex()
        publisher = IndexPublisher(log, LIFE, WallClock())
        replica = IndexReplica(log, index, WallClock(), wait_s=0.3)
        async with running(publisher.run(), replica.run()):
            publisher.note([stored([1])])
            async with asyncio.timeout(30):
                while (await standby.info("replication"))["master_link_status"] != "up":  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
                while not await watch.execute_command("SENTINEL", "REPLICAS", "cluster"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await until(lambda: index.blocks("w1") is not None and len(index.blocks("w1")) == 1)
            first.kill()
            publisher.note([stored([2])])
            await until(lambda: len(index.blocks("w1")) == 2)
            assert set(await IndexLog(standby).registered()) == {"w1"}
        assert {block_hash for _, block_hash in index.blocks("w1")} == {block(1), block(2)}
        for one in (client, standby, watch):
            await disconnect(one)
