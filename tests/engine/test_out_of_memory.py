"""P3: a step that runs out of memory anywhere ends as if it had begun with the smaller size."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faults import (
    Faults,
    Odd,
    Replacing,
    everything,
    generators,
    loss_of,
    scattered,
    seed,
    set_generators,
    settings,
    step_by_hand,
    unequal,
)
from plain import Transformer, cnn, cut, images, mlp, sentences, step_state, vectors
from simulated import SimulatedProbe
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine import nested, rehearse
from hybrid_magic.engine import precision as precisions
from hybrid_magic.engine.device import DeviceProbe, is_out_of_memory
from hybrid_magic.engine.prefetch import Mover
from hybrid_magic.engine.retry import whole_step
from hybrid_magic.engine.sizing import Sizing
from hybrid_magic.records import StepRecord

SGD = lambda p, **o: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4, **o)
ADAMW = lambda p, **o: torch.optim.AdamW(p, lr=2e-3, **o)

# name: model, data, optimizer, precision, clip
CASES: dict[str, tuple[Any, Any, Any, str, float | None]] = {
    "mlp sgd": (lambda: mlp(dropout=0.1), vectors, lambda p: SGD(p, foreach=False), "fp32", None),
    "mlp sgd foreach clip": (mlp, vectors, lambda p: SGD(p, foreach=True), "fp32", 0.5),
    "odd mlp adamw": (lambda: Odd(mlp()), vectors, lambda p: ADAMW(p, foreach=False), "fp32", None),
    "odd mlp adamw foreach": (
        lambda: Odd(mlp(dropout=0.1)), vectors, lambda p: ADAMW(p, foreach=True), "fp32", 0.5,
    ),
    "mlp own optimizer": (lambda: mlp(dropout=0.1), vectors, Replacing, "fp32", 0.5),
    "cnn sgd": (cnn, images, lambda p: SGD(p, foreach=True), "fp32", 0.5),
    "cnn adamw": (cnn, images, lambda p: ADAMW(p, foreach=False), "fp32", None),
    "cnn fused": (cnn, images, lambda p: ADAMW(p, fused=True), "fp32", None),
    "transformer adamw fp16": (
        Transformer, sentences, lambda p: ADAMW(p, foreach=True), "fp16", 0.5,
    ),
    "transformer adamw fp16 one by one": (
        Transformer, sentences, lambda p: ADAMW(p, foreach=False), "fp16", None,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _little_to_look_through() -> Iterator[None]:
    """Every fault collects what it left; what is there before is not looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


# -- every operation of a step --


@pytest.mark.parametrize(
    ("name", "every", "least"),
    [
        ("mlp sgd", 1, 100),
        ("mlp sgd foreach clip", 1, 80),
        ("odd mlp adamw", 1, 150),
        ("odd mlp adamw foreach", 1, 110),
        ("mlp own optimizer", 1, 80),
        ("cnn sgd", 1, 80),
        ("cnn adamw", 1, 110),
        ("cnn fused", 1, 80),
        ("transformer adamw fp16", 19, 50),
        ("transformer adamw fp16 one by one", 37, 40),
    ],
)
def test_a_fault_at_every_operation_of_a_step_leaves_no_trace(
    name: str, every: int, least: int
) -> None:
    assert sweep(name, every) >= least


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in CASES if "transformer" in name])
def test_a_fault_at_truly_every_operation_of_a_transformers_step_leaves_no_trace(name: str) -> None:
    assert sweep(name, 1) >= 1300


def sweep(name: str, every: int) -> int:
    """Fail at every `every`th operation of a step's first try, now and then in its second, too;
    after each step all is equal to a step by hand in the size that was left. Return the faults."""
    make, data, make_optimizer, precision, clip = CASES[name]
    model = make()
    optimizer = make_optimizer(model.parameters())
    state = step_state(model, loss_of, optimizer, precision=precision, clip=clip)
    state.batch_statistics = "cnn" in name
    other = copy.deepcopy(model)
    theirs = make_optimizer(other.parameters())
    scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
    batch = data(16)
    model.train()
    seed(7)
    faults = Faults(lambda step, attempt, sizes: failing[attempt] if attempt < 2 else None)
    failing: list[int | None] = [None, None]
    with faults.at_work():
        for number in itertools.count(-3, every):  # the first steps go through
            before = generators()
            again = number * 5 % faults.operations if number > 0 and number % 3 == 0 else None
            failing[:] = [number if number >= 0 else None, again]
            struck = len(faults.struck)
            micro = cut(batch, [8, 8], nested.rows)
            micro.probe = number % 3 == 0
            _, retries = whole_step(
                state, Sizing(settings(16, micro=8), lambda record: None), micro
            )
            assert retries == len(faults.struck) - struck
            after = generators()
            set_generators(before)
            step_by_hand(
                other, theirs, batch, [[8] * 2, [4] * 4, [2] * 8][retries], scaler=scaler, clip=clip
            )
            where = f"fault at operation {failing[0]}: {faults.struck[struck:]}"
            mine = everything(model, optimizer, state.precision.scaler)
            assert unequal(mine, everything(other, theirs, scaler)) == [], where
            assert unequal(after, generators()) == [], where
            if number >= 0 and not retries:
                return len(faults.struck)
    raise AssertionError


