import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import settings
from headrace.errors import ConfigError
from headrace.settings import Loaded, Origin, Secret, ServeArgs


class Precision(Enum):
    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    name: str = "cma"
    timeout_s: float = 1.0
    is_required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    model: Path
    port: int = 8000
    precision: Precision = Precision.BF16
    store: str | None = None
    peers: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    lane: Lane = field(default_factory=lambda: Lane(timeout_s=7.0))

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise ValueError(f"port wants at most 65535, found {self.port}")


def load(
    tmp_path: Path, text: str = "", env: Mapping[str, str] | None = None, overrides: Mapping[str, str] | None = None
) -> Loaded[Config]:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return settings.load(
        Config, file=file, section="worker", env=env or {}, overrides={"model": "m.gguf"} | dict(overrides or {})
    )


def test_a_field_that_nobody_sets_keeps_its_default(tmp_path: Path) -> None:
    assert load(tmp_path).value == Config(model=Path("m.gguf"))


def test_every_type_is_read_from_the_file(tmp_path: Path) -> None:
    text = """
    worker:
      port: 1
      precision: fp32
      store: "a:1"
      peers: ["b:2", "c:3"]
      sizes: [4]
      lane: {name: tcp, timeout_s: 2, is_required: true}
    """
    assert load(tmp_path, text).value == Config(
        model=Path("m.gguf"),
        port=1,
        precision=Precision.FP32,
        store="a:1",
        peers=("b:2", "c:3"),
        sizes=(4,),
        lane=Lane(name="tcp", timeout_s=2.0, is_required=True),
    )


def test_every_type_is_read_from_the_environment(tmp_path: Path) -> None:
    env = {
        "HEADRACE_WORKER_PORT": "1",
        "HEADRACE_WORKER_PRECISION": "fp32",
        "HEADRACE_WORKER_STORE": "a:1",
        "HEADRACE_WORKER_PEERS": "b:2, c:3",
        "HEADRACE_WORKER_SIZES": "4",
        "HEADRACE_WORKER_LANE__NAME": "tcp",
        "HEADRACE_WORKER_LANE__TIMEOUT_S": "2",
        "HEADRACE_WORKER_LANE__IS_REQUIRED": "yes",
    }
    assert load(tmp_path, env=env).value == Config(
        model=Path("m.gguf"),
        port=1,
        precision=Precision.FP32,
        store="a:1",
        peers=("b:2", "c:3"),
        sizes=(4,),
        lane=Lane(name="tcp", timeout_s=2.0, is_required=True),
    )


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path) -> None:
    text = "worker: {port: 1, store: file, lane: {name: file}}"
    env = {"HEADRACE_WORKER_PORT": "2", "HEADRACE_WORKER_STORE": "env"}
    loaded = load(tmp_path, text, env, {"port": "3"})
    assert (loaded.value.port, loaded.value.store, loaded.value.lane.name) == (3, "env", "file")
    origins = {setting.name: setting.origin for setting in loaded.settings}
    assert origins == {
        "model": Origin.COMMAND_LINE,
        "port": Origin.COMMAND_LINE,
        "precision": Origin.DEFAULT,
        "store": Origin.ENVIRONMENT,
        "peers": Origin.DEFAULT,
        "sizes": Origin.DEFAULT,
        "lane.name": Origin.FILE,
        "lane.timeout_s": Origin.DEFAULT,
        "lane.is_required": Origin.DEFAULT,
    }


def test_a_nested_part_that_nobody_sets_keeps_the_default_of_the_whole(tmp_path: Path) -> None:
    assert load(tmp_path).value.lane == Lane(timeout_s=7.0)


def test_a_nested_part_that_is_set_in_one_place_keeps_the_rest_of_the_default(tmp_path: Path) -> None:
    assert load(tmp_path, overrides={"lane.name": "tcp"}).value.lane == Lane(name="tcp", timeout_s=7.0)


