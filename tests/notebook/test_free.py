"""No tensor of a run outlives it in the notebook; `%hybrid_free` does the same for other errors.

Tensors are watched by weak references, graphs by the boxes that they save their activations in, and
what is alive is asked right after the cell, before the next one runs, with the collector off: what
is gone by then is gone without its help.
"""

from __future__ import annotations

import pathlib

import pytest
from notebook_process import Notebook

SCENE = """
import gc, signal, types, weakref
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
import hybrid_magic as hm
from hybrid_magic.engine.control import RunControl

WATCHED, TROUBLE, CALLS = [], {}, {}

def watch(*things):
    WATCHED.extend(map(weakref.ref, things))

def alive():
    return sum(each() is not None for each in WATCHED)

def new_bytes():
    "Of tensors made since the last gc.freeze()."
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return sum({each.data_ptr(): each.untyped_storage().nbytes() for each in found}.values())

def tensors_in(value):
    found, seen, waiting = 0, set(), [value]
    while waiting:
        each = waiting.pop()
        if id(each) not in seen and not isinstance(each, (type, types.ModuleType)):
            seen.add(id(each))
            found += isinstance(each, torch.Tensor)
            if not isinstance(each, types.FunctionType):
                waiting += gc.get_referents(each)
    return found

def maybe(place):
    CALLS[place] = CALLS.get(place, 0) + 1
    if place in TROUBLE and CALLS[place] >= TROUBLE[place][0]:
        TROUBLE[place][1]()

def error():
    raise RuntimeError("as it happens")

def chained():
    x = torch.ones(5)
    watch(x)
    try:
        error()
    except RuntimeError as first:
        raise ValueError("another", x) from first

def a_wrong_attribute():
    x = torch.ones(5) * 2
    watch(x)
    x.sise

def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

def interrupt():
    signal.raise_signal(signal.SIGINT)

def interrupt_twice():
    interrupt()
    interrupt()

class Box:
    def __init__(self, tensor):
        self.tensor = tensor

def saved(tensor):
    box = Box(tensor.detach())
    watch(box)
    return box

class Spot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        x, = ctx.saved_tensors
        watch(gradient, x)
        maybe("backward")
        return gradient

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda box: box.tensor):
            h = Spot.apply(self.one(x).relu())
            watch(x, h)
            maybe("forward" if self.training else "validation")
            return self.two(h)

class Criterion(nn.Module):
    def forward(self, out, y):
        loss = F.cross_entropy(out, y)
        watch(loss, out, y)
        maybe("step")
        return loss

class Data(Dataset):
    def __init__(self, n):
        self.x = torch.randn(n, 8)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        item = self.x[i] * 1, self.y[i] * 1
        watch(*item)
        maybe("data")
        return item

torch.manual_seed(0)
model, criterion = Net(), Criterion()
train_loader = DataLoader(Data(320), batch_size=8)
test_loader = DataLoader(Data(8), batch_size=8)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

def step(model, batch):
    x, y = batch
    return criterion(model(x), y)
"""
CELLS = {
    "cell": "%%hybrid_train --val test_loader -o run\nx, y = batch\nloss = criterion(model(x), y)",
    "line": "%hybrid_train --val test_loader -o run",
    "python": "hm.train(model, train_loader, step, optimizer=optimizer, val=test_loader)",
}
BEGIN = "gc.collect(); gc.freeze(); gc.disable()"
MOMENTUM_BYTES = (8 * 16 + 16 + 16 * 2 + 2) * 4  # what the optimizer itself keeps


@pytest.fixture
def notebook(empty_notebook: Notebook):
    empty_notebook.run("import gc, torch, hybrid_magic as hm; hm.train; gc.collect(); gc.freeze()")
    assert empty_notebook.run(SCENE).error is None
    yield empty_notebook
    empty_notebook.run("import gc; gc.unfreeze(); gc.enable()")


