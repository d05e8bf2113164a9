"""Workers of one machine share its cores, and the kernel forgets those that died."""

import select
import subprocess
import sys
import time

import pytest

from headrace.engine.cores import MOST_SEATS, Cores
from headrace.errors import ConfigError

LONGEST_IN_PEER_S = 60.0
PEER = """
import sys, time
from pathlib import Path
from headrace.engine import cores as module
module.LONGEST_REST_S = 60.0
cores = module.Cores(4, Path(sys.argv[1]), comes_first=sys.argv[2] == "first", give_way=0.02)
for line in sys.stdin:
    words = line.split()
    match words[0]:
        case "enter":
            cores.__enter__()
        case "leave":
            cores.__exit__(None, None, None)
        case "rest":
            begun_s = time.monotonic()
            cores.end_step(float(words[1]), 1)
            print(time.monotonic() - begun_s, flush=True)
            continue
        case "users":
            print(module._num_locked(cores._file, module._USERS, 256 * module.MOST_USERS), flush=True)
            continue
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

    def send(self, what):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def answer(self):
        return self.process.stdout.readline()

    def is_answering(self):
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def tell(self, what):
        self.send(what)
        return int(self.answer())

    def rest(self, step_s):
        self.send(f"rest {step_s}")
        return float(self.answer())

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


def test_a_worker_rests_after_a_step_for_each_user_who_waits_for_one_that_comes_first(shared, start):
    with Cores(4, shared, comes_first=True) as prompts:
        peer = start()
        peer.tell("enter")
        assert prompts.share() == 2
        for num_users, least_s in ((1, 0.02), (8, 0.16), (3, 0.06), (1000, 0.32)):
            prompts.end_step(0.0, num_users)
            assert peer.rest(1.0) >= least_s
        assert prompts.share() == 2
        prompts.close()


def test_users_of_an_earlier_crowd_are_forgotten(shared, start):
    prompts, peer = Cores(4, shared, comes_first=True), start()
    with prompts:
        prompts.end_step(0.0, 8)
        assert count_locked(peer) == 8
    assert count_locked(peer) == 0
    with prompts:
        assert count_locked(peer) == 1
    prompts.close()


def count_locked(peer):
    return peer.tell("users")


def test_a_rest_ends_when_nobody_waits_any_more_and_gives_the_cores_away_until_then(shared, start):
    with Cores(4, shared, comes_first=True) as prompts:
        peer = start()
        peer.tell("enter")
        peer.send("rest 1e9")
        while prompts.num_others():
            assert not peer.is_answering()
        prompts.__exit__(None, None, None)
        assert float(peer.answer()) < LONGEST_IN_PEER_S
        assert prompts.num_others() == 1
        prompts.close()


def test_nobody_rests_for_workers_that_do_not_come_first(cores, start):
    peer = start()
    peer.tell("enter")
    with cores:
        cores.end_step(1.0, 8)
        assert peer.rest(1e9) < LONGEST_IN_PEER_S


def test_nobody_rests_when_nobody_computes(shared, start):
    prompts, peer = Cores(4, shared, comes_first=True), start()
    peer.tell("enter")
    assert peer.rest(1e9) < LONGEST_IN_PEER_S
    prompts.close()
