"""What goes wrong in a worker ends the run soon, with the right error and no process left, and what
was trained until then is kept."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import traceback

import launched
import pytest
from launched import notebook, trained_with

import hybrid_magic as hm
from hybrid_magic.launch import follow, hanging
from hybrid_magic.records import StepRecord

KEPT = "; the model holds the 3 steps before it, hm.last_run their records"


def kept_whole(names, steps=3):
    run = hm.last_run
    assert run.outcome == "failed"
    assert run.steps == float(names["optimizer"].state_dict()["state"][0]["step"]) == steps
    assert names["model"].norm.num_batches_tracked == steps
    return run


def test_an_error_of_the_step_is_raised_here_at_its_line(temporary):
    names = notebook("if last and rank == '1': raise Odd(7)")
    with pytest.raises(names["Odd"], match="odd 7") as told:
        trained_with(names, epochs=5)
    assert told.value.code == 7
    lines = [frame.line for frame in traceback.extract_tb(told.value.__traceback__)]
    assert lines[-1] == "if last and rank == '1': raise Odd(7)"
    assert not [line for line in lines if "Odd" in line][1:]
    assert str(told.value.__cause__) == "process 1 of 2"
    assert kept_whole(names).error == "Odd: odd 7"


@pytest.mark.thorough
def test_an_error_of_the_loader_is_raised_here_at_its_line(temporary):
    names = notebook()
    launched.cell(
        "class Data(Data):\n"
        "    def __getitem__(self, i):\n"
        "        if os.environ.get('RANK') == '0' and model.norm.num_batches_tracked == 3:\n"
        "            raise KeyError(i) from Odd(1)\n"
        "        return super().__getitem__(i)\n"
        "loader = torch.utils.data.DataLoader(Data(), batch_size=8)\n",
        names,
    )
    with pytest.raises(KeyError) as told:
        trained_with(names, epochs=5)
    last = traceback.extract_tb(told.value.__traceback__)[-1]
    assert (last.name, last.line) == ("__getitem__", "raise KeyError(i) from Odd(1)")
    assert "process 0 of 2\n\nOdd: odd 1" in str(told.value.__cause__).replace("__main__.", "")
    kept_whole(names)


@pytest.mark.thorough
def test_a_mistake_is_one_line(temporary):
    names = notebook()
    broken = "class Broken(Data):\n    def __getitem__(self, i): raise OSError('no disk')"
    launched.cell(broken, names)
    launched.cell("loader = torch.utils.data.DataLoader(Broken(), batch_size=8)", names)
    with pytest.raises(hm.HybridMagicError) as told:
        trained_with(names, names={"loader": "broken_loader"})
    assert str(told.value) == (
        "broken_loader failed on its first batch (OSError: no disk); wanted a loader that yields "
        "batches; look at it with next(iter(...))"
    )
    assert told.value.__cause__ is None
    assert hm.last_run is None


def test_a_process_that_is_killed_is_named_and_its_loader_ends_with_it(temporary):
    names = notebook("if last and rank == '0': os.kill(os.getpid(), signal.SIGKILL)")
    launched.cell(
        "loader = torch.utils.data.DataLoader(Data(), 8, num_workers=1, persistent_workers=True)",
        names,
    )
    next(iter(names["loader"]))  # its workers run here already
    with pytest.raises(hm.HybridMagicError) as told:
        trained_with(names, epochs=5)
    assert str(told.value) == (
        "process 0 of 2 was killed (SIGKILL), as the system does when memory runs out; wanted "
        "memory for 2 copies of model and loader; use fewer --processes or loader workers" + KEPT
    )
    kept_whole(names)


@pytest.mark.thorough
def test_a_process_that_crashes_is_named_with_its_line(temporary):
    names = notebook("if last and rank == '1': os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(hm.HybridMagicError) as told:
        trained_with(names, epochs=5)
    assert str(told.value).startswith("process 1 of 2 was killed (SIGSEGV), at line 5 of <cell ")
    assert ", in step (" in str(told.value) or ", in step; wanted " in str(told.value)
    kept_whole(names)


@pytest.mark.thorough
def test_a_process_that_ends_by_itself_is_named(temporary):
    names = notebook(
        "if last and rank == '1': os.write(2, b'no licence\\n'); os._exit(3)",
    )
    with pytest.raises(hm.HybridMagicError) as told:
        trained_with(names, epochs=5)
    assert str(told.value) == (
        "process 1 of 2 ended by itself (exit code 3) (no licence); wanted a step and a dataset "
        "that leave their process running; see what in them ends it" + KEPT
    )
    kept_whole(names)


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ("time.sleep(1000 * (last and rank == '1'))", ", at line 5 of <cell"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGSTOP) if last and rank == '1' else None",
            ": the others",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_process_that_hangs_is_named_with_its_line(temporary, monkeypatch, body, where):
    monkeypatch.setattr(hanging, "PATIENCE_S", 4.0)
    monkeypatch.setattr(hanging, "IDLE_S", 2.0)
    names = notebook(body)
    with pytest.raises(hm.HybridMagicError) as told:
        trained_with(names, epochs=5)
    assert str(told.value).startswith("process 1 of 2 hangs" + where)
    assert "wanted a step and a dataset that go on; see what waits there" + KEPT in str(told.value)
    kept_whole(names)


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["raise Odd(1)", "os.kill(os.getpid(), 9)", "os._exit(3)",
                                   "time.sleep(1000)"])  # fmt: skip
def test_every_fault_ends_within_half_a_minute(temporary, fault, rank):
    names = notebook(f"time.sleep(0.1)\n    if last and rank == '{rank}': {fault}")
    launched.cell("loader = torch.utils.data.DataLoader(Data(), 8, num_workers=1)", names)
    steps = []

    def sink(record):
        if isinstance(record, StepRecord):
            steps.append(time.monotonic())

    with pytest.raises((hm.HybridMagicError, names["Odd"]), match=f"process {rank} of 2|odd 1"):
        trained_with(names, epochs=5, sink=sink)
    assert time.monotonic() - steps[-1] < 30
    kept_whole(names)


@contextlib.contextmanager
def interrupted_when(happened, again_s=None):
    """Interrupt the main thread when `happened()`, and `again_s` later; yields the moments."""
    moments = []

    def interrupt():
        while not happened():
            time.sleep(0.02)
        for wait in [0.0] if again_s is None else [0.0, again_s]:
            time.sleep(wait)
            moments.append(time.monotonic())
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield moments
    finally:
        happened = bool  # ends it where training ended first
        thread.join(10)


@pytest.mark.parametrize(
    ("body", "again_s", "within_s"),
    [
        ("time.sleep(0.01)", None, 5.0),
        pytest.param("time.sleep(1000 * (last and rank == '1'))", None, 5.0,
                     marks=pytest.mark.thorough),
        pytest.param("time.sleep(1000 * (last and rank == '0'))", None, 5.0,
                     marks=pytest.mark.thorough),
        pytest.param("time.sleep(1000 * (last and rank == '1'))", 0.2, 5.0,
                     marks=pytest.mark.thorough),
    ],
    ids=["goes on", "hangs", "the first hangs", "hangs, and twice"],
)  # fmt: skip
def test_an_interrupt_ends_all_and_keeps_what_was_trained(temporary, body, again_s, within_s):
    names, steps = notebook(body), []

    def sink(record):
        steps.extend([record] if isinstance(record, StepRecord) else [])

    def in_the_fourth_step():
        return len(steps) == 3 and not time.sleep(0.3)

    happened = in_the_fourth_step if "1000" in body else lambda: len(steps) > 2
    found = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupted_when(happened, again_s) as moments:
        trained_with(names, epochs=5000, sink=sink)
    assert time.monotonic() - moments[0] < within_s
    assert signal.getsignal(signal.SIGINT) is found
    assert hm.last_run.outcome in ("interrupted", "failed")
    assert hm.last_run.steps == float(names["optimizer"].state_dict()["state"][0]["step"]) >= 3


@pytest.mark.thorough
def test_an_interrupt_in_a_long_call_waits_for_it_and_keeps_what_was_trained(temporary):
    block = "signal.pthread_sigmask(signal.SIG_{}BLOCK, [2])".format
    body = f"if last: {block('')}; time.sleep(5); {block('UN')}"  # deaf, as a call into torch is
    names, steps = notebook(body), []

    def sink(record):
        steps.extend([record] if isinstance(record, StepRecord) else [])

    def in_the_fifth_step():
        return len(steps) == 4 and not time.sleep(0.3)

    with pytest.raises(KeyboardInterrupt), interrupted_when(in_the_fifth_step):
        trained_with(names, epochs=5, sink=sink)
    assert (hm.last_run.outcome, hm.last_run.steps) == ("interrupted", 5)
    assert names["model"].norm.num_batches_tracked == 5


def test_an_interrupt_while_the_processes_start_ends_them(temporary, monkeypatch):
    names = notebook()
    started = follow.Agent.start
    moments = []

    def start(agent):
        started(agent)
        threading.Timer(0.5, interrupt).start()

    def interrupt():
        moments.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    monkeypatch.setattr(follow.Agent, "start", start)
    with pytest.raises(KeyboardInterrupt):
        trained_with(names)
    assert time.monotonic() - moments[0] < 5
    assert hm.last_run is None


@pytest.mark.thorough
def test_a_process_that_cannot_start_says_why(temporary, tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise ImportError('this machine is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(hm.HybridMagicError) as told:
        trained_with(notebook())
    assert str(told.value).startswith("process ")
    assert (
        " of 2 ended by itself (exit code 1) before it could train (ImportError: this machine is "
        "broken); wanted a Python like this one's in a new process ("
    ) in str(told.value)
    assert hm.last_run is None


def test_what_a_worker_cannot_load_is_raised_here(temporary, tmp_path, monkeypatch):
    (tmp_path / "of_this_notebook.py").write_text("class Sizes(list): pass")
    monkeypatch.syspath_prepend(tmp_path)
    names = launched.cell("import of_this_notebook", notebook())
    names["model"].sizes = names["of_this_notebook"].Sizes([1])
    (tmp_path / "of_this_notebook.py").write_text("")  # edited since
    with pytest.raises(AttributeError, match="Sizes"):
        trained_with(names)
    assert hm.last_run is None


def test_nothing_outlives_a_notebook_that_is_killed(temporary, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys, tempfile; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
        f"tempfile.tempdir = {str(temporary)!r}\n"
        "from launched import cell, notebook, trained_with\n"
        "names = notebook('time.sleep(0.01)')\n"
        "cell('loader = torch.utils.data.DataLoader(Data(), 8, num_workers=1)', names)\n"
        "trained_with(names, epochs=5000, sink=lambda record: print(record, flush=True))\n"
    )
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "step=3," in line:
            break
    assert len(launched.processes_of(temporary)) == 4  # two, and a loader's worker each
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert launched.gone(temporary, within_s=5)