# -- runs of our own: nothing is left alive, and nobody has to ask for it


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("what", ["error", "interrupt_twice"])
@pytest.mark.parametrize("place", ["step", "forward", "backward", "validation", "data"])
def test_no_tensor_of_the_step_is_alive_before_the_next_cell(notebook, place, what, cell):
    after = {"validation": 1, "data": 200}.get(place, 30)  # in the midst of training
    notebook.run(f"TROUBLE['{place}'] = ({after}, {what})\n{BEGIN}")
    ran = notebook.run(cell)
    assert ran.error == {"error": "RuntimeError"}.get(what, "KeyboardInterrupt")
    assert notebook.value("hm.last_run.steps") > 1, "it was to happen in the midst of a run"
    assert notebook.value("alive()") == 0
    assert notebook.value("new_bytes()") <= MOMENTUM_BYTES
    assert notebook.value("tensors_in(hm.last_run)") == 0


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
@pytest.mark.parametrize("what", ["chained", "a_wrong_attribute", "no_memory", "interrupt"])
def test_nor_when_errors_are_chained_or_hold_tensors_themselves(notebook, what, cell):
    notebook.run(f"TROUBLE['step'] = (30, {what})\n{BEGIN}")
    assert notebook.run(cell).error is not None
    assert notebook.value("alive()") == 0
    assert notebook.value("new_bytes()") <= MOMENTUM_BYTES


def test_nor_when_a_worker_of_the_loader_fails(notebook):
    notebook.run(
        "train_loader = DataLoader(Data(320), batch_size=8, num_workers=1)\n"
        f"TROUBLE['data'] = (200, error)\n{BEGIN}"
    )
    ran = notebook.run(CELLS["cell"])
    assert ran.error == "RuntimeError"
    assert "as it happens" in ran.out
    assert notebook.value("alive()") == 0
    assert notebook.value("new_bytes()") <= MOMENTUM_BYTES


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_a_finished_run_leaves_no_tensor_in_its_result_or_anywhere(notebook, cell):
    notebook.run(BEGIN)
    assert notebook.run(cell).error is None
    assert notebook.value("alive()") == 0
    assert notebook.value("new_bytes()") <= MOMENTUM_BYTES
    assert notebook.value("hm.last_run.outcome") == "finished"
    assert notebook.value("sum(map(tensors_in, [hm.last_run, *Out.values()]))") == 0


def test_nor_does_a_stopped_one(notebook):
    notebook.run(
        f"control = RunControl()\nTROUBLE['step'] = (30, lambda: control.ask('stop'))\n{BEGIN}"
    )
    ran = notebook.run("hm.train(model, train_loader, step, optimizer=optimizer, control=control)")
    assert ran.error is None
    assert notebook.value("hm.last_run.outcome") == "stopped"
    assert notebook.value("hm.last_run is Out[max(Out)]")
    assert notebook.value("alive()") == 0
    assert notebook.value("new_bytes()") <= MOMENTUM_BYTES
    assert notebook.value("tensors_in(hm.last_run)") == 0


def test_a_model_that_is_deleted_after_a_run_that_failed_is_gone(notebook):
    """The frames keep what lives elsewhere; `%hybrid_free` lets go of what does not any more."""
    notebook.run("TROUBLE['step'] = (30, error)")
    notebook.run(CELLS["cell"])
    notebook.run("watch(model)\ndel model, optimizer")
    assert notebook.value("WATCHED[-1]() is not None"), "it shows nothing"
    ran = notebook.run("%hybrid_free")
    assert notebook.value("WATCHED[-1]() is None")
    assert ran.out.startswith("gave back ")


# -- what the person sees of their error, and can look into


def test_the_traceback_shows_their_lines_and_nothing_of_ours_in_between(notebook):
    ran = notebook.run(
        "%%hybrid_train --precision fp32 --batch fixed --micro 8\nx, y = batch\n"
        "try:\n    loss = F.cross_entropy(model(x), y[:2])\n"
        "except ValueError as first:\n    raise RuntimeError('mine') from first"
    )
    assert ran.error == "RuntimeError"
    assert "loss = F.cross_entropy(model(x), y[:2])" in ran.out
    assert "hybrid_magic/" not in ran.out


def debug(notebook: Notebook, *answers: str) -> str:
    """Answer `%debug`, in a debugger made anew: the old one prints where it was made to."""
    notebook.run(
        f"answers = iter({[*answers, 'quit']!r})\nimport builtins; asked = builtins.input\n"
        "builtins.input = lambda *_: next(answers)\nget_ipython().InteractiveTB.pdb = None"
    )
    ran = notebook.run("%debug")
    notebook.run("builtins.input = asked")
    return ran.out


def test_debug_works_on_the_frames_of_the_person(notebook):
    notebook.run(
        "%%hybrid_train --precision fp32 --batch fixed --micro 8\nx, y = batch\nrate = 0.125\n"
        "out = model(x)\nloss = criterion(out, y)\nif CALLS['step'] > 3:\n    error()"
    )
    out = debug(notebook, "up", "p rate", "p out", "p x", "list", "down", "up", "p len(y)")
    assert "0.125" in out
    assert "<Tensor float32 [8, 2] on cpu, given back>" in out
    assert "<Tensor float32 [8, 8] on cpu, given back>" in out
    assert "loss = criterion(out, y)" in out
    assert notebook.value("alive()") == 0