# -- whole runs, faults at random steps --


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("name", CASES)
def test_a_run_with_faults_is_the_run_that_had_the_smaller_sizes(name: str, number: int) -> None:
    random_faults(name, number)


@pytest.mark.thorough
@pytest.mark.parametrize("number", range(2, 40))
@pytest.mark.parametrize("name", CASES)
def test_many_runs_with_faults_are_runs_that_had_the_smaller_sizes(name: str, number: int) -> None:
    random_faults(name, number)


def random_faults(name: str, number: int) -> None:
    make, data, make_optimizer, precision, clip = CASES[name]
    loader = DataLoader(TensorDataset(*data(64)), batch_size=24, shuffle=True)
    options = {"precision": precision, "clip": clip, "epochs": 2}

    def trained(**more: Any) -> tuple[Any, dict[str, Any]]:
        model = make()
        optimizer = make_optimizer(model.parameters())
        seed(number)
        with faults.at_work():
            run = hm.train(model, loader, optimizer=optimizer, **options, **more)
        return run, everything(model, optimizer, faults.state.precision.scaler) | generators()

    faults = Faults(scattered(number, 0.5, 330 if "transformer" in name else 40))
    run, got = trained(batch=40 if number % 2 else "fixed")
    assert faults.struck
    assert sum(record.retries for record in run.history) == len(faults.struck)
    assert_no_failed_size_ran_again(faults)
    faults = Faults(lambda step, attempt, sizes: None)
    again, replayed = trained(replay=run)
    assert list(again.sizes) == list(run.sizes)
    assert unequal(got, replayed) == []

    model = make().train()
    optimizer = make_optimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
    seed(number)
    sizes = iter(run.sizes)
    for _ in range(2):
        epoch = [torch.cat(column) for column in zip(*loader, strict=True)]
        while len(epoch[0]):
            cuts, factor = next(sizes)
            batch = [column[: sum(cuts)] for column in epoch]
            epoch = [column[sum(cuts) :] for column in epoch]
            step_by_hand(model, optimizer, batch, cuts, scaler=scaler, clip=clip, factor=factor)
    assert next(sizes, None) is None
    assert number % 2 == 0 or {factor for _, factor in run.sizes} != {1.0}
    assert unequal(got, everything(model, optimizer, scaler) | generators()) == []


def assert_no_failed_size_ran_again(faults: Faults) -> None:
    for step, sizes, size, _ in faults.struck:
        later = faults.ran[faults.ran.index((step, sizes)) + 1 :]
        # what is smallest is tried once more when it failed beside something larger
        assert max(itertools.chain(*(sizes for _, sizes in later))) < max(size, 3)


class Numbered(Dataset[Any]):
    """Samples that carry their number."""

    def __init__(self, n: int) -> None:
        self.x, self.y = vectors(n)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index], index


@pytest.mark.parametrize("batch", ["adaptive", "fixed", 40])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_used_once_in_order_through_retries(workers: int, batch: Any) -> None:
    pieces: list[list[int]] = []
    used: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        pieces.append(batch[2].tolist())
        return F.cross_entropy(model(batch[0]), batch[1])

    def sink(record: Any) -> None:
        if isinstance(record, StepRecord):
            last = list(itertools.chain(*pieces))[-record.global_batch_size :]
            used.extend(last)  # those of the attempt that went through
            pieces.clear()

    loader = DataLoader(Numbered(250), batch_size=32, num_workers=workers)
    with Faults(scattered(5, 0.4, 60)).at_work() as faults:
        hm.train(mlp(), loader, step, batch=batch, epochs=2, precision="fp32", sink=sink)
    assert len(faults.struck) >= 2
    assert used == [*range(250)] * 2
    assert_no_failed_size_ran_again(faults)


