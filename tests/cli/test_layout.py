from pathlib import Path

import pytest
import yaml

from headrace.cli import layout
from headrace.cli.layout import RunConfig
from headrace.cli.ports import Ports
from headrace.errors import ConfigError
from headrace.settings import load
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
        "prefill-0",
        "prefill-1",
        "decode-0",
        "hybrid-0",
    ]


def test_the_router_knows_every_worker_and_the_store(tmp_path: Path) -> None:
    services = arrange(tmp_path)
    written = yaml.safe_load((tmp_path / "router.yaml").read_text())["router"]
    assert written["workers"] == [services["prefill-0"].grpc, services["decode-0"].grpc]
    assert written["kvstore"] == services["kvstore"].grpc
    assert services["router"].http == f"http://127.0.0.1:{written['http_port']}"


def test_a_worker_knows_the_others_but_not_itself(tmp_path: Path) -> None:
    services = arrange(tmp_path, workers="prefill=1,decode=2")
    loaded = load(WorkerConfig, file=tmp_path / "decode-1.yaml", section="worker", env={}, overrides={}).value
    assert loaded.peers == (services["prefill-0"].grpc, services["decode-0"].grpc)
    assert f"{loaded.host}:{loaded.grpc_port}" == services["decode-1"].grpc


def test_assignments_reach_all_services_of_a_section_or_one_process(tmp_path: Path) -> None:
    services = arrange(tmp_path, "worker.threads=2", "decode-0.threads=1", "router.max_moves=0")
    tails = {name: service.command[service.command.index("--config") + 2 :] for name, service in services.items()}
    assert tails == {
        "router": ("--set", "max_moves=0"),
        "kvstore": (),
        "prefill-0": ("--set", "threads=2"),
        "decode-0": ("--set", "threads=1"),
    }


def test_the_model_of_the_installed_package_is_the_default() -> None:
    assert layout.bundled_model().suffix == ".gguf"


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
