"""A process starts, leaves on a signal and says by its exit code how it went."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from headrace.runtime.lifecycle import Lifecycle

PREAMBLE = """
import asyncio, sys, time
from headrace.errors import ConfigError
from headrace.runtime.lifecycle import run_service
from headrace.runtime.logs import setup_logs
setup_logs(sys.stderr, role="test")
def say(word):
    sys.stdout.write(word + chr(10)); sys.stdout.flush()
"""


async def test_whoever_stops_it_first_says_how_long_work_may_go_on():
    lifecycle = Lifecycle()
    assert lifecycle.grace_s(10.0) == 10.0
    lifecycle.stop("drain", 0.0)
    lifecycle.stop("again", 5.0)
    assert (lifecycle.grace_s(10.0), lifecycle.reason) == (0.0, "drain")


async def test_a_stop_without_a_grace_leaves_it_to_the_service():
    lifecycle = Lifecycle()
    lifecycle.stop("SIGTERM")
    assert lifecycle.grace_s(10.0) == 10.0


@pytest.fixture
def start():
    """Start a process that runs the given code after the preamble; ended with the test."""
    started = []

    def start_process(body):
        code = PREAMBLE + textwrap.dedent(body)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
        started.append(process)
        return process

    yield start_process
    for process in started:
        process.kill()
        process.communicate()


WAITS = """
async def main(lifecycle):
    say("up")
    await lifecycle.stopped()
    say("left because of " + lifecycle.reason)
sys.exit(run_service(main))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_process_leave_in_order(start, number):
    process = start(WAITS)
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert out == f"left because of {number.name}\n"
    assert process.returncode == 0
    events = [json.loads(line) for line in err.splitlines()]
    assert [event["event"] for event in events] == ["stopping", "process ended"]
    assert {event["role"] for event in events} == {"test"}


def test_a_second_signal_ends_a_process_that_does_not_leave(start):
    process = start("""
    async def main(lifecycle):
        say("up")
        await lifecycle.stopped()
        say("stuck")
        await asyncio.Event().wait()
    sys.exit(run_service(main))
    """)
    process.stdout.readline()
    process.terminate()
    assert process.stdout.readline() == "stuck\n"
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_process_that_takes_too_long_to_leave_is_ended_and_shows_where_it_stood(start):
    process = start("""
    async def main(lifecycle):
        say("up")
        await lifecycle.stopped()
        time.sleep(100)
    sys.exit(run_service(main, shutdown_limit_s=0.2))
    """)
    process.stdout.readline()
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "in main" in err


@pytest.mark.parametrize("is_grouped", [False, True])
def test_a_bad_configuration_refuses_to_start_with_its_own_exit_code(start, is_grouped):
    fail = "raise ConfigError('grpc_port is taken')"
    body = f"async with asyncio.TaskGroup(): {fail}" if is_grouped else fail
    process = start(f"""
    async def main(lifecycle):
        {body}
    sys.exit(run_service(main))
    """)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err == "headrace refuses to start: grpc_port is taken\n"


def test_a_failure_is_logged_with_its_traceback(start):
    process = start("""
    async def main(lifecycle):
        async with asyncio.TaskGroup():
            1 / 0
    sys.exit(run_service(main))
    """)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "ZeroDivisionError" in json.loads(err)["traceback"]


def test_a_child_leaves_when_its_parent_is_killed(start):
    code = PREAMBLE + WAITS.replace("run_service(main)", "run_service(main, exit_with_parent=True)")
    assert "exit_with_parent" in code
    parent = start(f"""
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", {code!r}])
    child.wait()
    """)
    assert parent.stdout.readline() == "up\n"
    parent.kill()
    assert parent.stdout.read() == "left because of SIGTERM\n"


def test_the_event_loop_gets_the_interpreter_often(start):
    process = start("""
    async def main(lifecycle):
        say(str(sys.getswitchinterval()))
    sys.exit(run_service(main))
    """)
    out, _ = process.communicate(timeout=20)
    assert float(out) == pytest.approx(0.001)
    assert process.returncode == os.EX_OK