def test_none_means_no_value_only_where_there_may_be_none(tmp_path: Path) -> None:
    assert load(tmp_path, "worker: {store: a}", overrides={"store": "none"}).value.store is None
    assert load(tmp_path, overrides={"lane.name": "none"}).value.lane.name == "none"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("worker: {prot: 1}", "unknown key 'prot' in .*config.yaml; did you mean 'port'"),
        ("worker: {lane: {nam: x}}", "unknown key 'lane.nam' in .*; did you mean 'lane.name'"),
        ("wroker: {port: 1}", "unknown key 'wroker' in section of .*; did you mean 'worker'"),
        ("worker: {lane: tcp}", "lane of .*config.yaml wants a mapping, found str 'tcp'"),
        ("worker: [1]", "section worker of .*config.yaml wants a mapping, found list"),
        ("worker: {port: '1'}", "worker.port wants a whole number, found str '1' .*config.yaml"),
        ("worker: {port: true}", "worker.port wants a whole number, found bool True"),
        ("worker: {port: 1.5}", "worker.port wants a whole number, found float 1.5"),
        ("worker: {port: null}", "worker.port wants a whole number, found NoneType None"),
        ("worker: {lane: {timeout_s: .nan}}", "worker.lane.timeout_s wants a number, found float nan"),
        ("worker: {lane: {is_required: 1}}", "worker.lane.is_required wants true or false, found int 1"),
        ("worker: {peers: a}", "worker.peers wants a list, each a text, found str 'a'"),
        ("worker: {peers: [1]}", "worker.peers wants a text, found list"),
        ("worker: {precision: fp8}", "worker.precision wants one of fp32, bf16, found str 'fp8'"),
        ("worker: {port: 70000}", "section worker: port wants at most 65535, found 70000"),
        ("worker: {", "cannot read the configuration .*config.yaml"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("variable", "value", "wanted"),
    [
        ("HEADRACE_WORKER_PROT", "1", "'HEADRACE_WORKER_PROT' in the environment; did you mean 'HEADRACE_WORKER_PORT'"),
        ("HEADRACE_WORKER_LANE_NAME", "x", "did you mean 'HEADRACE_WORKER_LANE__NAME'"),
        ("HEADRACE_WORKER_PORT", "high", "worker.port wants a whole number, found str 'high' .HEADRACE_WORKER_PORT"),
        ("HEADRACE_WORKER_SIZES", "1,x", "worker.sizes wants a whole number, found str '1,x'"),
        ("HEADRACE_WORKER_LANE__IS_REQUIRED", "maybe", "worker.lane.is_required wants true or false"),
    ],
)
def test_a_bad_variable_is_refused_by_name(tmp_path: Path, variable: str, value: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load(tmp_path, env={variable: value})


def test_variables_of_other_sections_are_left_alone(tmp_path: Path) -> None:
    env = {"HEADRACE_ROUTER_SERVICE_HOST": "10.0.0.1", "HEADRACE_HTTP": "http://h", "WORKER_PORT": "1"}
    assert load(tmp_path, env=env).value.port == 8000


def test_an_unknown_override_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'ports' in --set ports; did you mean 'port'"):
        load(tmp_path, overrides={"ports": "1"})


def test_a_field_without_value_and_default_is_named() -> None:
    with pytest.raises(ConfigError, match=r"worker\.model has no value and no default"):
        settings.load(Config, file=None, section="worker", env={}, overrides={})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml"):
        settings.load(Config, file=tmp_path / "absent.yaml", section="worker", env={}, overrides={})


def test_the_description_shows_value_and_origin_of_every_option(tmp_path: Path) -> None:
    lines = load(tmp_path, env={"HEADRACE_WORKER_PORT": "9"}).describe().splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "worker.model = m.gguf (command line)",
        "worker.port = 9 (environment)",
        "worker.precision = bf16 (default)",
        "worker.store = none (default)",
        "worker.peers = (empty) (default)",
        "worker.sizes = 1,2 (default)",
        "worker.lane.name = cma (default)",
        "worker.lane.timeout_s = 7.0 (default)",
        "worker.lane.is_required = False (default)",
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guarded:
    key: Secret = Secret("")
    spare: Secret | None = None


def load_guarded(
    tmp_path: Path, text: str = "", env: Mapping[str, str] | None = None, overrides: Mapping[str, str] | None = None
) -> Loaded[Guarded]:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return settings.load(Guarded, file=file, section="router", env=env or {}, overrides=overrides or {})


def test_a_secret_is_read_from_every_source(tmp_path: Path) -> None:
    found = [
        load_guarded(tmp_path, "router: {key: hush}"),
        load_guarded(tmp_path, env={"HEADRACE_ROUTER_KEY": "hush"}),
        load_guarded(tmp_path, overrides={"key": "hush", "spare": "hush"}),
    ]
    assert [loaded.value.key.reveal() for loaded in found] == ["hush"] * 3
    assert [loaded.value.spare is None for loaded in found] == [True, True, False]


def test_a_secret_is_neither_described_nor_printed(tmp_path: Path) -> None:
    loaded = load_guarded(tmp_path, "router: {key: hush}")
    assert [" ".join(line.split()) for line in loaded.describe().splitlines()] == [
        "router.key = (hidden) (file)",
        "router.spare = none (default)",
    ]
    assert "hush" not in f"{loaded} {loaded.value!r} {loaded.value.key}"


def test_an_empty_secret_is_described_as_such(tmp_path: Path) -> None:
    assert "router.key   = (empty)  (default)" in load_guarded(tmp_path).describe()


def test_a_secret_of_the_wrong_type_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="key wants a text, found int ") as caught:
        load_guarded(tmp_path, "router: {key: 12345}")
    assert "12345" not in str(caught.value)


