"""Telemetry of a run: in its records and its table, gone with it, and nothing changed by it."""

from __future__ import annotations

import itertools
import threading
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_nvml import FakeGpu, FakeNvml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.config import TrainConfig
from hybrid_magic.engine import watch
from hybrid_magic.engine.control import RunControl
from hybrid_magic.engine.machine import identity
from hybrid_magic.engine.session import Session
from hybrid_magic.records import Record, StartRecord, StepRecord, TelemetryRecord
from hybrid_magic.report import tables
from hybrid_magic.telemetry import sampling
from hybrid_magic.telemetry.host import HostReading
from hybrid_magic.telemetry.nvml import Gpu
from hybrid_magic.telemetry.sampling import Telemetry

FIXED = {"precision": "fp32", "batch": "fixed", "micro": 4}
HOST = types.SimpleNamespace(read=lambda: HostReading(1, 2, 0.5))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.Linear(16, 3))


def loader(workers: int = 0) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(48, 6), torch.arange(48) % 3)
    return DataLoader(data, batch_size=8, shuffle=True, num_workers=workers)


class Stepped(Telemetry):
    """Telemetry without a thread: read once for every step, at one second a step and 200 W."""

    def __init__(self) -> None:
        self.nvml = FakeNvml(FakeGpu("GPU-a", failing={"energy"}))
        self.gpu = Gpu(self.nvml, self.nvml.gpus[0], instance=False)
        super().__init__(lambda: None, HOST, clock=itertools.count().__next__)

    def start(self) -> None:
        self._began = self._clock()

    def end(self) -> None:
        self.read(self.gpu)


@pytest.fixture
def stepped(monkeypatch) -> list[Stepped]:
    """The telemetries that runs open, each of them a Stepped one."""
    made: list[Stepped] = []

    def make(*_: Any) -> Stepped:
        made.append(Stepped())
        return made[-1]

    monkeypatch.setattr(sampling, "telemetry_of", make)
    return made


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Have the thread read from the run's first moment on, as often as it can."""
    monkeypatch.setattr(Telemetry.__init__, "__kwdefaults__",
                        Telemetry.__init__.__kwdefaults__ | {"first_s": 0.0})  # fmt: skip
    monkeypatch.setattr(sampling, "SOONEST_S", 0.0)
    monkeypatch.setattr(sampling, "LATEST_S", 0.0)


def by_train(sink: Any = None, control: Any = None, seen: Any = lambda: None) -> tuple[Any, Any]:
    """Train with hm.train; `seen()` is called in every step."""
    model = net()

    def step(model: nn.Module, batch: Any) -> Any:
        seen()
        return F.cross_entropy(model(batch[0]), batch[1])

    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"optimizer": optimizer, "epochs": 2, "sink": sink, "control": control} | FIXED
    return model, hm.train(model, loader(), step, **options)  # type: ignore[arg-type]


