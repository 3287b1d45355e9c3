"""The parts of a launch, each by itself and in this process."""

import functools
import io
import multiprocessing
import os
import pickle
import resource
import signal
import sqlite3
import threading
import time
import traceback
from multiprocessing.connection import Client

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launched import cell, notebook

import hybrid_magic as hm
from hybrid_magic.launch import faults, parcel, results
from hybrid_magic.launch.ending import ending_of
from hybrid_magic.launch.faults import Fault
from hybrid_magic.launch.hanging import BUSY_S, Hang, Hangs
from hybrid_magic.launch.hub import Hub
from hybrid_magic.launch.unsendable import found_in
from hybrid_magic.run import Run
from hybrid_magic.telemetry.host import activity

# -- who hangs --


def first_hang(told, until_s=2000, longest_step_s=0.0):
    """Return the second in which a hang is told, and the hang; `told(now)` gives what is known."""
    hangs = Hangs()
    for now in range(until_s):
        waiting, doing = told(float(now))
        if (found := hangs.look(float(now), waiting, doing, longest_step_s)) is not None:
            return now, found
    return None


def test_a_rank_that_does_nothing_while_another_waits_hangs():
    def told(now):
        doing = {1: (min(now, 5.0), 10**6, 100)}
        return {0: 5.0 if now > 5 else None, 1: None}, doing

    assert first_hang(told) == (26, Hang(1, 21.0, busy=False))


@pytest.mark.parametrize("work", [(0.1, 0, 0), (0.0, 10**5, 0), (0.0, 0, 30)])
def test_one_that_computes_reads_or_receives_is_given_ten_minutes_or_twenty_steps(work):
    def told(now):
        return {0: 0.0, 1: None}, {1: tuple(each * now for each in work)}

    assert first_hang(told) == (int(BUSY_S) + 1, Hang(1, BUSY_S + 1, busy=True))
    assert first_hang(told, longest_step_s=50.0) == (1001, Hang(1, 1001.0, busy=True))


def test_one_that_cannot_be_looked_at_counts_as_busy():
    assert first_hang(lambda _: ({0: 0.0, 1: None}, {1: None})) == (601, Hang(1, 601.0, True))


