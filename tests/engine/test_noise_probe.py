"""What is measured of a step's gradients for the noise scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import mlp, step_state, vectors
from torch import Tensor, nn

from hybrid_magic.engine.data import StepData
from hybrid_magic.engine.reading import read
from hybrid_magic.engine.step import train_step
from hybrid_magic.engine.step_state import StepState


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def cut(sizes: list[int], seed: int = 0) -> StepData:
    x, y = vectors(sum(sizes), seed=seed)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    return StepData(batches, sizes, True)


def flat(model: nn.Module, batch: Any) -> Tensor:
    """The gradient of the mean loss over `batch`, taken by itself."""
    grads = torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def noise(state: StepState, data: StepData) -> tuple[float, float, int, int] | None:
    return read(train_step(state, data), state.device).noise


@pytest.mark.parametrize("sizes", [[8, 8], [4, 8, 4], [3, 13]])
def test_a_cut_step_tells_how_far_its_first_gradient_lies_from_the_whole_one(
    sizes: list[int],
) -> None:
    model, data = mlp(), cut(sizes)
    whole = flat(model, vectors(16, seed=0))
    apart = flat(model, data.batches[0]) - whole
    found = noise(step_state(model, loss_of, torch.optim.SGD(model.parameters(), lr=0.1)), data)
    assert found is not None
    small, large, n_small, n_large = found
    assert (n_small, n_large) == (sizes[0], 16)
    # float32 sums in another order
    assert large == pytest.approx(whole.square().sum().item(), rel=1e-4)
    assert small - large == pytest.approx(apart.square().sum().item(), rel=1e-4)


def test_the_scale_of_the_loss_is_not_in_what_is_measured() -> None:
    found = []
    for precision in ("fp32", "fp16"):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found.append(noise(step_state(model, loss_of, optimizer, precision=precision), cut([8, 8])))
    assert found[1][:2] == pytest.approx(found[0][:2], rel=0.05)  # half precision


def test_one_micro_batch_is_compared_with_the_next_step_and_a_cut_step_ends_that() -> None:
    model = mlp()
    state = step_state(model, loss_of, torch.optim.SGD(model.parameters(), lr=0.0))
    assert noise(state, cut([8])) is None
    first, second = (flat(model, vectors(8, seed=seed)) for seed in (0, 1))
    found = noise(state, StepData(cut([8], 1).batches, [8], False))
    assert found is not None
    assert found[2:] == (8, 16)
    assert found[0] - found[1] == pytest.approx(
        (first - second).square().sum().item() / 4, rel=1e-4
    )
    assert noise(state, cut([8])) is None
    assert state.noise.waits
    assert noise(state, cut([4, 4])) is not None
    assert not state.noise.waits


def test_the_first_gradient_of_a_rare_word_does_not_drown_all_others_in_adams_scaling() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(8, 2))
    state = step_state(model, loss_of, torch.optim.AdamW(model.parameters()))

    def step(first_word: int) -> tuple[float, float, int, int] | None:
        words = torch.arange(16).remainder(10)[:, None]
        words[0] = first_word
        batches = [(part, part[:, 0] % 2) for part in words.split(8)]
        return noise(state, StepData(batches, [8, 8], True))

    for _ in range(20):
        usual = step(0)
    rare = step(40)
    assert usual is not None
    assert rare is not None
    assert rare[0] < 1e4 * usual[0]  # divided by eps alone it would be 1e10 times as much


def test_weights_that_no_loss_uses_do_not_keep_the_others_from_being_measured() -> None:
    model = nn.ModuleDict({"used": nn.Linear(12, 5), "unused": nn.Linear(2, 2)})

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model["used"](batch[0]), batch[1])

    state = step_state(model, loss, torch.optim.AdamW(model.parameters()))
    assert noise(state, cut([8, 8])) is None  # the optimizer has no scaling yet
    assert noise(state, cut([8, 8])) is not None
