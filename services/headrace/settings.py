"""Settings of every process: a file, the environment and the command line become a frozen dataclass.

An option has one name in four spellings. Field `dtype` of section `worker`:

    worker: {dtype: bf16}              in the YAML file, one section per role
    HEADRACE_WORKER_DTYPE=bf16         in the environment
    --set dtype=bf16                   on the command line of `headrace serve prefill`
    --set worker.dtype=bf16            on the command line of `headrace up`

The later wins. A field of a nested dataclass is `transfer: {lane: cma}`, `HEADRACE_WORKER_TRANSFER__LANE`
(two underscores, so that it cannot be mistaken for a field `transfer_lane`) and `--set transfer.lane=cma`.
Lists are comma separated outside the file; `none` is no value where a field may have none.

This is the only module that reads the environment. Variables `HEADRACE_*` of other sections are left alone unless
they look like a slip of the pen for one of this section: Kubernetes adds `HEADRACE_ROUTER_SERVICE_HOST` and the like
for a Service of that name, so pods that run headrace switch off `enableServiceLinks`.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import yaml

from headrace.errors import ConfigError

T = TypeVar("T")

SECTIONS = frozenset({"router", "worker", "kvstore", "ingestor", "run", "client"})
"""Sections a file may hold; each process reads its own and refuses unknown ones."""


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a number, both allowed; `most` None is no upper one. Stands in a field's `Annotated` type.

    The number is a whole one if `least` is.
    """

    least: float
    most: float | None = None

    def __str__(self) -> str:
        word = "a number" if isinstance(self.least, float) else "a whole number"
        return f"{word} from {self.least} " + ("up" if self.most is None else f"to {self.most}")

    def holds(self, value: float) -> bool:
        """Return whether a value lies within."""
        return self.least <= value and (self.most is None or value <= self.most)


class Secret:
    """A text that stands in no description, log or error; `reveal` returns it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text."""
        return self._text

    def __str__(self) -> str:
        return "(hidden)" if self._text else "(empty)"

    __repr__ = __str__


Port: TypeAlias = Annotated[int, Between(0, 65535)]
"""A port to bind; 0 lets the system choose."""

Count: TypeAlias = Annotated[int, Between(1)]
"""How many of something, or how many bytes; at least one."""

_SECRET = re.compile(r"(?<=://)\S*(?=@)|(?<=password=)[^&\s]+")
"""Who a URL logs in as, and by which password: not for the eyes of those who read logs."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class Origin(Enum):
    """Where a value came from, weakest first."""

    DEFAULT = "default"
    FILE = "file"
    ENVIRONMENT = "environment"
    COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One resolved option.

    Attributes:
        name: Dotted path of the field in its section.
        value: What the process uses.
        origin: Which source won.
    """

    name: str
    value: object
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[T]):
    """A configuration and where each of its values came from."""

    value: T
    section: str
    settings: tuple[Setting, ...]

    def describe(self) -> str:
        """Return one line per option, `section.name = value  (origin)`, for --print-config and the log."""
        rows = [(f"{self.section}.{item.name}", _shown(item.value), item.origin.value) for item in self.settings]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{name:<{widths[0]}} = {value:<{widths[1]}}  ({origin})" for name, value, origin in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeArgs:
    """What `headrace serve ROLE` passes to the role's composition root.

    Attributes:
        file: YAML file of the process, or None for defaults.
        overrides: Values of `--set`, under dotted names without the section.
        env: The environment.
        print_config: Show the resolved configuration and leave.
    """

    file: Path | None = None
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    print_config: bool = False

    def load(self, cls: type[T], section: str) -> Loaded[T]:
        """Resolve the role's configuration; raises as `load`."""
        return load(cls, file=self.file, section=section, env=self.env, overrides=self.overrides)


def environment() -> Mapping[str, str]:
    """Return the process's environment; nothing else of headrace reads it."""
    return os.environ


