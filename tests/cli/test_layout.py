import stat
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from headrace.cli import layout
from headrace.cli.layout import RunConfig
from headrace.cli.ports import Ports
from headrace.errors import ConfigError
from headrace.ingestor.config import IngestorConfig
from headrace.router.config import RouterConfig
from headrace.settings import Loaded, load
from headrace.worker.config import WorkerConfig


def config(tmp_path: Path, workers: str = "prefill=1,decode=1") -> RunConfig:
    return RunConfig(dir=tmp_path, workers=tuple(workers.split(",")), model=tmp_path, http_port=18100, grpc_port=18150)


def arrange(tmp_path: Path, *assignments: str, workers: str = "prefill=1,decode=1") -> dict[str, layout.Service]:
    ports = Ports("127.0.0.1", tmp_path / "ports")
    services = layout.arrange(layout.plan(config(tmp_path, workers), assignments), ports)
    ports.close()
    return {service.name: service for service in services}


def test_workers_are_named_by_role_and_number(tmp_path: Path) -> None:
    assert list(arrange(tmp_path, workers="prefill=2,decode=1,hybrid=1")) == [
        "router",
        "kvstore",
        "ingestor",
        "prefill-0",
        "prefill-1",
        "decode-0",
        "hybrid-0",
        "redis",
    ]


def test_the_router_knows_every_worker_and_the_store(tmp_path: Path) -> None:
    services = arrange(tmp_path)
    written = yaml.safe_load((tmp_path / "router.yaml").read_text())["router"]
    assert written["workers"] == [services["prefill-0"].grpc, services["decode-0"].grpc]
    assert written["kvstores"] == [services["kvstore"].grpc]
    assert services["router"].http == f"http://127.0.0.1:{written['http_port']}"


def test_a_worker_knows_the_others_but_not_itself(tmp_path: Path) -> None:
    services = arrange(tmp_path, workers="prefill=1,decode=2")
    loaded = load(WorkerConfig, file=tmp_path / "decode-1.yaml", section="worker", env={}, overrides={}).value
    assert loaded.peers == (services["prefill-0"].grpc, services["decode-0"].grpc)
    assert f"{loaded.host}:{loaded.grpc_port}" == services["decode-1"].grpc


def test_assignments_reach_all_services_of_a_section_or_one_process(tmp_path: Path) -> None:
    services = arrange(tmp_path, "worker.threads=2", "decode-0.threads=1", "router.max_moves=0")
    tails = {
        name: service.command[service.command.index("--config") + 2 :]
        for name, service in services.items()
        if service.role != "redis"
    }
    assert tails == {
        "router": ("--set", "max_moves=0"),
        "kvstore": (),
        "ingestor": (),
        "prefill-0": ("--set", "threads=2"),
        "decode-0": ("--set", "threads=1"),
    }


def router_config(run_dir: Path) -> Loaded[RouterConfig]:
    return load(RouterConfig, file=run_dir / "router.yaml", section="router", env={}, overrides={})


def cache_secret(run_dir: Path) -> str:
    return router_config(run_dir).value.cache_secret.reveal()


def test_the_cache_secret_of_a_run_directory_stays_and_differs_from_others(tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    found = []
    for run_dir in (first, first, other):
        run_dir.mkdir(exist_ok=True)
        arrange(run_dir)
        found.append(cache_secret(run_dir))
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 64


def test_nobody_else_may_read_the_files_that_hold_the_cache_secret(tmp_path: Path) -> None:
    (tmp_path / "router.yaml").touch(0o644)
    arrange(tmp_path)
    secret = cache_secret(tmp_path)
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_text()]
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in holders} == {
        "cache_secret": 0o600,
        "router.yaml": 0o600,
    }
    assert secret not in router_config(tmp_path).describe()


def test_a_cache_secret_that_was_not_written_to_its_end_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "cache_secret").touch()
    arrange(tmp_path)
    assert len(cache_secret(tmp_path)) == 64


def test_the_model_of_the_installed_package_is_the_default() -> None:
    assert layout.bundled_model().suffix == ".gguf"


def test_several_kvstores_are_numbered_and_know_their_siblings(tmp_path: Path) -> None:
    planned = layout.plan(replace(config(tmp_path), kvstores=2), ())
    ports = Ports("127.0.0.1", tmp_path / "ports")
    services = {service.name: service for service in layout.arrange(planned, ports)}
    ports.close()
    written = yaml.safe_load((tmp_path / "kvstore-0.yaml").read_text())["kvstore"]
    assert written["siblings"] == [services["kvstore-1"].grpc]
    stores = yaml.safe_load((tmp_path / "prefill-0.yaml").read_text())["worker"]["kvstores"]
    assert stores == [services["kvstore-0"].grpc, services["kvstore-1"].grpc]


