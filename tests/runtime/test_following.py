"""A process that a test starts must not outlive it, even if the test run is killed."""

import signal
import subprocess
import sys

from headrace.testing.child import following

SAY_AND_WAIT = "print('here', flush=True); import time; time.sleep(60)"
PARENT = f"""
import signal, subprocess, sys
from headrace.testing.child import following
subprocess.Popen(following([sys.executable, "-c", {SAY_AND_WAIT!r}], signal.SIGKILL)).wait()
"""


def test_a_process_ends_with_the_one_that_started_it():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"here\n"
        parent.kill()
        # The end of the file comes when nobody holds it any more: the child has ended too.
        assert parent.stdout.read() == b""


def test_a_process_gets_its_arguments_and_its_own_signals():
    command = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", "--c"]
    assert subprocess.run(following(command, signal.SIGTERM), check=True, capture_output=True).stdout == (
        b"['a b', '--c']\n"
    )
    waiting = subprocess.Popen(following([sys.executable, "-c", SAY_AND_WAIT], signal.SIGTERM), stdout=subprocess.PIPE)
    with waiting:
        assert waiting.stdout.readline() == b"here\n"
        waiting.terminate()
        assert waiting.wait(10) == -signal.SIGTERM
