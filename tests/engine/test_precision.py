"""Which precision `auto` takes where, and that mixed precision trains what fp32 trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import cnn, differences, images, mlp, step_state, vectors
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine import precision, rehearse
from hybrid_magic.engine.device import CpuProbe, DeviceProbe, is_out_of_memory, probe_for

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "name", "measured"),
    [
        ((9, 0), "bf16", None),  # H100, H200
        ((8, 0), "bf16", None),  # A100
        ((8, 9), "bf16", None),  # L4
        ((7, 5), "fp16", None),  # T4: is_bf16_supported() says True there, by emulation
        ((7, 0), "fp16", None),  # V100
        ((6, 0), None, "fp16"),  # P100: no tensor cores, so it is measured
    ],
)
def test_auto_asks_what_a_gpu_computes_natively(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    name: str | None,
    measured: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    found, why = precision.native(CUDA)
    assert found == name
    assert f"{capability[0]}.{capability[1]}" in why
    assert precision.worth_measuring(CUDA) == measured


@pytest.mark.parametrize("units", [True, False])
def test_auto_on_a_cpu_measures_only_where_there_are_bf16_units(
    monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    monkeypatch.setattr(precision, "_cpu_computes_bf16", lambda: units)
    assert precision.native(CPU)[0] is None
    assert precision.worth_measuring(CPU) == ("bf16" if units else None)
    run = hm.train(mlp(), [vectors(8)])
    (choice,) = [change for change in run.changes if change.what == "precision"]
    assert ("a micro-batch took fp32" in choice.reason) == units
    assert run.start is not None
    assert run.start.precision == choice.after


@pytest.mark.parametrize(("faster", "chosen"), [(2.0, "bf16"), (1.05, "fp32"), (0.5, "fp32")])
def test_a_measured_precision_must_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, faster: float, chosen: str
) -> None:
    model = cnn()
    state = step_state(
        model, lambda m, b: m(b[0]).square().mean(), torch.optim.SGD(model.parameters(), lr=1.0)
    )
    times = {"fp32": 1.0, "bf16": 1.0 / faster}
    monkeypatch.setattr(rehearse, "_pass_seconds", lambda state, batch: times[state.precision.name])
    assert rehearse.faster_precision(state, images(8), "bf16")[0] == chosen
    assert state.precision.name == "fp32"


def test_measuring_leaves_no_trace() -> None:
    model = cnn()
    before = cnn()
    state = step_state(
        model, lambda m, b: m(b[0]).square().mean(), torch.optim.SGD(model.parameters(), lr=1.0)
    )
    found = torch.get_rng_state()
    rehearse.faster_precision(state, images(8), "bf16")
    points, _ = rehearse.measure_sizes(state, images(8), (2, 4))
    assert [size for size, _, _ in points] == [2, 4]
    assert all(seconds > 0 for _, seconds, _ in points)
    assert differences(model, before) == []
    assert torch.equal(torch.get_rng_state(), found)
    assert all(p.grad is None for p in model.parameters())


def test_measuring_leaves_a_batch_alone_that_the_step_writes_into() -> None:
    def writes(model: Any, batch: Any) -> Any:
        return model(batch[0].mul_(0.5)).square().mean()

    model, batch = cnn(), images(8)
    before = batch[0].clone()
    state = step_state(model, writes, torch.optim.SGD(model.parameters(), lr=1.0))
    rehearse.faster_precision(state, batch, "bf16")
    assert torch.equal(batch[0], before)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_mixed_precision_learns_what_fp32_learns(name: str) -> None:
    losses: dict[str, Any] = {}
    for chosen in ("fp32", name):
        model = cnn(dropout=0.0)
        torch.manual_seed(1)
        run = hm.train(
            model,
            DataLoader(TensorDataset(*images(64)), batch_size=16, shuffle=True),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
            epochs=6,
            precision=chosen,
            batch="fixed",
            micro=16,
        )
        losses[chosen] = run.final_loss
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[name] == pytest.approx(losses["fp32"], rel=0.1)
    assert losses[name] != losses["fp32"]


def test_a_float64_model_is_computed_as_it_is() -> None:
    model = mlp().double()
    x, y = vectors(8)
    run = hm.train(model, [(x.double(), y)])
    assert run.start is not None
    assert run.start.precision == "fp32"
    assert next(model.parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (
            RuntimeError(
                "cuBLAS error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            True,
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_known_by_all_its_faces(error: Exception, answer: bool) -> None:
    assert is_out_of_memory(error) == answer


def test_a_probe_of_a_cpu_reads_the_peak_of_this_process() -> None:
    probe = probe_for(CPU)
    assert isinstance(probe, CpuProbe)
    probe.reset_peak()
    before, reserved = probe.peak()
    if before is None:
        pytest.skip("this system does not tell the peak resident set")
    held = torch.ones(64 * 2**20 // 4)
    after, _ = probe.peak()
    assert reserved is None
    assert after is not None
    assert after - before > 0.8 * held.numel() * 4
    assert probe.total_bytes is not None
    assert probe.budget_bytes(0.5) == probe.total_bytes // 2
    assert probe.budget_bytes(1000) == 1000


def test_a_device_that_tells_nothing_is_none_throughout() -> None:
    probe = DeviceProbe(torch.device("meta"))
    assert probe.peak() == (None, None)
    assert probe.budget_bytes(0.9) is None
    assert probe.seconds(2.5, 1.0) == 1.5