def test_serve_args_load_from_all_their_sources(tmp_path: Path) -> None:
    file = tmp_path / "w.yaml"
    file.write_text("worker: {model: a}")
    args = ServeArgs(file=file, overrides={"port": "4"}, env={"HEADRACE_WORKER_STORE": "s:1"})
    assert args.load(Config, "worker").value == Config(model=Path("a"), port=4, store="s:1")


def test_assignments_are_split_at_the_first_equals_sign() -> None:
    assert settings.parse_assignments(["a.b=c=d", "e="]) == {"a.b": "c=d", "e": ""}


@pytest.mark.parametrize("assignment", ["port", "=1"])
def test_an_assignment_without_name_or_value_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match="--set wants NAME=VALUE"):
        settings.parse_assignments([assignment])


def test_the_environment_is_the_process_environment() -> None:
    assert settings.environment() is os.environ


@given(st.text(max_size=20), st.sampled_from(["port", "lane.timeout_s", "lane.is_required", "precision", "sizes"]))
def test_any_text_is_a_value_or_a_config_error(text: str, name: str) -> None:
    try:
        loaded = settings.load(Config, file=None, section="worker", env={}, overrides={"model": "m", name: text})
    except ConfigError:
        return
    assert isinstance(loaded.value, Config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    grpc_port: settings.Port = 50000
    bytes: settings.Count | None = None
    share: Annotated[float, settings.Between(0.0, 100.0)] = 0.5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grpc_port", "99999", "worker.grpc_port wants a whole number from 0 to 65535, found "),
        ("grpc_port", "-1", "worker.grpc_port wants a whole number from 0 to 65535, found "),
        ("grpc_port", "x", "worker.grpc_port wants a whole number from 0 to 65535, found "),
        ("bytes", "0", "worker.bytes wants a whole number from 1 up or none, found "),
        ("share", "-1", "worker.share wants a number from 0.0 to 100.0, found "),
        ("share", "inf", "worker.share wants a number from 0.0 to 100.0, found "),
        ("share", "nan", "worker.share wants a number from 0.0 to 100.0, found "),
    ],
)
def test_a_number_out_of_its_bounds_is_refused_from_every_source(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    (tmp_path / "c.yaml").write_text(f"worker: {{{name}: {value}}}")
    sources: list[tuple[Path | None, dict[str, str], dict[str, str]]] = [
        (tmp_path / "c.yaml", {}, {}),
        (None, {f"HEADRACE_WORKER_{name.upper()}": value}, {}),
        (None, {}, {name: value}),
    ]
    for file, env, overrides in sources:
        with pytest.raises(ConfigError, match=message):
            settings.load(Bounded, file=file, section="worker", env=env, overrides=overrides)


def test_numbers_at_their_bounds_and_no_number_are_accepted() -> None:
    env = {"HEADRACE_WORKER_GRPC_PORT": "65535", "HEADRACE_WORKER_BYTES": "none"}
    loaded = settings.load(Bounded, file=None, section="worker", env=env, overrides={})
    assert loaded.value == Bounded(grpc_port=65535, bytes=None)


def test_a_misspelt_section_in_the_environment_is_refused_and_other_programs_variables_are_not() -> None:
    with pytest.raises(ConfigError, match="did you mean 'HEADRACE_WORKER_GRPC_PORT'"):
        settings.load(Bounded, file=None, section="worker", env={"HEADRACE_WORKR_GRPC_PORT": "1"}, overrides={})
    env = {"HEADRACE_ROUTER_GRPC_PORT": "1", "HEADRACE_REDIS_SERVICE_HOST": "x", "HEADRACE_UP": ""}
    assert settings.load(Bounded, file=None, section="worker", env=env, overrides={}).value == Bounded()