def test_one_that_works_now_and_then_does_not_hang():
    def told(now):
        return {0: 0.0, 1: None}, {1: (now // 9, 0, 0)}  # a second of work in nine

    assert first_hang(told, until_s=599) is None


@given(st.lists(st.booleans(), min_size=1, max_size=4))
def test_nobody_hangs_while_all_wait_or_none_does(idle):
    doing = {rank: (0.0 if each else 1.0, 0, 0) for rank, each in enumerate(idle)}
    all_wait, none_waits = (dict.fromkeys(doing, since) for since in (0.0, None))
    assert first_hang(lambda _: (all_wait, doing), until_s=700) is None
    assert first_hang(lambda _: (none_waits, doing), until_s=700) is None


def test_what_a_process_does_is_seen():
    before = activity(os.getpid())
    sum(range(3_000_000))
    io.FileIO(__file__).read(1000)
    for _ in range(10):
        time.sleep(0.001)
    after = activity(os.getpid())
    assert after[0] > before[0]
    assert after[1] - before[1] >= 1000
    assert after[2] - before[2] >= 10
    assert activity(2**30) is None


# -- what cannot be sent --


class Box:
    def __init__(self, **held):
        self.__dict__.update(held)


def generated():
    yield 1


@pytest.fixture
def open_file(tmp_path):
    with open(tmp_path / "lines", "w+") as file:
        yield file


def uses(thing):
    return lambda: thing


@pytest.mark.parametrize(
    ("make", "path", "words"),
    [
        (lambda file: Box(dataset=Box(file=file)), "loader.dataset.file", "is an open file; "),
        (lambda file: Box(dataset=Box(file=file.buffer)), "loader.dataset.file", "an open file"),
        (lambda _: [1, {"a": generated()}], "loader[1]['a']", "a generator, which can be read "),
        (lambda _: Box(sampler=Box(lock=threading.Lock())), "loader.sampler.lock", "is a lock; "),
        (lambda _: uses(threading.Lock()), "thing (used by loader)", "is a lock; "),
        (lambda _: functools.partial(print, generated()), "loader[1]", "a generator"),
        (lambda file: torch.nn.Sequential(holding(file)), "loader.0.file", "is an open file"),
        (
            lambda _: Box(db=sqlite3.connect(":memory:")),
            "loader.db",
            "a Connection, which cannot be ",
        ),
    ],
)
def test_what_cannot_be_sent_is_named_by_its_path(open_file, tmp_path, make, path, words):
    things = {**things_of(notebook()), "names": {"loader": "loader"}, "loader": make(open_file)}
    with pytest.raises(hm.HybridMagicError) as told:
        parcel.pack(str(tmp_path), things)
    assert str(told.value).startswith(f"{path} is ")
    assert words in str(told.value)
    assert "; wanted something that can be sent to another process; " in str(told.value)
    assert str(told.value).endswith(", or train without --processes")


def holding(file):
    layer = torch.nn.Linear(1, 1)
    layer.file = file
    return layer


def test_what_can_be_sent_is_not_blamed():
    names = notebook()
    assert found_in([("model", names["model"]), ("step", names["step"])]) is None


# -- there and back --


def things_of(names, **more):
    given = dict.fromkeys(("optimizer", "val", "loss", "scheduler", "replay", "names"))
    held = {name: names[name] for name in ("model", "loader", "step", "optimizer")}
    return {**given, **held, "found": (), "options": {}, **more}


@pytest.fixture
def as_worker(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_what_is_one_thing_here_is_one_thing_there(tmp_path, as_worker):
    names = notebook()
    cell("loader = torch.utils.data.DataLoader(Data(), 8, num_workers=1, persistent_workers=True,\n"
         "                                     generator=torch.Generator())", names)  # fmt: skip
    next(iter(names["loader"]))
    scheduler = torch.optim.lr_scheduler.StepLR(names["optimizer"], 1)
    parcel.pack(str(tmp_path), things_of(names, scheduler=scheduler, val=names["loader"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(names, "model", None)  # the worker's step has a model of its own
        there, _ = parcel.unpack(str(tmp_path))
    model = there["model"]
    assert type(model) is names["Net"]  # its class came along, and is known here
    assert there["step"].__globals__["model"] is model
    assert there["step"].__globals__ is not names
    held = {id(param) for group in there["optimizer"].param_groups for param in group["params"]}
    assert held == {id(param) for param in model.parameters()}
    assert there["scheduler"].optimizer is there["optimizer"]
    assert there["val"] is there["loader"]
    assert there["loader"]._iterator is None
    assert names["loader"]._iterator is not None
    assert torch.equal(there["loader"].dataset.x, names["loader"].dataset.x)
    assert next(iter(there["loader"]))[0].shape == (8, 4)


def test_random_numbers_go_on_there_as_they_would_here(tmp_path, as_worker):
    names = notebook()
    torch.manual_seed(5)
    torch.rand(3)
    parcel.pack(str(tmp_path), things_of(names))
    here = torch.rand(2), next(iter(names["loader"]))[1]
    torch.manual_seed(99)
    there, random = parcel.unpack(str(tmp_path))
    parcel.draw_as_there(random, there["loader"])
    assert torch.equal(torch.rand(2), here[0])
    assert torch.equal(next(iter(there["loader"]))[1], here[1])
    assert torch.initial_seed() == 5


def test_switches_of_torch_are_there_as_they_are_here(tmp_path, as_worker):
    parcel.pack(str(tmp_path), things_of(notebook()))
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        parcel.unpack(str(tmp_path))
        assert torch.get_default_dtype() is torch.float32
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_a_full_disk_is_told_in_words(tmp_path):
    found = resource.getrlimit(resource.RLIMIT_FSIZE)
    things = things_of(notebook())
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, found[1]))
    try:
        with pytest.raises(hm.HybridMagicError) as told:
            parcel.pack(str(tmp_path), things)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, found)
    assert str(told.value).startswith(f"{tmp_path} has ")
    assert "free; wanted room for model and data" in str(told.value)
    assert "TMPDIR" in str(told.value)


def test_what_was_trained_is_put_into_the_same_objects(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_magic.run.last_run", None)
    there, here = (things_of(notebook(), scheduler=None) for _ in range(2))
    loss = there["model"](torch.randn(8, 4)).sum()
    loss.backward()
    there["optimizer"].step()
    here["model"].inner.weight.grad = torch.ones(8, 4)
    weights = list(here["model"].parameters())
    written = Run(config={}, environment={}, outcome="stopped", steps=1)
    results.write(str(tmp_path), there, written)
    run = results.put_back(str(tmp_path), here)
    assert run is hm.last_run
    assert (run.outcome, run.steps) == ("stopped", 1)
    for weight, now, trained in zip(
        weights, here["model"].parameters(), there["model"].parameters(), strict=True
    ):
        assert weight is now
        assert now.grad is None
        assert torch.equal(now, trained)
        held, wanted = here["optimizer"].state[now], there["optimizer"].state[trained]
        assert all(torch.equal(held[name], wanted[name]) for name in wanted)


def test_a_model_whose_optimizer_was_the_runs_own_comes_back_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_magic.run.last_run", None)
    there, here = (things_of(notebook(), optimizer=None) for _ in range(2))
    with torch.no_grad():
        there["model"].inner.weight.fill_(3.0)
    results.write(str(tmp_path), there, Run(config={}, environment={}))
    results.put_back(str(tmp_path), here)
    assert (here["model"].inner.weight == 3.0).all()


# -- errors that travel --


class Stubborn(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def failing(error):
    try:
        names = cell("def outer(error):\n    inner(error)\n\ndef inner(error): raise error", {})
        names["outer"](error)
    except BaseException as raised:  # noqa: BLE001 - an exit, too
        return raised


def there_and_back(error):
    return pickle.loads(pickle.dumps(ending_of(error, True)))


def test_an_error_comes_back_with_the_lines_of_its_traceback():
    ending = there_and_back(failing(KeyError("a")))
    assert (ending.kind, ending.words) == ("error", "KeyError: 'a'")
    back = ending.error()
    assert type(back) is KeyError
    assert back.args == ("a",)
    frames = traceback.extract_tb(back.__traceback__)
    assert [(frame.name, frame.line) for frame in frames[1:]] == [
        ("outer", "inner(error)"),
        ("inner", "def inner(error): raise error"),
    ]
    shown = "".join(traceback.format_exception(back)).splitlines()
    if hasattr(frames[-1], "colno"):  # 3.11: the very part of the line
        assert frames[-1].line[frames[-1].colno : frames[-1].end_colno] == "raise error"
    assert shown[-1] == "KeyError: 'a'"


@pytest.mark.parametrize(
    ("error", "kind", "back"),
    [
        (None, "whole", None),
        (KeyboardInterrupt(), "interrupted", None),
        (hm.HybridMagicError("found"), "mistake", hm.HybridMagicError),
        (hm.ConfigError("found"), "mistake", hm.ConfigError),
        (Stubborn(1, 2), "error", RuntimeError),  # its class cannot be called by what it says
        (ValueError(threading.Lock()), "error", RuntimeError),
        (SystemExit(3), "error", RuntimeError),
    ],
)
def test_every_end_has_its_kind(error, kind, back):
    ending = there_and_back(error if error is None else failing(error))
    assert ending.kind == kind
    if back is not None:
        made = ending.error()
        assert type(made) is back
        said = f"{type(error).__name__}: {error}" if back is RuntimeError else str(error)
        assert str(made) == said


def test_a_lost_peer_is_no_cause():
    from hybrid_magic.engine.ranks import PeerLost

    assert there_and_back(PeerLost("another one is gone")).kind == "lost"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "was gone"),
        (3, "ended by itself (exit code 3)"),
        (-signal.SIGSEGV, "was killed (SIGSEGV)"),
        (-99, "was killed (signal 99)"),
    ],
)
def test_how_a_process_ended_is_told_in_words(code, words):
    told = faults.error_of(Fault(1), 4, code, "", "nothing is lost")
    assert str(told).startswith(f"process 1 of 4 {words}; wanted ")
    assert str(told).endswith("; nothing is lost")


def test_memory_that_runs_out_while_data_is_loaded_is_told_as_that():
    told = faults.error_of(Fault(0, started=False), 2, -signal.SIGKILL, "", "nothing was changed")
    assert "as the system does when memory runs out; wanted memory for 2 copies" in str(told)


# -- the line --


def test_only_who_has_the_key_is_heard(tmp_path):
    hub = Hub(str(tmp_path), 1)
    where = hub.where()
    try:
        with pytest.raises((multiprocessing.AuthenticationError, OSError, EOFError)):
            Client(where["address"], authkey=b"guessed").recv()
        line = Client(where["address"], authkey=bytes.fromhex(where["key"]))
        line.send((0, 1234))
        line.send((None, [("ready",), ("record", 1)]))
        assert [hub.inbox.get(timeout=5) for _ in range(2)] == [(0, ("ready",)), (0, ("record", 1))]
        assert hub.pids == {0: 1234}
        hub.send(0, "go")
        assert line.recv() == ("go",)
        hub.send(5, "go")  # nobody: nothing happens
        line.close()
        assert hub.inbox.get(timeout=5) == (0, ("gone",))
    finally:
        hub.close()
    assert not os.path.exists(where["address"])


def test_a_hub_that_nobody_called_closes(tmp_path):
    before = set(threading.enumerate())
    Hub(str(tmp_path), 2).close()
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def test_a_hub_that_closes_while_somebody_calls_does_not_wait(tmp_path, monkeypatch):
    hub = Hub(str(tmp_path), 2)
    where = hub.where()
    accepted = threading.Event()
    monkeypatch.setattr(threading.Thread, "start", lambda self: accepted.set())
    hub._closed = True  # the thread that accepts is about to end
    line = Client(where["address"], authkey=bytes.fromhex(where["key"]))
    assert accepted.wait(5)
    monkeypatch.undo()
    hub.close()
    line.close()
