"""Builds the C++ kernels with the machine's compiler, once per source, flags and processor."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from headrace_kernels.native.abi import declare

SOURCE = Path(__file__).parent.parent / "csrc"
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror")
NEEDED = frozenset({"avx2", "fma", "f16c"})
TIMEOUT_S = 300
SEAL_BYTES = 32

logger = logging.getLogger(__name__)


class NativeUnavailable(RuntimeError):
    """This machine cannot run the C++ kernels; the message says why."""


@cache
def library() -> ctypes.CDLL:
    """Return the kernels, built at the first use and kept under the user's cache folder.

    `HEADRACE_NATIVE=0` switches them off, `HEADRACE_CACHE_DIR` names another folder.

    Raises:
        NativeUnavailable: Other processor, no compiler, or the build failed.
    """
    if os.environ.get("HEADRACE_NATIVE") == "0":
        raise NativeUnavailable("HEADRACE_NATIVE=0")
    missing = NEEDED - _processor_flags()
    if missing:
        raise NativeUnavailable(f"the processor lacks {', '.join(sorted(missing))}")
    loaded = ctypes.CDLL(str(build()))
    declare(loaded)
    return loaded


def is_available() -> bool:
    """Return whether the kernels can be used; builds them at the first call."""
    try:
        library()
    except NativeUnavailable as error:
        logger.warning("C++ kernels not available, plain torch is slower", extra={"reason": str(error)})
        return False
    return True


def build() -> Path:
    """Compile what is not compiled yet; safe when several processes do it at once.

    `HEADRACE_NATIVE_FLAGS` adds flags of the compiler, for sanitizers.

    Raises:
        NativeUnavailable: There is no compiler, it failed, or the cache folder cannot be used.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler: install g++ or set CXX")
    sources = sorted(SOURCE.glob("*.cpp"))
    flags = (*FLAGS, *os.environ.get("HEADRACE_NATIVE_FLAGS", "").split())
    digest = hashlib.sha256(repr((compiler, flags, platform.machine(), sorted(_processor_flags()))).encode())
    for file in sorted(SOURCE.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    target = cache_dir() / f"native-{digest.hexdigest()[:24]}.so"
    if _is_whole(target):
        return target
    try:
        _compile(compiler, flags, sources, target)
    except OSError as error:
        raise NativeUnavailable(f"the cache folder {target.parent} cannot be used: {error}") from error
    return target


def _compile(compiler: str, flags: tuple[str, ...], sources: list[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / "native.so"
        command = [compiler, *flags, *map(str, sources), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)  # noqa: S603
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or str(error)
            raise NativeUnavailable(f"{compiler} failed: {detail}") from error
        content = made.read_bytes()
        with made.open("ab") as file:
            file.write(_seal(content))
        made.replace(target)


def _is_whole(library: Path) -> bool:
    """Return whether a library is all that was written; one that is not would end the process that loads it."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return content[-SEAL_BYTES:] == _seal(content[:-SEAL_BYTES])


def _seal(content: bytes) -> bytes:
    """Return what stands behind a library, where loaders do not look."""
    return hashlib.sha256(content).digest()


def cache_dir() -> Path:
    """Return the folder of things built once."""
    named = os.environ.get("HEADRACE_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


@cache
def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