# -- what a person's own code can do there --


def struck_by(make: Callable[[], Any], *, times: int) -> Callable[[], None]:
    """Something to call that raises what `make` gives, `times` times every third call."""
    calls = itertools.count(1)
    left = iter(range(times))

    def strike(*_: Any) -> None:
        if next(calls) % 3 == 0 and next(left, None) is not None:
            raise make()

    return strike


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


class Failing(torch.autograd.Function):
    """The identity, whose backward pass may fail."""

    @staticmethod
    def forward(ctx: Any, x: Any, strike: Any) -> Any:
        ctx.strike = strike
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.strike()
        return grads[0], None


def on_forward(model: Any, optimizer: Any, strike: Any) -> None:
    model[3].register_forward_pre_hook(lambda *_: strike())


def on_forward_end(model: Any, optimizer: Any, strike: Any) -> None:
    model.register_forward_hook(lambda *_: strike())


def on_gradient(model: Any, optimizer: Any, strike: Any) -> None:
    model[0].weight.register_hook(lambda _: strike())


def on_accumulated_gradient(model: Any, optimizer: Any, strike: Any) -> None:
    model[3].bias.register_post_accumulate_grad_hook(lambda _: strike())


def on_module_backward(model: Any, optimizer: Any, strike: Any) -> None:
    model[3].register_full_backward_hook(lambda *_: strike())


def on_own_function(model: Any, optimizer: Any, strike: Any) -> None:
    model[3].register_forward_hook(lambda _, args, out: Failing.apply(out, strike))


def before_the_optimizer(model: Any, optimizer: Any, strike: Any) -> None:
    optimizer.register_step_pre_hook(lambda *_: strike())


def after_the_optimizer(model: Any, optimizer: Any, strike: Any) -> None:
    optimizer.register_step_post_hook(lambda *_: strike())


