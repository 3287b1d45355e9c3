"""P4, P5 and one step's bounds: what never reaches the weights, how often the host reads."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import cut, differences, mlp, step_state, vectors
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine import nested
from hybrid_magic.engine.step import train_step


def loss_of(model: Any, batch: Any) -> Any:
    x, y = batch
    return F.cross_entropy(model(x), y)


def loader_with(
    n: int = 48, batch_size: int = 8, *, bad: int | None = None, value: float = float("inf")
) -> Any:
    x, y = vectors(n)
    if bad is not None:
        x[bad] = value
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("micro", [8, 3])
def test_a_step_whose_gradient_is_not_finite_leaves_no_mark(value: float, micro: int) -> None:
    one, other = mlp(), mlp()
    healthy = [batch for number, batch in enumerate(loader_with()) if number != 2]
    options: dict[str, Any] = {"precision": "fp32", "batch": "fixed"}
    hm.train(one, healthy, optimizer=torch.optim.AdamW(one.parameters()), micro=micro, **options)
    run = hm.train(
        other,
        loader_with(bad=20, value=value),
        optimizer=torch.optim.AdamW(other.parameters()),
        micro=micro,
        **options,
    )
    assert differences(one, other) == []
    assert [record.step for record in run.history if record.skipped] == [3]
    assert run.skipped_steps == 1
    assert run.samples_seen == 48


def test_a_loss_that_is_not_finite_is_skipped_even_with_finite_gradients() -> None:
    model = mlp()
    before = copy.deepcopy(model)

    def compute(model: Any, batch: Any) -> Any:
        return loss_of(model, batch) + torch.tensor(float("inf"))

    run = hm.train(model, loader_with(8), compute, precision="fp32", batch="fixed")
    assert run.skipped_steps == 1
    assert differences(model, before) == []


def test_loss_scaling_skips_what_overflows_and_goes_on() -> None:
    model = mlp()
    state = step_state(
        model, loss_of, torch.optim.SGD(model.parameters(), lr=0.1), precision="fp16"
    )
    scaler = state.precision.scaler
    assert scaler is not None
    before, scale = copy.deepcopy(model), scaler.get_scale()
    x, y = vectors(6)
    assert train_step(state, cut((x * float("inf"), y), [3, 3], nested.rows)).skipped
    assert differences(model, before) == []
    assert scaler.get_scale() == scale / 2
    assert not train_step(state, cut((x, y), [3, 3], nested.rows)).skipped
    assert differences(model, before) != []


def test_scaled_gradients_are_unscaled_before_they_are_clipped() -> None:
    x, y = vectors(12)
    after = []
    for precision in ("fp32", "fp16"):
        model = mlp()
        state = step_state(
            model,
            loss_of,
            torch.optim.SGD(model.parameters(), lr=1.0),
            precision=precision,
            clip=0.01,
        )
        before = torch.cat([p.detach().clone().reshape(-1) for p in model.parameters()])
        train_step(state, cut((x, y), [5, 7], nested.rows))
        moved = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before
        after.append(float(torch.linalg.vector_norm(moved)))
    assert after == pytest.approx([0.01, 0.01], rel=1e-3)


def test_the_learning_rate_is_scaled_for_the_step_and_put_back() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen: list[float] = []
    optimizer.register_step_pre_hook(
        lambda opt, args, kwargs: seen.append(opt.param_groups[0]["lr"])
    )
    state = step_state(model, loss_of, optimizer)
    result = train_step(state, cut(vectors(4), [4], nested.rows), 1.5)
    assert seen == [0.75]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert result.lr == 0.75


def test_the_learning_rate_is_put_back_when_the_optimizer_fails() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        train_step(step_state(model, loss_of, optimizer), cut(vectors(4), [4], nested.rows), 1.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls that give a tensor's value to the host, from now on."""
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        found = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *args, _found=found, _name=name: (
                reads.append(_name) or _found(self, *args)
            ),
        )
    return reads


