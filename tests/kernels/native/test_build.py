"""The kernels are built once and are never a condition for running."""

import importlib
import stat

import pytest

from headrace_kernels.native import build, is_available, library
from headrace_kernels.native.build import NativeUnavailable


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_CACHE_DIR", str(tmp_path / "cache"))
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A program in the place of g++ that notes every call."""

    def install(script):
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\necho called >> {tmp_path}/calls\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(path))

    return install


def test_a_build_is_kept_and_another_one_made_for_other_flags(compiler, tmp_path, monkeypatch):
    compiler('while [ "$1" != -o ]; do shift; done; echo built > "$2"')
    first = build()
    assert build() == first
    assert (tmp_path / "calls").read_text() == "called\n"
    monkeypatch.setenv("HEADRACE_NATIVE_FLAGS", "-g")
    assert build() != first
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".so", ".so"]


@pytest.mark.parametrize("damage", [b"", b"other bytes", None])
def test_a_damaged_build_is_made_anew(compiler, tmp_path, damage):
    compiler('while [ "$1" != -o ]; do shift; done; echo built > "$2"')
    path = build()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] if damage is None else damage)
    assert build() == path
    assert path.read_bytes() == whole
    assert (tmp_path / "calls").read_text() == "called\n" * 2


def test_a_cache_folder_that_cannot_be_used_is_named(compiler, tmp_path):
    (tmp_path / "cache").write_text("a file")
    compiler("exit 0")
    with pytest.raises(NativeUnavailable, match="cache cannot be used"):
        library()
    assert not is_available()


def test_a_failing_compiler_is_quoted_and_leaves_nothing(compiler, tmp_path):
    compiler("echo no such flag >&2; exit 1")
    with pytest.raises(NativeUnavailable, match="no such flag"):
        library()
    assert not is_available()
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_compiler_the_kernels_are_not_available(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler"):
        library()


def test_another_processor_is_named(monkeypatch):
    module = importlib.import_module("headrace_kernels.native.build")  # the package has a function of that name
    monkeypatch.setattr(module, "_processor_flags", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(NativeUnavailable, match="lacks f16c"):
        library()


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("HEADRACE_NATIVE", "0")
    assert not is_available()
