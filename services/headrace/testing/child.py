"""Processes that end with the test that started them."""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_FOLLOW = (
    "import ctypes, os, sys\n"
    "parent, number, *command = sys.argv[1:]\n"
    f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, int(number))\n"
    "os.getppid() == int(parent) and os.execv(command[0], command)"
)


def following(command: list[str], end: signal.Signals) -> list[str]:
    """Return a command line that runs `command` and ends it with a signal when this process ends (Linux).

    A program in between asks the kernel for that. `preexec_fn` would do so in a fork of this process, in which gRPC's
    threads are missing: under load the child went wrong in gRPC's own handlers and never became the program.

    Args:
        command: Its first word is a path.
        end: What it gets when this process is gone.
    """
    return [sys.executable, "-ISc", _FOLLOW, str(os.getpid()), str(int(end)), *command]
