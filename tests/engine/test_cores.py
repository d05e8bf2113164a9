"""Workers of one machine share its cores, and the kernel forgets those that died."""

import select
import subprocess
import sys
import time

import pytest

from headrace.engine.cores import MOST_SEATS, Cores
from headrace.errors import ConfigError

PEER = """
import sys
from pathlib import Path
from headrace.engine.cores import Cores
cores = Cores(4, Path(sys.argv[1]), comes_first=sys.argv[2] == "first", give_way=float("inf"))
for line in sys.stdin:
    match line.strip():
        case "enter":
            cores.__enter__()
        case "leave":
            cores.__exit__(None, None, None)
        case "rest":
            cores.rest(1.0)
        case "turn":
            print(int(cores._take_turn(cores._file, 0.0)), flush=True)
            continue
    print(cores.num_others(), flush=True)
"""


class Peer:
    """Another worker of the machine, a real process: locks are per process."""

    def __init__(self, path, precedence):
        command = [sys.executable, "-c", PEER, str(path), precedence]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def shared(tmp_path):
    return tmp_path / "cores"


@pytest.fixture
def cores(shared):
    made = Cores(4, shared)
    yield made
    made.close()


@pytest.fixture
def start(shared):
    peers = []

    def start_peer(precedence="last"):
        peers.append(Peer(shared, precedence))
        return peers[-1]

    yield start_peer
    for peer in peers:
        peer.kill()


def test_a_worker_alone_takes_all_threads(cores):
    with cores:
        assert cores.share() == 4


def test_two_that_compute_take_half_each_and_all_again_when_one_ends(cores, start):
    peer = start()
    assert peer.tell("enter") == 0
    with cores:
        assert cores.share() == 2
        assert peer.tell("enter") == 1
        peer.tell("leave")
        assert cores.share() == 4
    assert peer.tell("enter") == 0


def test_every_worker_that_computes_counts_once_and_none_gets_less_than_one_thread(cores, start):
    for _ in range(5):
        start().tell("enter")
    assert cores.num_others() == 5
    with cores:
        assert cores.share() == 1


def test_a_worker_killed_while_it_computes_gives_its_cores_back(cores, start):
    peer = start()
    peer.tell("enter")
    assert cores.num_others() == 1
    peer.kill()
    assert cores.num_others() == 0


def test_turns_are_taken_one_after_the_other_and_a_dead_worker_leaves_its_turn(cores, start):
    holder, other = start(), start()
    assert holder.tell("turn")
    begun_s = time.monotonic()
    with cores.turn(0.1):
        assert time.monotonic() - begun_s >= 0.1
    assert not other.tell("turn")
    holder.kill()
    with cores.turn(30.0):
        assert not other.tell("turn")
    assert other.tell("turn")


def test_a_turn_counts_as_no_computing(cores, start):
    with cores.turn(0.0):
        assert start().tell("enter") == 0


def test_without_a_file_nobody_shares():
    with Cores(3) as cores, cores.turn(30.0):
        assert (cores.share(), cores.num_others()) == (3, 0)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no/such"):
        Cores(1, tmp_path / "no/such")


def test_seats_are_bounded(shared, start, monkeypatch):
    monkeypatch.setattr("headrace.engine.cores.MOST_SEATS", 1)
    start().tell("leave")
    with pytest.raises(ConfigError, match="1 workers"):
        Cores(1, shared)
    assert MOST_SEATS == 256


def rests(cores, peer):
    """Return whether the cores are free for a moment while a peer rests after a step."""
    peer.process.stdin.write("rest\n")
    peer.process.stdin.flush()
    found = False
    while not found and not select.select([peer.process.stdout], [], [], 0)[0]:
        found = cores.num_others() == 0
    peer.process.stdout.readline()
    return found


def test_a_worker_rests_after_a_step_while_one_that_comes_first_computes(shared, start):
    with Cores(4, shared, comes_first=True) as prompts:
        peer = start()
        peer.tell("enter")
        assert prompts.share() == 2
        assert rests(prompts, peer)
        assert prompts.share() == 2
        prompts.close()


def test_nobody_rests_for_workers_that_do_not_come_first(cores, start):
    peer = start()
    peer.tell("enter")
    with cores:
        assert not rests(cores, peer)


def test_nobody_rests_when_nobody_computes(shared, start):
    prompts, peer = Cores(4, shared, comes_first=True), start()
    peer.tell("enter")
    assert not rests(prompts, peer)
    prompts.close()
