"""What goes to a worker and comes back with all that belongs to it, in this process."""

import gc
import resource
import threading
import types
import weakref

import pytest
import torch
from launched import cell, notebook

import hybrid_magic as hm
from hybrid_magic.launch import parcel, results, start, worker
from hybrid_magic.run import Run

# A worker ignores it, too: that the scheduler had wrapped `step` is not pickled.
pytestmark = pytest.mark.filterwarnings(r"ignore:Seems like `optimizer\.step\(\)` has been")


@pytest.fixture
def as_worker(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("hybrid_magic.run.last_run", None)


def things_of(names):
    given = dict.fromkeys(("optimizer", "val", "loss", "scheduler", "replay", "names"))
    held = {name: names[name] for name in ("model", "loader", "step")}
    held |= {name: names.get(name) for name in given}
    return {**held, "found": (), "options": {}}


def sent(names, folder):
    """Return the things of a notebook, and those that a worker has of them."""
    here = things_of(names)
    parcel.pack(str(folder), here)
    return here, parcel.unpack(str(folder))[0]


def trained(things):
    """Do one plain step with the things of a worker."""
    model, optimizer = things["model"], things["optimizer"]
    things["step"](model, next(iter(things["loader"]))).backward()
    optimizer.step()
    optimizer.zero_grad()


OWN = """
from dataclasses import dataclass

@dataclass
class Warm:
    steps: int = 10

class Warmup(torch.optim.lr_scheduler.LRScheduler):
    def __init__(self, optimizer, shape=lambda step: scale * min(1.0, (step + 1) / 10)):
        self.shape, self.warm, self.net = shape, Warm(), model
        super().__init__(optimizer)
    def get_lr(self):
        return [rate * self.shape(self.last_epoch) for rate in self.base_lrs]

scale = 1.0
"""


def test_a_scheduler_that_the_notebook_defines_comes_back(tmp_path, as_worker, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    names = notebook()
    cell(OWN + "scheduler = Warmup(optimizer)", names)
    scheduler, shape, step = names["scheduler"], names["scheduler"].shape, names["step"]
    here, there = sent(names, tmp_path)
    trained(there)
    there["scheduler"].step()
    there["scheduler"].warm.steps = 5
    results.write(str(tmp_path), there, Run(config={}, environment={}))
    results.put_back(str(tmp_path), here)
    assert here["scheduler"] is scheduler
    assert (scheduler.last_epoch, scheduler.warm.steps) == (1, 5)
    assert type(scheduler.warm) is names["Warm"]
    assert (scheduler.shape, scheduler.net, here["step"]) == (shape, names["model"], step)
    assert torch.equal(names["model"].inner.weight, there["model"].inner.weight)
    cell("scale = 0.0", names)  # the function still looks into the notebook
    assert scheduler.get_lr() == [0.0]


def test_what_came_back_holds_no_file(tmp_path, as_worker):
    here, there = sent(notebook(), tmp_path)
    there["model"](torch.randn(8, 4)).sum().backward()
    there["optimizer"].step()
    results.write(str(tmp_path), there, Run(config={}, environment={}))
    results.put_back(str(tmp_path), here)
    with open("/proc/self/maps") as file:
        assert results.NAME not in file.read()


HOOKED = """
class Halving(torch.optim.SGD):
    def __init__(self, params, lr, beta=0.5):
        super().__init__(params, lr=lr)
        self.beta = beta
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad.mul_(self.beta)
        return super().step(closure)

mask = torch.zeros(8, 4)
model.inner.weight.register_hook(lambda grad: grad * mask + 0 * model.inner.weight.detach())
model.inner.weight.kind = "masked"
optimizer = Halving(model.parameters(), 1e-2)
optimizer.register_step_post_hook(lambda own, *_: model.outer.weight.data.clamp_(-own.beta, 0.01))
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
"""


def test_hooks_and_an_optimizers_own_attributes_are_there(tmp_path, as_worker, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    names = cell(HOOKED, notebook())
    cell("optimizer.beta = 0.001", names)
    here, there = sent(names, tmp_path)
    model, weight = there["model"], there["model"].inner.weight
    assert (there["optimizer"].beta, weight.kind) == (0.001, "masked")
    assert there["step"].__globals__["model"] is model
    assert there["optimizer"].param_groups[0]["params"][0] is weight
    trained(there)
    there["scheduler"].step()
    assert torch.equal(weight, here["model"].inner.weight)  # masked
    assert not torch.equal(model.norm.bias, here["model"].norm.bias)
    assert -0.001 <= model.outer.weight.min() <= model.outer.weight.max() <= 0.01
    (hook,) = weight._backward_hooks.values()
    assert hook.__globals__["model"] is model


def test_a_hook_that_cannot_be_sent_is_named(tmp_path):
    names = notebook()
    lock = threading.Lock()
    names["model"].inner.weight.register_hook(lambda grad: lock and grad)
    with pytest.raises(hm.HybridMagicError) as told:
        parcel.pack(str(tmp_path), things_of(names))
    assert str(told.value).startswith("lock (used by model.inner.weight's hook) is a lock; wanted ")


def test_a_name_of_a_gpu_is_that_of_the_process_own(tmp_path, as_worker, monkeypatch):
    names = notebook("x = x.to(device)")
    cell("device, model.home, mine = 'cuda:0', 'cuda:0', torch.device('cuda:0')", names)
    names["step"].__globals__["kept"] = "cuda:0"  # which nothing reads
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    here, there = sent(names, tmp_path)
    assert there["step"].__globals__["device"] == there["model"].home == "cuda:1"
    assert here["step"].__globals__["device"] == here["model"].home == "cuda:0"


def test_the_default_device_is_there_what_it_is_here(tmp_path, as_worker, monkeypatch):
    names = notebook()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_default_device", lambda: torch.device("meta"))
        parcel.pack(str(tmp_path), things_of(names))
    try:
        parcel.unpack(str(tmp_path))
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
    parcel.pack(str(tmp_path), things_of(names))  # torch 2.4 has none to tell of now
    parcel.unpack(str(tmp_path))
    assert torch.empty(1).device.type == "cpu"


# -- room --


def with_free(monkeypatch, size_bytes):
    monkeypatch.setattr(
        parcel.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=size_bytes)
    )


def test_room_for_what_comes_back_is_looked_for_first(tmp_path, monkeypatch):
    names = notebook()
    cell("model.big = nn.Linear(2**10, 2**10, bias=False)", names)
    cell("optimizer = torch.optim.AdamW(model.parameters())", names)
    with_free(monkeypatch, 11 * 2**20)
    with pytest.raises(hm.HybridMagicError) as told:
        parcel.pack(str(tmp_path), things_of(names))
    assert str(told.value) == (
        f"{tmp_path} has 11 MiB free; wanted 12 MiB for the trained weights, on their way back; "
        "free some space, or name a larger folder in the environment variable TMPDIR"
    )
    names["model"].big.weight.requires_grad_(False)
    parcel.pack(str(tmp_path), things_of(names))
    names["model"].big.weight.requires_grad_(True)
    cell("optimizer = torch.optim.SGD(model.parameters(), lr=0.1)", names)
    parcel.pack(str(tmp_path), things_of(names))


def handing_over(folder, things, monkeypatch):
    """Return what the person is told where a worker cannot write its results, None where it can."""
    monkeypatch.setattr("hybrid_magic.run.last_run", Run(config={}, environment={}))
    work = worker._Work.__new__(worker._Work)
    work._link, work._things = types.SimpleNamespace(folder=str(folder)), things
    trouble = work.delivered()
    following = types.SimpleNamespace(endings={}, own_error=None, fault=None, trouble=trouble)
    return trouble and str(start._error(following, types.SimpleNamespace(), 2, None))


def test_what_keeps_a_worker_from_writing_is_told(tmp_path, as_worker, monkeypatch):
    lost = "the run ended whole, and its weights could not be brought back"
    names = notebook()
    cell(OWN + "scheduler = Warmup(optimizer)", names)
    things = things_of(names)
    assert handing_over(tmp_path, things, monkeypatch) is None
    found = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, found[1]))
    try:
        told = handing_over(tmp_path, things, monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, found)
    assert told.startswith(f"{lost} (OSError: ")
    assert told.endswith(
        "; wanted room for them in the folder for temporary files; free some, or train with "
        "--checkpoint"
    )
    things["scheduler"].held = threading.Lock()
    told = handing_over(tmp_path, things, monkeypatch)
    assert told.startswith(f"{lost}: scheduler.state_dict()['held'] is a lock; wanted something ")
    assert "room" not in told


# -- memory --


def test_unused_memory_of_every_gpu_is_given_back_before_a_process_starts(temporary, monkeypatch):
    done, here = [], []

    class On:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            here.append(self.number)

        def __exit__(self, *_):
            here.pop()

    class Held:
        pass

    held = Held()
    held.itself = held
    gone = weakref.ref(held)
    del held

    def started(*_):
        raise RuntimeError("started")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: number)
    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append((*here, gone())))
    monkeypatch.setattr(start.parcel, "pack", lambda *_: None)
    monkeypatch.setattr(start, "_checked", lambda _: 2)
    monkeypatch.setattr(start, "Hub", started)
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="started"):
            start.train_in_processes({}, None, None)
    finally:
        gc.enable()
    assert done == [(1, None), (2, None)]