@pytest.mark.parametrize("pieces", [1, 4])
def test_the_host_reads_device_values_once_a_step(
    monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    reads = count_reads(monkeypatch)
    x, y = vectors(32)
    model = mlp()

    def compute(model: Any, batch: Any) -> Any:
        return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 5).float()), {
            "seen": batch[0].mean()
        }

    state = step_state(model, compute, torch.optim.SGD(model.parameters(), lr=0.1))
    data = cut((x, y), [32 // pieces] * pieces, nested.rows)
    train_step(state, data)  # the first one learns how the loss is reduced
    reads.clear()
    train_step(state, data)
    assert reads == ["tolist"]


def test_a_fused_optimizer_skips_on_the_device_without_a_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = vectors(8)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = step_state(model, loss_of, optimizer)
    train_step(state, cut((x, y), [8], nested.rows))
    state.skip_on_device = True
    reads = count_reads(monkeypatch)
    before = copy.deepcopy(model)
    result = train_step(state, cut((x * float("nan"), y), [8], nested.rows))
    monkeypatch.undo()
    assert reads == []
    assert result.skipped is None
    assert differences(model, before) == []
    train_step(state, cut((x, y), [8], nested.rows))
    assert differences(model, before) != []


def test_logged_numbers_are_means_over_the_steps_samples() -> None:
    x, y = vectors(20)

    def compute(model: Any, batch: Any) -> Any:
        return loss_of(model, batch), {
            "acc": (model(batch[0]).argmax(1) == batch[1]).float().mean()
        }

    model = mlp()
    expected = (model(x).argmax(1) == y).float().mean()
    run = hm.train(
        model,
        [(x, y)],
        compute,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        batch="fixed",
        micro=7,
    )
    (record,) = run.history
    assert record.logged == {"acc": pytest.approx(float(expected), abs=1e-6)}
    assert record.loss == pytest.approx(F.cross_entropy(mlp()(x), y).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda model, batch: None, "the step gave a NoneType"),
        (
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
            "take its .mean()",
        ),
        (lambda model, batch: loss_of(model, batch).detach(), "a loss without a gradient"),
        (lambda model, batch: torch.ones(1, requires_grad=True).sum(), "depends on no parameter"),
    ],
)
def test_a_step_without_a_loss_is_told_of_and_changes_nothing(bad: Any, words: str) -> None:
    model = mlp().eval()
    before = copy.deepcopy(model)
    with pytest.raises(hm.HybridMagicError, match=re.escape(words)):
        hm.train(model, loader_with(), bad)
    assert differences(model, before) == []
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_the_persons_code_leaves_the_model_at_a_whole_step(where: str) -> None:
    model = mlp()
    model[1].eval()  # frozen by the person
    steps: list[Any] = []

    def compute(model: Any, batch: Any) -> Any:
        if len(steps) == 3:
            raise KeyError("mine")
        steps.append(copy.deepcopy(model.state_dict()))
        loss = loss_of(model, batch)
        if where == "backward" and len(steps) == 3:
            loss.register_hook(lambda grad: {}["mine"])
        return loss

    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(KeyError, match="mine"):
        hm.train(
            model,
            loader_with(),
            compute,
            optimizer=optimizer,
            batch="fixed",
            micro=8,
            precision="fp32",
        )
    run = hm.last_run
    assert run is not None
    assert run.outcome == "failed"
    assert run.error == "KeyError: 'mine'"
    assert run.steps == len(run.history) == (3 if where == "forward" else 2)
    assert all(p.grad is None for p in model.parameters())
    assert (model.training, model[1].training) == (True, False)
    if where == "backward":
        assert all(
            torch.equal(value, steps[-1][name]) for name, value in model.state_dict().items()
        )


def test_out_of_memory_is_told_in_one_line_that_says_what_helps() -> None:
    model = mlp()
    steps: list[int] = []

    def compute(model: Any, batch: Any) -> Any:
        steps.append(len(batch[0]))
        if len(steps) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return loss_of(model, batch)

    words = r"out of memory on cpu.* in step 3, at a micro-batch of 1 sample \(CUDA out of memory.*"
    with pytest.raises(hm.HybridMagicError, match=words + "wanted room for .*precision bf16"):
        hm.train(model, loader_with(), compute, precision="fp32", batch="fixed", micro=8)
    assert hm.last_run is not None
    assert (hm.last_run.outcome, hm.last_run.steps) == ("failed", 2)
    assert all(p.grad is None for p in model.parameters())


def test_an_error_between_two_micro_batches_leaves_no_gradient_behind() -> None:
    model = mlp()
    calls: list[int] = []

    def compute(model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the second micro-batch of the second step
            raise KeyError("mine")
        return loss_of(model, batch)

    with pytest.raises(KeyError, match="mine"):
        hm.train(model, loader_with(), compute, batch="fixed", micro=4, precision="fp32")
    assert hm.last_run is not None
    assert hm.last_run.steps == 1
    assert all(p.grad is None for p in model.parameters())