PLACES = [
    on_forward, on_forward_end, on_gradient, on_accumulated_gradient, on_module_backward,
    on_own_function, before_the_optimizer, after_the_optimizer,
]  # fmt: skip
MESSAGES = [
    "CUDA error: out of memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if the input is not contiguous",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1234 bytes",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_hook_that_runs_out_of_memory_leaves_no_trace(place: Any, precision: str) -> None:
    data = list(DataLoader(TensorDataset(*vectors(64)), batch_size=16))

    def made() -> Any:
        model = mlp(dropout=0.1)
        return model, ADAMW(model.parameters()), seed(3)

    model, optimizer, _ = made()
    kinds = itertools.cycle(MESSAGES)
    place(model, optimizer, struck_by(lambda: RuntimeError(next(kinds)), times=3))
    run = hm.train(
        model, data, optimizer=optimizer, precision=precision, batch="fixed", micro=16, epochs=2
    )
    assert sum(record.retries for record in run.history) == 3
    got = everything(model, optimizer) | generators()
    model, optimizer, _ = made()
    place(model, optimizer, lambda *_: None)
    scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
    for batch, (sizes, _) in zip(data * 2, run.sizes, strict=True):
        step_by_hand(model, optimizer, batch, sizes, scaler=scaler)
    assert unequal(got, everything(model, optimizer) | generators()) == []


def test_memory_that_runs_out_once_the_scale_was_updated_is_no_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, strike = torch.amp.GradScaler.update, struck_by(out_of_memory, times=2)
    monkeypatch.setattr(torch.amp.GradScaler, "update", lambda self: (real(self), strike()))
    model, batch = mlp(), vectors(16)
    optimizer = ADAMW(model.parameters())
    with Faults(lambda step, attempt, sizes: None).at_work() as faults:
        run = hm.train(model, [batch] * 6, optimizer=optimizer, precision="fp16", batch="fixed")
    assert sum(record.retries for record in run.history) == 2
    monkeypatch.undo()
    got = everything(model, optimizer, faults.state.precision.scaler)
    model, scaler = mlp().train(), torch.amp.GradScaler("cpu")
    optimizer = ADAMW(model.parameters())
    for sizes, _ in run.sizes:
        step_by_hand(model, optimizer, batch, sizes, scaler=scaler)
    assert unequal(got, everything(model, optimizer, scaler)) == []


FACES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
    (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 14.76 GiB total"), True),
    (RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"), True),
    (RuntimeError("XPU out of memory."), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"), True),
    (RuntimeError("CUDA driver error: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`"), True),
    (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"), True),
    (RuntimeError("GET was unable to find an engine to execute this computation"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
    (RuntimeError("unable to mmap 64 bytes from file </x>: Cannot allocate memory (12)"), True),
    (RuntimeError("std::bad_alloc"), True),
    (MemoryError(), True),
    (MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,)"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("CUDA error: device-side assert triggered"), False),
    (RuntimeError("CUDA error: unspecified launch failure"), False),
    (RuntimeError("CUDA error: misaligned address"), False),
    (RuntimeError("CUDA error: an illegal instruction was encountered"), False),
    (RuntimeError("CUDA error: uncorrectable ECC error encountered"), False),
    (torch.OutOfMemoryError("out of memory; CUDA error: an illegal memory access was"), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x5 and 6x7)"), False),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible "
                  "that dataloader's workers are out of shared memory."), False),
    (ValueError("out of memory"), False),
    (KeyError("out of memory"), False),
]  # fmt: skip


@pytest.mark.parametrize(("error", "answer"), FACES, ids=lambda value: str(value)[:40])
def test_running_out_of_memory_is_known_by_its_words_and_a_broken_device_too(
    error: Exception, answer: bool
) -> None:
    assert is_out_of_memory(error) == answer


@pytest.mark.parametrize("error", [error for error, answer in FACES if not answer], ids=str)
def test_what_is_not_out_of_memory_is_never_retried(error: Exception) -> None:
    calls: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return loss_of(model, batch)

    with pytest.raises(type(error)) as found:
        hm.train(mlp(), [vectors(8)] * 5, step, batch="fixed", micro=8, precision="fp32")
    assert found.value is error
    assert len(calls) == 3
    assert hm.last_run is not None
    assert (hm.last_run.outcome, hm.last_run.steps) == ("failed", 2)


def test_a_device_found_broken_while_its_memory_is_given_back_ends_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    calls: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise out_of_memory()
        return loss_of(model, batch)

    monkeypatch.setattr(DeviceProbe, "release", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        hm.train(mlp(), [vectors(8)] * 5, step, batch="fixed", micro=8, precision="fp32")
    assert len(calls) == 3


# -- where nothing smaller is left --


@pytest.mark.parametrize(
    ("make", "data", "smallest"),
    [(mlp, vectors, "1 sample "), (cnn, images, "2 samples "), (cnn, images, "3 samples ")],
)
def test_the_smallest_micro_batch_that_does_not_fit_is_told_in_one_line(
    make: Any, data: Any, smallest: str
) -> None:
    model, n = make(), 9 if smallest[0] == "3" else 8
    optimizer = ADAMW(model.parameters())
    ran: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        if len(ran) >= 2:
            ran.append(len(batch[0]))
            raise out_of_memory()
        ran.append(len(batch[0]))
        return loss_of(model, batch)

    with pytest.raises(hm.HybridMagicError) as found:
        hm.train(
            model,
            [data(n)] * 4,
            step,
            optimizer=optimizer,
            batch="fixed",
            micro=n,
            precision="fp32",
        )
    words = str(found.value)
    assert "\n" not in words
    assert f"in step 3, at a micro-batch of {smallest}" in words
    assert "%hybrid_free" in words
    assert "--precision bf16" in words
    assert ran == [n, n, *sorted(set(ran[2:]), reverse=True)]
    assert 1 not in ran or make is mlp
    got = everything(model, optimizer)
    model = make()
    optimizer = ADAMW(model.parameters())
    for _ in range(2):
        step_by_hand(model, optimizer, data(n), [n])
    assert unequal(got, everything(model, optimizer)) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2.0),
        lambda x: x.__setitem__(0, 7.0),
        lambda x: torch.nn.functional.relu(x, inplace=True),
    ],
)
@pytest.mark.parametrize("moved", [False, True])
def test_a_step_that_writes_into_its_batch_is_refused_rather_than_done_twice(
    write: Any, moved: bool, on: Any
) -> None:
    model = mlp()
    calls: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        write(batch[0])
        calls.append(1)
        if len(calls) == 3:
            raise out_of_memory()
        return loss_of(model, batch)

    if moved:  # a loader's batches may be on the device already, where no copy is made of them
        on(
            SimulatedProbe(model, fixed=2**20, per_sample=1, total=2**30),
            Mover(torch.device("cpu")),
        )
    loader = DataLoader(TensorDataset(*vectors(40)), batch_size=8)
    with pytest.raises(hm.HybridMagicError, match=r"writes into its batch.*x = x\.clone\(\)"):
        hm.train(model, loader, step, batch="fixed", micro=8, precision="fp32")
    assert hm.last_run is not None
    assert hm.last_run.steps == 2


def test_a_step_that_asks_for_the_gradient_of_its_input_is_started_over() -> None:
    calls: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        x, y = batch
        x.requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(model, (x, y)), x)
        calls.append(len(x))
        if len(calls) == 3:
            raise out_of_memory()
        assert x.is_leaf
        return loss_of(model, (x + 0.1 * slope.sign(), y))

    loader = DataLoader(TensorDataset(*vectors(40)), batch_size=8)
    run = hm.train(mlp(), loader, step, batch="fixed", micro=8, precision="fp32")
    assert run.outcome == "finished"
    assert 4 in calls


class Graph:
    """A batch that nobody can cut."""

    def __init__(self, n: int) -> None:
        self.x, self.y = vectors(n)


def test_a_batch_that_cannot_be_cut_is_told() -> None:
    model = mlp()
    calls: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise out_of_memory()
        return loss_of(model, (batch.x, batch.y))

    with pytest.raises(hm.HybridMagicError, match="cannot be cut between samples; make the load"):
        hm.train(model, [Graph(8)] * 5, step, batch="fixed", precision="fp32")
    assert len(calls) == 3
    calls.clear()  # a step of several such batches cannot be cut any smaller either
    with pytest.raises(hm.HybridMagicError, match="cannot be cut between samples"):
        hm.train(model, [Graph(8)] * 5, step, batch=4, precision="fp32")


def test_batches_of_different_lengths_are_cut_each_by_itself() -> None:
    def padded(length: int) -> Any:
        x, y = sentences(6, seed=length)
        return torch.cat([x] * length, 1), y

    batches = [padded(length) for length in (1, 2, 3, 1, 4, 2)]
    model = Transformer(dropout=0.0)
    optimizer = ADAMW(model.parameters())
    with Faults(lambda step, attempt, sizes: 90 if (step, attempt) == (1, 0) else None).at_work():
        run = hm.train(
            model,
            batches,
            optimizer=optimizer,
            batch=12,
            micro=6,
            precision="fp32",
            lr_scale="none",
        )
    assert [sizes for sizes, _ in run.sizes] == [(6, 6), (3, 3, 3, 3), (3, 3, 3, 3)]
    got = everything(model, optimizer)
    model = Transformer(dropout=0.0).train()
    optimizer = ADAMW(model.parameters())
    for (one, two), size in zip([batches[0:2], batches[2:4], batches[4:6]], (6, 3, 3), strict=True):
        for batch in (one, two):
            for at in range(0, 6, size):
                x, y = batch
                loss = loss_of(model, (x[at : at + size], y[at : at + size]))
                (loss * (size / 12)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert unequal(got, everything(model, optimizer)) == []


# -- outside a step --


def test_validation_that_runs_out_of_memory_is_cut_and_says_the_same() -> None:
    most = [100]
    seen: list[int] = []

    def step(model: Any, batch: Any) -> Any:
        if not model.training:
            seen.append(len(batch[0]))
            if len(batch[0]) > most[0]:
                raise out_of_memory()
        hits = (model(batch[0]).argmax(1) == batch[1]).float().mean()
        return loss_of(model, batch), {"acc": hits}

    def validated() -> Any:
        seed(1)
        val = DataLoader(TensorDataset(*vectors(50, seed=5)), batch_size=16)
        model = mlp(dropout=0.1)
        data = [vectors(8)] * 3
        options: dict[str, Any] = {"batch": "fixed", "micro": 8, "precision": "fp32"}
        run = hm.train(model, data, step, val=val, epochs=2, **options)
        return run.metrics, everything(model, torch.optim.SGD(model.parameters(), 1.0))

    metrics, trained = validated()
    most[0] = 5
    seen.clear()
    again, trained_again = validated()
    assert [*again[0]] == [*metrics[0]]
    for one, other in zip(metrics, again, strict=True):
        assert other == pytest.approx(one, rel=1e-5)  # sums in another order
    assert unequal(trained, trained_again) == []
    assert seen[:3] == [16, 8, 4]
    assert seen.count(16) == 2  # once an epoch: what did not fit is not tried again
    most[0] = 0
    with pytest.raises(hm.HybridMagicError, match="in validation .*single sample"):
        validated()
    assert hm.last_run is not None
    assert hm.last_run.steps == 3


def in_vain(model: Any, batch: Any, most: list[int]) -> Any:
    if len(batch[0]) > most[0]:
        raise out_of_memory()
    return loss_of(model, batch)


def test_finding_out_how_a_loss_is_reduced_leaves_no_trace() -> None:
    def own_loss(model: Any, batch: Any) -> torch.Tensor:
        return -(torch.log_softmax(model(batch[0]), 1)[range(len(batch[1])), batch[1]]).sum() / len(
            batch[1]
        )

    model, batch = Odd(mlp(dropout=0.1)), vectors(16)
    optimizer = ADAMW(model.parameters())
    seed(3)
    run = hm.train(
        model, [batch] * 3, own_loss, optimizer=optimizer, batch="fixed", precision="fp32"
    )
    got = everything(model, optimizer) | generators()
    model = Odd(mlp(dropout=0.1)).train()
    optimizer = ADAMW(model.parameters())
    seed(3)
    for sizes, _ in run.sizes:
        step_by_hand(model, optimizer, batch, sizes, loss=own_loss)
    assert unequal(got, everything(model, optimizer) | generators()) == []


def assert_run_is_as_by_hand(run: hm.Run, model: Any, optimizer: Any, batch: Any) -> None:
    """Everything, random numbers too, is as after the same steps by hand from the same seed."""
    got = everything(model, optimizer) | generators()
    model = Odd(cnn()).train()
    optimizer = ADAMW(model.parameters())
    seed(3)
    for sizes, _ in run.sizes:
        step_by_hand(model, optimizer, batch, sizes)
    assert unequal(got, everything(model, optimizer) | generators()) == []


def test_memory_that_runs_out_while_precisions_are_compared_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precisions, "worth_measuring", lambda device: "bf16")
    monkeypatch.setattr(precisions, "native", lambda device: (None, "as it happens"))
    monkeypatch.setattr(rehearse, "GAIN", 1e9)  # fp32 stays
    model = Odd(cnn())
    optimizer = ADAMW(model.parameters())
    batch = images(24)
    seed(3)
    run = hm.train(
        model, [batch] * 3, lambda m, b: in_vain(m, b, [7]), optimizer=optimizer, batch="fixed"
    )
    assert max(itertools.chain(*(sizes for sizes, _ in run.sizes))) <= 7
    assert_run_is_as_by_hand(run, model, optimizer, batch)


def test_memory_that_runs_out_in_the_rehearsal_of_batch_statistics_changes_nothing(on: Any) -> None:
    model = Odd(cnn())
    optimizer = ADAMW(model.parameters())
    on(SimulatedProbe(model, fixed=2**20, per_sample=2**20, total=2**40))
    batch, tried = images(64), list[int]()

    def step(model: Any, batch: Any) -> Any:
        tried.append(len(batch[0]))
        return in_vain(model, batch, [20])

    seed(3)
    run = hm.train(model, [batch] * 3, step, optimizer=optimizer, batch="fixed", precision="fp32")
    assert tried[:3] == [8, 16, 32]
    assert max(tried[3:]) <= 20
    assert [record.retries for record in run.history] == [0, 0, 0]
    assert_run_is_as_by_hand(run, model, optimizer, batch)


class Full(Mover):
    """A device that now and then has no room for what is sent to it."""

    def __init__(self, every: int, times: int) -> None:
        super().__init__(torch.device("cpu"))
        self.calls, self.every, self.left = 0, every, times

    def send(self, batch: Any) -> Any:
        self.calls += 1
        if self.calls % self.every == 0 and self.left:
            self.left -= 1
            raise out_of_memory()
        return nested.map_leaves(batch, torch.clone)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_batch_that_finds_no_room_on_its_way_to_the_device_is_sent_later_or_smaller(
    on: Any, every: int
) -> None:
    model = mlp(dropout=0.1)
    optimizer = ADAMW(model.parameters())
    mover = Full(every, 3)
    on(SimulatedProbe(model, fixed=2**20, per_sample=2**20, total=2**40), mover)
    loader = DataLoader(TensorDataset(*vectors(100)), batch_size=16, shuffle=True)
    seed(3)
    run = hm.train(model, loader, optimizer=optimizer, batch="fixed", micro=16, precision="fp32")
    assert mover.left == 0
    assert run.samples_seen == 100
    got = everything(model, optimizer) | generators()
    model = mlp(dropout=0.1).train()
    optimizer = ADAMW(model.parameters())
    seed(3)
    for batch, (sizes, _) in zip(loader, run.sizes, strict=True):
        step_by_hand(model, optimizer, batch, sizes)
    assert unequal(got, everything(model, optimizer) | generators()) == []
