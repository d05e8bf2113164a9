"""One heap for all threads of a process."""

import subprocess
import sys

_COUNT_HEAPS = """
import ctypes, os, re, sys, threading
from headrace.runtime.heap import share_one_heap

if sys.argv[1] == "shared":
    assert share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
threads = [threading.Thread(target=libc.malloc, args=(10_000,)) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
path = sys.argv[2]
file = ctypes.c_void_p(libc.fopen(path.encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
print(len(re.findall("<heap nr=", open(path).read())))
"""


def _num_heaps(how: str, path: str) -> int:
    command = [sys.executable, "-c", _COUNT_HEAPS, how, path]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_threads_share_one_heap(tmp_path):
    assert _num_heaps("shared", str(tmp_path / "shared")) == 1
    assert _num_heaps("apart", str(tmp_path / "apart")) > 1