def by_loop(sink: Any = None, control: Any = None, seen: Any = lambda: None) -> tuple[Any, Any]:
    """The same training as a person's loop."""
    model = net()
    torch.manual_seed(7)
    optimizer, data = torch.optim.SGD(model.parameters(), 0.1), loader()

    def work(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        seen()
        return F.cross_entropy(model(values["x"]), values["y"]), {}

    session = Session(
        model, optimizer, TrainConfig(**FIXED), loader=data, epochs=2, sink=sink, control=control
    )
    try:
        for _ in range(2):
            session.begin_pass()
            for x, y in session.batches(data):
                optimizer.zero_grad()
                session.accumulate(work, {"x": x, "y": y})
                session.apply()
            session.end_pass()
    except BaseException as error:
        session.close(error)
        raise
    return model, session.close()


both = pytest.mark.parametrize("train", [by_train, by_loop])


@both
def test_readings_come_in_order_between_the_steps_and_stay_in_the_run(train, stepped):
    seen: list[Record] = []

    def read() -> None:
        stepped[-1].read(stepped[-1].gpu)

    _, run = train(sink=seen.append, seen=read)
    assert isinstance(seen[0], StartRecord)
    assert isinstance(seen[-1], TelemetryRecord)  # the last reading, when the books are closed
    kept = [record for record in seen if isinstance(record, TelemetryRecord)]
    assert list(run.telemetry) == kept
    assert [record.at_s for record in kept] == sorted(record.at_s for record in kept)
    newest = 0
    for record in seen:
        if isinstance(record, StepRecord):
            newest = record.step
        elif isinstance(record, TelemetryRecord):
            assert record.step == newest
    assert {record.step for record in kept} == set(range(1, 13))
    joules = 200 * kept[-1].at_s
    assert run.energy_j == pytest.approx(joules)
    assert run.energy_j_per_1000_samples == pytest.approx(joules / 96 * 1000)
    assert run.summary()["energy_j"] == run.energy_j
    assert "200 W on average" in run.table()


@both
def test_watching_leaves_the_weights_bit_equal(train, monkeypatch, at_once):
    watched, run = train()
    assert len(run.telemetry) > 1
    monkeypatch.setattr(watch, "watching", False)
    alone, unseen = train()
    assert len(unseen.telemetry) == 0
    assert unseen.energy_j is unseen.energy_j_per_1000_samples is None
    assert "energy" not in unseen.table()
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [record.loss for record in run.history] == [record.loss for record in unseen.history]


@both
@pytest.mark.parametrize("ended_by", ["its end", "stop", "an error", "an interrupt"])
def test_no_thread_outlives_its_run(train, ended_by, at_once):
    before, during, control = threading.active_count(), [], RunControl()

    def seen() -> None:
        during.append(sum(thread.name == "telemetry" for thread in threading.enumerate()))
        if len(during) < 3:
            return
        if ended_by == "stop":
            control.ask("stop")
        elif ended_by == "an error":
            raise ZeroDivisionError
        elif ended_by == "an interrupt":
            raise KeyboardInterrupt

    if ended_by.startswith("an"):
        with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
            train(control=control, seen=seen)
    else:
        train(control=control, seen=seen)
    assert 1 in during
    assert set(during) <= {0, 1}  # before the clock starts there is none
    assert threading.active_count() == before


def test_a_run_whose_loader_forks_workers_meanwhile_ends(at_once):
    model = net()
    run = hm.train(model, loader(workers=2), epochs=2, **FIXED)
    assert run.outcome == "finished"
    assert run.telemetry[-1].host_rss_bytes is not None


def test_a_run_with_readings_is_saved_and_loaded(tmp_path, stepped):
    _, run = by_train(seen=lambda: stepped[-1].read(stepped[-1].gpu))
    run.save(tmp_path / "run.jsonl")
    back = hm.load_run(tmp_path / "run.jsonl")
    assert list(back.telemetry) == list(run.telemetry)
    assert back.summary() == run.summary()
    assert back.table() == run.table()
    assert ">energy</th>" in tables.html(back)


def test_without_a_new_reading_a_step_asks_for_none(monkeypatch, stepped):
    told: list[int] = []
    tell = watch.Watch.tell
    monkeypatch.setattr(watch.Watch, "tell", lambda self: (told.append(1), tell(self)))
    by_train()
    assert len(told) == 1  # at the end


def test_a_cuda_device_is_told_by_names_that_do_not_hang_on_its_number():
    whole = types.SimpleNamespace(uuid="aa-bb", pci_domain_id=0, pci_bus_id=0x65, pci_device_id=1)
    older = types.SimpleNamespace(uuid="aa-bb")
    for found, uuid, bus in ((whole, "aa-bb", "00000000:65:01.0"), (older, "aa-bb", None)):
        assert identity(found) == (uuid, bus)


@pytest.mark.gpu
def test_the_gpu_that_trains_is_the_one_that_is_read():
    """What torch takes is seen in the gauge of the device, which is nobody else's meanwhile."""
    named = identity(torch.cuda.get_device_properties("cuda"))
    gpu = sampling.telemetry_of(True, *named)._find_gpu()
    assert gpu is not None
    try:
        assert gpu.name == torch.cuda.get_device_name()
        before = gpu.read().used_bytes
        held = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        after = gpu.read().used_bytes
        assert before is not None
        assert after is not None
        assert after - before >= 0.9 * held.nbytes
    finally:
        gpu.close()
