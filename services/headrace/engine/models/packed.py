"""Weights packed for the C++ kernels, kept in a file from one start to the next.

Workers of a machine map the same file, so its pages are in memory once. A file is used only if it was written for
the same contents of the model and by the same code, and if all its bytes are those that were written; any other is
written anew.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import blake3
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from headrace_kernels import native
from headrace_kernels.native import Grid, Packed, abi

logger = logging.getLogger(__name__)

_CODE = (
    Path(native.__file__).with_name("pack.py"),
    *(Path(__file__).with_name(f"{n}.py") for n in ("native", "gguf", "safetensors", "weights")),
)
"""Files that decide what is in a panel, and in which order."""


class PackedWeights:
    """Panels by name: those of an earlier start, and those packed now.

    Attributes:
        panels: All that were found or packed.
        is_complete: Whether nothing had to be packed.
    """

    def __init__(self, found: Mapping[str, Packed] | None = None) -> None:
        self.panels = dict(found or {})
        self.is_complete = True

    def get(self, name: str, make: Callable[[], Grid | torch.Tensor]) -> Packed:
        """Return a weight in panels; `make` is asked for it only if there are none."""
        if name not in self.panels:
            self.panels[name] = Packed.of(make())
            self.is_complete = False
        return self.panels[name]


@contextlib.contextmanager
def kept_packed(folder: Path | None, model: Path, contents: Sequence[bytes], form: str) -> Iterator[PackedWeights]:
    """Give the panels that an earlier start kept, and keep what is packed within.

    Workers that start together without a file take turns, so that one packs and the others map what it wrote. A
    folder that cannot be written costs the time of packing and nothing else.

    Args:
        folder: Where files are kept; None keeps nothing.
        model: Where the model is; of each place and form the latest file alone is kept.
        contents: Digests of the files of the model.
        form: What weights are packed from: "grid" or "bf16".
    """
    if folder is None:
        yield PackedWeights()
        return
    place = f"weights-{hashlib.sha256(bytes(model.resolve())).hexdigest()[:16]}-{form}"
    key = _key(contents, form)
    path = folder / f"{place}-{key[:24]}.safetensors"
    found = read_packed(path, key)
    if found is not None:
        yield PackedWeights(found)
        return
    with _turn(folder / f"{place}.lock") as is_mine:
        weights = PackedWeights(read_packed(path, key))
        yield weights
        if is_mine and not weights.is_complete:
            _keep(path, key, weights.panels)
            for old in folder.glob(f"{place}-*"):
                if old != path:
                    old.unlink(missing_ok=True)


def read_packed(path: Path, key: str) -> dict[str, Packed] | None:
    """Return the panels of a file, mapped; None if there is no whole file of this key."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if found.get("key") != key:
                return None
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("packed weights unreadable", extra={"path": str(path), "error": str(error)})
        return None
    if found.get("digest") != _digest(found.get("panels", ""), tensors):
        logger.warning("packed weights damaged", extra={"path": str(path)})
        return None
    sizes = cast("dict[str, tuple[int, int, int]]", json.loads(found["panels"]))
    return {
        name: Packed(format=abi.Format(code), out_size=out_size, in_size=in_size, data=tensors[name])
        for name, (code, out_size, in_size) in sizes.items()
    }


def write_packed(path: Path, key: str, panels: Mapping[str, Packed]) -> None:
    """Write a file that is whole or absent, whenever the machine stops.

    Raises:
        OSError: It cannot be written.
        SafetensorError: It cannot be written.
    """
    described = json.dumps({name: (int(one.format), one.out_size, one.in_size) for name, one in panels.items()})
    tensors = {name: panels[name].data for name in sorted(panels)}
    metadata = {"key": key, "panels": described, "digest": _digest(described, tensors)}
    # Not random: the turn is ours, and what a killed worker left is overwritten.
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata)
    _sync(unfinished)
    unfinished.replace(path)
    _sync(path.parent)


def _keep(path: Path, key: str, panels: Mapping[str, Packed]) -> None:
    try:
        write_packed(path, key, panels)
    except (OSError, SafetensorError) as error:
        logger.warning("packed weights not kept", extra={"path": str(path), "error": str(error)})
    else:
        logger.info("packed weights kept", extra={"path": str(path), "num_bytes": path.stat().st_size})


@contextlib.contextmanager
def _turn(lock: Path) -> Iterator[bool]:
    """Wait until no other process packs; give False, at once, where no lock can be made."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        logger.warning("packed weights not kept", extra={"path": str(lock), "error": str(error)})
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(file)


def _key(contents: Sequence[bytes], form: str) -> str:
    hasher = hashlib.sha256(repr((contents, form)).encode())
    for file in _CODE:
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


def _digest(described: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of all panels and what is said of them."""
    hasher = blake3.blake3(described.encode(), max_threads=blake3.blake3.AUTO)
    for name, tensor in tensors.items():
        hasher.update(f"\0{name}\0{tensor.numel()}\0".encode())
        hasher.update(tensor.numpy().data)
    return str(hasher.hexdigest())


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)