# -- %hybrid_free


FAILING = """
def inner(x):
    y = x * 2
    watch(x, y)
    raise RuntimeError("as it happens")

def outer(n=2**20):
    x = torch.ones(n)
    inner(x)
"""
NOTHING = "nothing to give back: no error holds a tensor\n"


@pytest.fixture
def failing(notebook):
    notebook.run(FAILING)
    notebook.run("%reset -f out")  # and what else earlier tests left
    notebook.run("%hybrid_free")
    return notebook


@pytest.mark.parametrize(
    "between",
    [[], ["1 + 1"], ["%debug"], ["%tb"], ["%debug", "%hybrid_free", "%debug"]],
    ids=["at once", "later", "after a look", "after it was shown again", "after all of it"],
)
def test_what_an_error_held_is_given_back_and_said(failing, between):
    assert failing.run("outer()").error == "RuntimeError"
    assert failing.value("alive()") == 2, "it shows nothing"
    told = []
    for cell in between:
        if cell == "%debug":
            assert "hybrid" not in debug(failing, "p y", "up", "p x", "up", "down")
        else:
            told.append(failing.run(cell).out)
    ran = failing.run("%hybrid_free")
    assert (ran.error, ran.err) == (None, "")
    said = told[0] if "%hybrid_free" in between else ran.out
    assert said == "gave back 2 tensors of 8.0 MiB on the host; held by RuntimeError\n"
    assert failing.value("alive()") == 0
    assert failing.run("%hybrid_free").out == NOTHING


def test_the_error_stays_to_be_looked_at(failing):
    failing.run("outer()")
    failing.run("%hybrid_free")
    out = debug(failing, "p y", "up", "p n", "p x", "list")
    assert out.count("<Tensor float32 [1048576] on cpu, given back>") == 2
    assert "1048576" in out
    assert "inner(x)" in out
    assert "as it happens" in failing.run("%tb").out


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ("def stopped():\n    x = torch.ones(9)\n    watch(x)\n    interrupt()\nstopped()",
         "KeyboardInterrupt"),
        ("try:\n    outer()\nexcept RuntimeError as e:\n    raise ValueError from e", "ValueError"),
        ("try:\n    outer()\nexcept RuntimeError:\n    raise ValueError from None", "ValueError"),
        ("import asyncio\nawait asyncio.sleep(0)\nouter()", "RuntimeError"),
        ("[outer(n) for n in (3, 4)]", "RuntimeError"),
        ("assert torch.ones(8).sum() < 0, torch.ones(8)", "AssertionError"),
    ],
    ids=["stopped", "chained", "hidden", "awaiting", "comprehension", "said"],
)  # fmt: skip
def test_other_ends_of_a_cell(failing, cell, name):
    before = failing.run(cell)
    assert before.error == name
    ran = failing.run("%hybrid_free")
    assert ran.out.startswith("gave back ")
    assert ran.out.endswith(f"held by {name}\n")
    assert failing.value("alive()") == 0


def test_the_variables_of_the_notebook_are_left_alone(failing):
    failing.run(
        "mine = torch.ones(4)\ndef keep():\n    global kept\n    kept = mine * 2\n    outer()"
    )
    failing.run("z = mine + 1\nkeep()")
    failing.run("%hybrid_free")
    assert failing.value("[each.tolist() for each in (mine, z, kept)]") == [
        [1] * 4,
        [2] * 4,
    ] * 1 + [[2] * 4]
    assert failing.value("alive()") == 0


def test_garbage_is_collected_too(failing):
    failing.run("gc.disable(); ring = [torch.ones(2**18)]; ring.append(ring); del ring")
    ran = failing.run("%hybrid_free")
    assert ran.out == (
        "gave back 1 tensor of 1.0 MiB on the host; which nothing referred to any more\n"
    )