def arrange_ingestors(tmp_path: Path, number: int, *assignments: str) -> dict[str, layout.Service]:
    ports = Ports("127.0.0.1", tmp_path / "ports")
    planned = layout.plan(replace(config(tmp_path), ingestors=number), assignments)
    services = {service.name: service for service in layout.arrange(planned, ports)}
    ports.close()
    return services


def test_an_ingestor_knows_the_router_and_the_router_knows_every_ingestor(tmp_path: Path) -> None:
    services = arrange_ingestors(tmp_path, 2)
    loaded = load(IngestorConfig, file=tmp_path / "ingestor-1.yaml", section="ingestor", env={}, overrides={}).value
    assert (loaded.name, loaded.routers) == ("ingestor-1", (services["router"].grpc,))
    assert f"{loaded.host}:{loaded.grpc_port}" == services["ingestor-1"].grpc
    assert router_config(tmp_path).value.ingestors == (services["ingestor-0"].grpc, services["ingestor-1"].grpc)


def test_without_ingestors_none_is_started_and_the_router_waits_for_none(tmp_path: Path) -> None:
    assert "ingestor" not in {service.role for service in arrange_ingestors(tmp_path, 0).values()}
    assert router_config(tmp_path).value.ingestors == ()


def test_assignments_reach_all_ingestors_or_one(tmp_path: Path) -> None:
    services = arrange_ingestors(tmp_path, 2, "ingestor.max_streams=9", "ingestor-1.idle_s=3")
    assert services["ingestor-0"].command[-2:] == ("--set", "max_streams=9")
    assert services["ingestor-1"].command[-4:] == ("--set", "max_streams=9", "--set", "idle_s=3")


def test_all_services_share_a_redis_of_the_clusters_own(tmp_path: Path) -> None:
    services = arrange(tmp_path)
    urls = {
        yaml.safe_load((tmp_path / f"{name}.yaml").read_text())[section]["redis"]["url"]
        for name, section in (("router", "router"), ("kvstore", "kvstore"), ("prefill-0", "worker"))
    }
    (url,) = urls
    assert url.startswith("redis://:")
    assert services["redis"].grpc is None
    assert not any(url in word for service in services.values() for word in service.command)


def test_clusters_that_share_a_redis_have_a_log_of_their_own_each(tmp_path: Path) -> None:
    prefixes = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        arrange(tmp_path / name)
        prefixes.add(yaml.safe_load((tmp_path / name / "router.yaml").read_text())["router"]["index"]["key_prefix"])
    assert len(prefixes) == 2


def test_a_redis_that_is_named_is_used_and_none_is_started(tmp_path: Path) -> None:
    planned = layout.plan(replace(config(tmp_path), redis_url="redis://somewhere:1"), ())
    ports = Ports("127.0.0.1", tmp_path / "ports")
    services = layout.arrange(planned, ports)
    ports.close()
    assert "redis" not in {service.role for service in services}
    assert yaml.safe_load((tmp_path / "router.yaml").read_text())["router"]["redis"] == {"url": "redis://somewhere:1"}


@pytest.mark.parametrize(
    ("workers", "wanted"),
    [
        ("prefill=1", "a prefill and a decode worker, or a hybrid one, found 'prefill=1'"),
        ("prefil=1,decode=1", "roles prefill, decode, hybrid, found 'prefil=1'"),
        ("prefill=x,decode=1", "found 'prefill=x'"),
        ("prefill=-1,decode=1", "found 'prefill=-1'"),
        ("decode=1000000000,prefill=1", "at most 64"),
    ],
)
def test_workers_that_make_no_cluster_are_refused(tmp_path: Path, workers: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        layout.plan(config(tmp_path, workers), ())


@pytest.mark.parametrize("assignment", ["threads=1", "wroker.threads=1", "decode-7.threads=1"])
def test_an_assignment_to_nobody_is_refused(tmp_path: Path, assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set wants SECTION.FIELD=VALUE"):
        layout.plan(config(tmp_path), (assignment,))


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.gguf does not exist; pass --model PATH"):
        layout.plan(RunConfig(dir=tmp_path, model=tmp_path / "absent.gguf"), ())