def prefer(variable: str, value: str) -> None:
    """Set a variable of the process's environment, for libraries that read it, unless it is set."""
    os.environ.setdefault(variable, value)


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Split the values of `--set`.

    Raises:
        ConfigError: one has no `=` or no name.
    """
    parsed: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set wants NAME=VALUE, found {assignment!r}", field="--set")
        parsed[name.strip()] = value
    return parsed


def load(
    cls: type[T],
    *,
    file: Path | None,
    section: str,
    env: Mapping[str, str],
    overrides: Mapping[str, str],
    flag: Callable[[str], str] = "--set {}".format,
) -> Loaded[T]:
    """Build a configuration dataclass from all its sources.

    Args:
        cls: A dataclass; its fields may be dataclasses themselves.
        file: YAML file with one mapping per section; None when there is none.
        section: The section to read, one word.
        env: The environment.
        overrides: Texts of the command line under dotted names.
        flag: What stood for those names on the command line.

    Raises:
        ConfigError: a key is unknown, a value is bad or missing, or the file cannot be read.
    """
    fields = dict(_flatten(cls, ""))
    values: dict[str, object] = {}
    origins: dict[str, Origin] = {}
    sources: dict[str | None, str] = {}
    for found in (
        *_from_file(file, section, fields),
        *_from_env(env, section, fields),
        *_from_overrides(overrides, flag),
    ):
        if found.name not in fields:
            raise _unknown(found.name, found.source, fields)
        values[found.name] = _convert(found.value, fields[found.name], f"{section}.{found.name}", found)
        origins[found.name] = found.origin
        sources[found.name] = found.source
    try:
        config = _build(cls, "", values, section)
    except ValueError as error:
        raise ConfigError(f"section {section}: {error}", field=section) from error
    except ConfigError as error:
        if error.field not in sources:
            raise
        raise ConfigError(f"section {section}: {error} ({sources[error.field]})", field=error.field) from None
    settings = tuple(
        Setting(name=name, value=_lookup(config, name), origin=origins.get(name, Origin.DEFAULT)) for name in fields
    )
    return Loaded(value=config, section=section, settings=settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A value that some source holds for a field."""

    name: str
    value: object
    origin: Origin
    source: str