def test_outputs_that_hold_memory_are_named_and_how_to_drop_them(failing):
    failing.run("named = torch.ones(2**20)")
    failing.run("named")  # costs nothing more
    failing.run("{'a': [torch.ones(2**19)]}")
    failing.run("big = nn.Linear(1024, 512, bias=False)\nwatch(big.weight)\nbig")
    failing.run("w = torch.ones(3, requires_grad=True)\n(w * w).sum()")
    failing.run("del big")
    numbers = failing.value("sorted(Out)")
    assert failing.run("%hybrid_free").out == (
        f"{NOTHING}still held: Out[{numbers[1]}] holds 2.0 MiB on cpu; Out[{numbers[2]}] holds "
        f"2.0 MiB on cpu; Out[{numbers[3]}] holds 4 B on cpu, and the graph it was computed by; "
        "%reset -f out and then %hybrid_free drop all outputs\n"
    )
    failing.run("%reset -f out")
    failing.run("%hybrid_free")
    assert failing.value("alive()") == 0, "the way out that it names works"
    assert failing.run("%hybrid_free").out == NOTHING


def test_an_argument_is_one_line_and_nothing_is_given_back(failing):
    failing.run("outer()")
    ran = failing.run("%hybrid_free all")
    assert ran.error == "UsageError"
    assert ran.err == (
        "UsageError: %hybrid_free takes no arguments, but has all; write just %hybrid_free\n"
    )
    assert failing.value("alive()") == 2


def test_as_a_cell_it_does_the_same(failing):
    assert failing.run("%%hybrid_free").out == NOTHING


def test_its_help_says_what_it_does(failing):
    out = failing.run("%hybrid_free?").out
    assert "Give back the memory that the notebook's last error" in out


CUDA = """
from unittest import mock
from hybrid_magic.engine import device

ALLOCATED, RESERVED = [9 * 2**30, 0], [10 * 2**30, 0]

class Gpu:
    def __init__(self, device):
        self.index = device.index

    def release(self):
        if fails:
            raise RuntimeError("CUDA error: device-side assert triggered\\nCompile with")
        ALLOCATED[self.index], RESERVED[self.index] = 2**30, 2**31

for place, name, value in [
    (torch.cuda, "is_initialized", lambda: True), (torch.cuda, "device_count", lambda: 2),
    (torch.cuda, "memory_allocated", ALLOCATED.__getitem__),
    (torch.cuda, "memory_reserved", RESERVED.__getitem__), (device, "probe_for", Gpu),
]:
    mock.patch.object(place, name, value).start()
"""
MPS = """
from unittest import mock
from hybrid_magic.engine import device

BYTES = [2**30, 2**31]
gpu = mock.Mock()
gpu.release = lambda: BYTES.__setitem__(slice(None), [2**20, 2**21])
for place, name, value in [
    (torch.backends.mps, "is_available", lambda: True),
    (torch.mps, "current_allocated_memory", lambda: BYTES[0]),
    (torch.mps, "driver_allocated_memory", lambda: BYTES[1]), (device, "probe_for", lambda _: gpu),
]:
    mock.patch.object(place, name, value).start()
"""


@pytest.fixture
def patched(failing):
    yield failing
    failing.run("from unittest import mock; mock.patch.stopall()")


def test_what_a_gpu_got_back_is_said(patched):
    patched.run(f"{CUDA}fails = False\nouter()")
    assert patched.run("%hybrid_free").out == (
        "gave back cuda:0 allocated 9.0 GiB -> 1.0 GiB, reserved 10.0 GiB -> 2.0 GiB; 2 tensors of "
        "8.0 MiB on the host; held by RuntimeError\n"
    )
    assert patched.run("%hybrid_free").out == (
        "nothing to give back: no error holds a tensor; 1.0 GiB on cuda:0 is in use\n"
    )


def test_a_gpu_that_has_failed_is_said_too(patched):
    patched.run(f"{CUDA}fails = True\nouter()")
    ran = patched.run("%hybrid_free")
    assert (ran.error, ran.out.splitlines()[-1]) == (
        None,
        "cuda:0 no longer works (CUDA error: device-side assert triggered); restart the kernel",
    )
    assert patched.value("alive()") == 0


def test_what_an_apple_gpu_got_back_is_said(patched):
    patched.run(MPS)
    assert patched.run("%hybrid_free").out == (
        "gave back mps allocated 1.0 GiB -> 1.0 MiB, reserved 2.0 GiB -> 2.0 MiB; "
        "which nothing referred to any more\n"
    )


def test_without_torch_there_is_nothing_to_give_back(tmp_path: pathlib.Path):
    made = Notebook(tmp_path)
    try:
        made.run("def work():\n    x = [1]\n    raise RuntimeError\nwork()")
        ran = made.run("%hybrid_free")
        assert (ran.error, ran.out) == (None, "nothing to give back: no torch is loaded\n")
        assert made.value("'torch' in __import__('sys').modules") is False
    finally:
        made.close()
