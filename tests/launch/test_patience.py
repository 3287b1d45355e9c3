"""How long a worker is given, by a clock of our own; and one agent after the other."""

import os
import threading
import types

import pytest

from hybrid_magic.launch import agent as agents
from hybrid_magic.launch import follow
from hybrid_magic.launch.agent import Agent
from hybrid_magic.launch.ending import Ending
from hybrid_magic.launch.follow import Following
from hybrid_magic.records import StepRecord


class Watched:
    """A run of two workers that hear nothing; `killed` says when each was ended."""

    def __init__(self, monkeypatch, tmp_path, longest_step_s):
        self.now, self.killed, self.heard = 100.0, {}, []
        self.interrupts = types.SimpleNamespace(hits=0)
        hub = types.SimpleNamespace(pids={0: 10, 1: 11}, send=lambda *told: self.heard.append(told))
        clock = types.SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(follow, "time", clock)
        monkeypatch.setattr(follow, "_signal_group", self._end)
        self.following = Following(hub, None, str(tmp_path), 2, None, None, self.interrupts)
        self.following._take_messages = lambda: None
        self.following._look_for_a_hang = lambda _: None
        self.following._heed(0, ("record", record(longest_step_s)))

    def _end(self, pid, _):
        self.killed.setdefault(pid - 10, round(self.now - 100.0, 1))

    def turns(self, until_s):
        while self.now < 100.0 + until_s:
            self.following._turn()
            self.now = round(self.now + 0.1, 1)


def record(step_s):
    names = StepRecord.__dataclass_fields__
    return StepRecord(**{**dict.fromkeys(names), "step": 1, "step_s": step_s})


@pytest.fixture
def run(monkeypatch, tmp_path):
    return lambda longest_step_s=0.0: Watched(monkeypatch, tmp_path, longest_step_s)


def test_after_an_interrupt_the_others_end_and_then_the_first(run):
    watched = run()
    watched.interrupts.hits = 1
    watched.turns(10)
    assert watched.killed == {1: 3.0, 0: 4.5}
    assert watched.heard == [(0, "interrupt")] * 2


def test_an_interrupt_waits_for_two_of_the_longest_steps(run):
    watched = run(longest_step_s=10.0)
    watched.interrupts.hits = 1
    watched.turns(40)
    assert watched.killed == {1: 23.0, 0: 24.5}


def test_a_step_longer_than_any_before_is_given_as_long_again(run):
    watched = run(longest_step_s=0.01)
    watched.turns(30)
    watched.interrupts.hits = 1
    watched.turns(80)
    assert watched.killed == {1: 63.0, 0: 64.5}


def test_a_second_interrupt_ends_the_others_at_once(run):
    watched = run(longest_step_s=10.0)
    watched.interrupts.hits = 1
    watched.turns(10)
    watched.interrupts.hits = 2
    watched.turns(40)
    assert watched.killed == {1: 10.0, 0: 24.5}


def test_a_second_interrupt_leaves_the_first_a_moment_to_go_back(run):
    watched = run()
    watched.turns(30)
    watched.interrupts.hits = 1
    watched.turns(40)
    watched.interrupts.hits = 2
    watched.turns(60)
    assert watched.killed == {1: 40.0, 0: 41.5}


@pytest.mark.parametrize(("longest_step_s", "written", "after"), [
    (0.0, False, 5.0), (10.0, False, 25.0), (10.0, True, 5.0),
])  # fmt: skip
def test_after_a_fault_one_in_a_long_step_may_finish_it(run, longest_step_s, written, after):
    watched = run(longest_step_s)
    watched.following.written = written
    watched.following._heed(1, ("ended", Ending("error", True)))
    watched.turns(40)
    assert watched.killed == {0: after}


def test_a_second_run_waits_until_the_agent_of_the_first_is_over(tmp_path, monkeypatch):
    monkeypatch.delenv(agents._SIGNALS, raising=False)
    monkeypatch.setattr(agents, "_ONE_AT_A_TIME", threading.Lock())
    going, entered = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]
    order = []

    def launch(config, *_):
        number = len(order) // 2
        order.append(f"begins {number}")
        os.environ[agents._SIGNALS] = "SIGTERM"
        entered[number].set()
        assert going[number].wait(5)
        order.append(f"ends {number}")

    monkeypatch.setattr(agents, "launch_agent", launch)
    first, second = (Agent(str(tmp_path), 1) for _ in range(2))
    first.start()
    assert entered[0].wait(5), first.error
    second.start()
    assert not entered[1].wait(0.2)
    assert not second.over
    for each in going:
        each.set()
    first.join(5)
    second.join(5)
    assert first.over
    assert second.over
    assert first.error is second.error is None
    assert order == ["begins 0", "ends 0", "begins 1", "ends 1"]
    assert agents._SIGNALS not in os.environ

    agents._ONE_AT_A_TIME.acquire()  # one hangs
    monkeypatch.setattr(agents, "_LATE_S", 0.1)
    third = Agent(str(tmp_path), 1)
    monkeypatch.setattr(agents, "launch_agent", lambda *_: order.append("third"))
    third.start()
    third.join(5)
    assert order[-1] == "third"