def _flatten(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted name and type of every field that holds a value and not a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _flatten(typing.cast(type, kind), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind


def _from_file(file: Path | None, section: str, fields: Mapping[str, Any]) -> Iterator[_Found]:
    if file is None:
        return
    document = _read(file)
    for name in document:
        if name not in SECTIONS | {section}:
            raise _unknown(str(name), f"section of {file}", SECTIONS | {section})
    content = document.get(section)
    if content is not None:
        for name, value in _leaves(_mapping(content, f"section {section}", str(file)), "", fields, file):
            yield _Found(name=name, value=value, origin=Origin.FILE, source=str(file))


def _read(file: Path) -> Mapping[object, object]:
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration {file}: {error}", field="--config") from error
    return {} if document is None else _mapping(document, "the document", str(file))


def _mapping(value: object, what: str, source: str) -> Mapping[object, object]:
    if not isinstance(value, dict):
        raise ConfigError(f"{what} of {source} wants a mapping, found {type(value).__name__} {value!r}", field=what)
    return value


def _leaves(
    content: Mapping[object, object], prefix: str, fields: Mapping[str, Any], file: Path
) -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if any(field.startswith(f"{name}.") for field in fields):
            yield from _leaves(_mapping(value, name, str(file)), f"{name}.", fields, file)
        else:
            yield name, value


def _from_env(env: Mapping[str, str], section: str, fields: Mapping[str, Any]) -> Iterator[_Found]:
    prefix = f"HEADRACE_{section.upper()}_"
    names = {prefix + name.upper().replace(".", "__"): name for name in fields}
    for variable in sorted(env):
        if not variable.startswith(prefix):
            _refuse_slip(variable, names)
            continue
        if variable not in names:
            raise _unknown(variable, "the environment", names)
        yield _Found(name=names[variable], value=env[variable], origin=Origin.ENVIRONMENT, source=variable)


def _refuse_slip(variable: str, names: Iterable[str]) -> None:
    """Refuse a variable whose section is unknown and that is spelt almost like an option of this one."""
    others = tuple(f"HEADRACE_{section.upper()}_" for section in SECTIONS)
    if not variable.startswith("HEADRACE_") or variable.startswith(others):
        return
    if difflib.get_close_matches(variable, names, n=1, cutoff=0.9):
        raise _unknown(variable, "the environment", names)


def _from_overrides(overrides: Mapping[str, str], flag: Callable[[str], str]) -> Iterator[_Found]:
    for name, value in overrides.items():
        yield _Found(name=name, value=value, origin=Origin.COMMAND_LINE, source=flag(name))


def _unknown(name: str, source: str, known: Iterable[str]) -> ConfigError:
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    advice = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(choices)}"
    return ConfigError(f"unknown key {name!r} in {source}; {advice}", field=name)


def _build(cls: type[T], prefix: str, values: Mapping[str, object], section: str) -> T:
    hints = typing.get_type_hints(cls)
    arguments: dict[str, object] = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        name = prefix + field.name
        arguments[field.name] = values.get(name, _default(field))
        if dataclasses.is_dataclass(hints[field.name]):
            outer = _defaults_of(arguments[field.name], f"{name}.")
            arguments[field.name] = _build(hints[field.name], f"{name}.", {**outer, **values}, section)
        if arguments[field.name] is dataclasses.MISSING:
            raise ConfigError(f"{section}.{name} has no value and no default; set it", field=f"{section}.{name}")
    return cls(**arguments)


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _defaults_of(default: object, prefix: str) -> dict[str, object]:
    """Return the fields of a default that is a dataclass, under dotted names; nothing for other values."""
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return {}
    return {prefix + name: _lookup(default, name) for name, _ in _flatten(type(default), "")}


def _lookup(config: object, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _shown(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return ",".join(_shown(item) for item in value) or "(empty)"
    return "none" if value is None else _SECRET.sub("***", str(value))


class _Unfit(Exception):
    """A value is not of the wanted type; the text says what is wanted."""


def _convert(value: object, kind: object, name: str, found: _Found) -> object:
    """Return `value` as type `kind`; only texts of the environment and command line are parsed."""
    try:
        return _parse(value, kind) if found.origin is not Origin.FILE else _check(value, kind)
    except _Unfit as error:
        shown = "" if _unwrap(kind)[0] is Secret else f" {value!r}"
        raise ConfigError(
            f"{name} wants {error}, found {type(value).__name__}{shown} ({found.source})", field=name
        ) from error


def _parse(text: object, kind: object) -> object:
    """Parse a text of the environment or command line."""
    assert isinstance(text, str)  # both sources hold texts only
    inner, is_optional = _unwrap(kind)
    if is_optional and text.strip().lower() == "none":
        return None
    if typing.get_origin(inner) is Annotated:
        return _check(_scalar(text, typing.get_args(inner)[0]), kind)
    if typing.get_origin(inner) is tuple:
        item = typing.get_args(inner)[0]
        return tuple(_parse(part.strip(), item) for part in text.split(",") if part.strip())
    return _check(_scalar(text, inner), kind)


def _scalar(text: str, kind: object) -> object:
    """Return the text as YAML would have given it; what does not parse stays a text and fails the check."""
    if kind is bool:
        word = text.strip().lower()
        return True if word in _TRUE else False if word in _FALSE else text
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return text
    return text


def _unwrap(kind: object) -> tuple[object, bool]:
    """Take `X | None` apart."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        inner = [arm for arm in typing.get_args(kind) if arm is not type(None)]
        if len(inner) != 1:
            raise TypeError(f"a setting has one type or none, not {kind}")
        return inner[0], True
    return kind, False


def _check(value: object, kind: object) -> object:
    """Return a value of the file as the field's type."""
    inner, is_optional = _unwrap(kind)
    if value is None and is_optional:
        return None
    if typing.get_origin(inner) is Annotated:
        return _within(value, *typing.get_args(inner), is_optional=is_optional)
    if typing.get_origin(inner) is tuple:
        item = typing.get_args(inner)[0]
        if not isinstance(value, list):
            raise _Unfit(f"a list, each {_named(item)}")
        return tuple(_check(element, item) for element in value)
    if isinstance(inner, type) and issubclass(inner, Enum):
        return _member(value, inner)
    if inner is Path and isinstance(value, str) and value:
        return Path(value)
    if inner is Secret and isinstance(value, str):
        return Secret(value)
    if inner is float and type(value) is int:
        return float(value)
    if type(value) is not inner or value != value:  # NaN is never meant
        raise _Unfit(_named(inner) + (" or none" if is_optional else ""))
    return value


def _within(value: object, kind: type, bounds: Between, *, is_optional: bool) -> object:
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, int | float) or type(value) is not kind or not bounds.holds(value):
        raise _Unfit(f"{bounds} or none" if is_optional else str(bounds))
    return value


def _member(value: object, kind: type[Enum]) -> Enum:
    for member in kind:
        if value == member.value:
            return member
    raise _Unfit(f"one of {', '.join(str(member.value) for member in kind)}")


def _named(kind: object) -> str:
    names: dict[object, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        Secret: "a text",
        Path: "a path",
    }
    return names.get(kind, str(kind))
