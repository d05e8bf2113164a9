"""Write down what a process holds, for tests that put this folder on PYTHONPATH: glibc tells it only from within."""

import ctypes
import os
import threading
import time
from pathlib import Path

EVERY_S = 2.0


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _log(path: Path) -> None:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    with path.open("w", buffering=1) as log:
        while True:
            log.write(f"{time.monotonic()} {_resident_bytes()} {mallinfo2().fordblks}\n")
            time.sleep(EVERY_S)


if "HEAP_LOG" in os.environ:
    threading.Thread(target=_log, args=(Path(os.environ["HEAP_LOG"]) / str(os.getpid()),), daemon=True).start()
