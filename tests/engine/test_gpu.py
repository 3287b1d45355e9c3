"""On a real GPU: the promises of the CPU tests, and what only a GPU shows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import Transformer, by_hand, cnn, differences, images, mlp, sentences, vectors
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine.device import probe_for
from hybrid_magic.engine.prefetch import SideStreamMover

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


def on_gpu(loader: Any) -> list[Any]:
    return [(x.to(GPU), y.to(GPU)) for x, y in loader]


@pytest.mark.parametrize(
    ("model", "data"),
    [(mlp(dropout=0.1), vectors(150)), (cnn(), images(150)), (Transformer(), sentences(150))],
    ids=["mlp", "cnn", "transformer"],
)
def test_fp32_with_the_loaders_batch_is_bit_equal_to_the_plain_loop(model: Any, data: Any) -> None:
    loader = DataLoader(TensorDataset(*data), batch_size=16)
    one, other = copy.deepcopy(model).to(GPU), copy.deepcopy(model).to(GPU)
    torch.manual_seed(11)
    by_hand(one, on_gpu(loader), torch.optim.SGD(one.parameters(), lr=0.05), epochs=3)
    torch.manual_seed(11)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    options: dict[str, Any] = {"precision": "fp32", "batch": "fixed", "micro": 16}
    hm.train(other, loader, optimizer=optimizer, epochs=3, **options)
    assert differences(one, other) == []


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_what_fp32_learns(precision: str) -> None:
    losses = []
    for name in ("fp32", precision):
        model = cnn(dropout=0.0)
        torch.manual_seed(1)
        run = hm.train(
            model,
            DataLoader(TensorDataset(*images(64)), batch_size=16, shuffle=True),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.02),
            epochs=6,
            precision=name,
            batch="fixed",
            device="cuda",
        )
        losses.append(run.final_loss)
        assert next(model.parameters()).device.type == "cpu"  # back where it was
        assert all(p.is_contiguous() for p in model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_fresh_optimizer_is_fused_and_skips_on_the_device() -> None:
    x, y = vectors(160)
    x[40] = float("nan")
    model = mlp()
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    run = hm.train(model, data, device="cuda", batch="fixed", micro=8, precision="fp32")
    assert [record.step for record in run.history] == list(range(1, 21))
    assert [record.step for record in run.history if record.skipped] == [6]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_readings_agree_with_a_known_allocation() -> None:
    probe = probe_for(GPU)
    probe.reset_peak()
    before = probe.peak()[0] or 0
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device=GPU)
    after, reserved = probe.peak()
    assert after is not None
    assert after - before == held.numel()
    assert reserved is not None
    assert reserved >= after
    start = probe.mark()
    torch.cuda._sleep(10_000_000)
    assert probe.seconds(start, probe.mark()) > 1e-3


def test_what_is_copied_beside_the_work_arrives_whole() -> None:
    mover = SideStreamMover(GPU)
    batches = [torch.randint(0, 255, (2**22,), dtype=torch.uint8).pin_memory() for _ in range(8)]
    coming = mover.send(batches[0])
    sums = []
    for number in range(8):
        moved = mover.receive(coming)
        if number + 1 < 8:
            coming = mover.send(batches[number + 1])
        noise = torch.randn(2048, 2048, device=GPU)
        for _ in range(20):  # keeps the stream busy, and the allocator under pressure
            noise = noise @ noise / 2048
        sums.append(moved.long().sum())
        del moved
    assert [int(value) for value in sums] == [int(batch.long().sum()) for batch in batches]


def test_the_micro_batch_stays_within_a_rehearsed_budget() -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(8)])
    x = torch.randn(4096, 1024)
    data = DataLoader(TensorDataset(x, x), batch_size=1024)
    budget = 192 * 2**20
    run = hm.train(
        model, data, lambda m, b: F.mse_loss(m(b[0]), b[1]), device="cuda", epochs=4, memory=budget
    )
    assert run.peak_allocated_bytes is not None
    assert run.peak_allocated_bytes <= budget
    assert run.samples_seen == 4 * 4096


def test_memory_is_given_back_after_a_run() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    model = mlp()
    hm.train(model, DataLoader(TensorDataset(*vectors(64)), batch_size=8), device="cuda")
    assert torch.cuda.memory_allocated(GPU) <= before + 2**20  # cuBLAS keeps its workspace
