"""P7: with one micro-batch of the loader's batch, the weights are bit-equal to the plain loop's."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from plain import Transformer, by_hand, cnn, differences, images, mlp, sentences, vectors
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import hybrid_magic as hm

PLAIN = {"precision": "fp32", "batch": "fixed"}


class Noisy(Dataset[Any]):
    """Augments with torch's global generator, as torchvision's transforms do."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index] + 0.1 * torch.randn(self.x[index].shape), self.y[index]


def compare(model: Any, loader: Any, make_optimizer: Any, *, epochs: int, **options: Any) -> None:
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(11)
    by_hand(one, loader, make_optimizer(one.parameters()), epochs=epochs)
    torch.manual_seed(11)
    hm.train(
        other,
        loader,
        optimizer=make_optimizer(other.parameters()),
        epochs=epochs,
        **PLAIN,
        **options,
    )
    assert differences(one, other) == []


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=2e-3)


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize(
    ("model", "data"),
    [(mlp(dropout=0.1), vectors(150)), (cnn(), images(150)), (Transformer(), sentences(150))],
    ids=["mlp", "cnn", "transformer"],
)
def test_ten_epochs_end_bit_equal_to_the_hand_written_loop(
    model: Any, data: Any, make_optimizer: Any
) -> None:
    loader = DataLoader(TensorDataset(*data), batch_size=16, shuffle=True)
    compare(model, loader, make_optimizer, epochs=10, micro=16)


@pytest.mark.parametrize(
    "loader",
    [
        pytest.param(lambda data: DataLoader(data, batch_size=16, shuffle=True), id="shuffled"),
        pytest.param(lambda data: DataLoader(data, batch_size=16, drop_last=True), id="drop_last"),
        pytest.param(
            lambda data: DataLoader(data, batch_size=16, shuffle=True, num_workers=2), id="workers"
        ),
        pytest.param(
            lambda data: DataLoader(data, 16, shuffle=True, num_workers=2, persistent_workers=True),
            id="persistent workers",
        ),
        pytest.param(
            lambda data: DataLoader(
                data, 16, shuffle=True, generator=torch.Generator().manual_seed(5)
            ),
            id="own generator",
        ),
        pytest.param(
            lambda data: DataLoader(Subset(data, range(0, 100, 3)), 16, shuffle=True), id="subset"
        ),
        pytest.param(
            lambda data: DataLoader(
                data, batch_sampler=[list(range(start, start + 16)) for start in range(0, 96, 16)]
            ),
            id="batch sampler",
        ),
        pytest.param(lambda data: list(DataLoader(data, batch_size=16)), id="list of batches"),
    ],
)
@pytest.mark.parametrize("dataset", [TensorDataset, Noisy], ids=["tensors", "augmented"])
def test_every_kind_of_loader_gives_the_plain_loops_weights(loader: Any, dataset: Any) -> None:
    made = [
        loader(dataset(*vectors(100))) for _ in range(2)
    ]  # an own generator moves on as it is read
    model = mlp(dropout=0.1)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    if isinstance(made[0], list):
        made = [made[0], made[0]]
    torch.manual_seed(2)
    by_hand(one, made[0], sgd(one.parameters()), epochs=2)
    torch.manual_seed(2)
    hm.train(other, made[1], optimizer=sgd(other.parameters()), epochs=2, **PLAIN, micro=16)
    assert differences(one, other) == []


def test_workers_can_be_asked_for_without_changing_the_weights() -> None:
    loader = DataLoader(TensorDataset(*vectors(64)), batch_size=16, shuffle=True)
    compare(mlp(), loader, sgd, epochs=2, micro=16, workers=1)
    assert loader.num_workers == 0


def test_ragged_batches_as_they_come_have_the_plain_learning_rate() -> None:
    x, y = vectors(60)
    ends = [0, 5, 25, 40, 43, 60]
    batches = [(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)]
    one, other = mlp(), mlp()
    by_hand(one, batches, sgd(one.parameters()), epochs=2)
    hm.train(other, batches, optimizer=sgd(other.parameters()), epochs=2, **PLAIN)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)  # the first step is cut, to measure


def test_parameters_unfrozen_during_the_run_are_trained_and_cleared() -> None:
    def frozen() -> Any:
        model = mlp()
        model[0].requires_grad_(False)
        return model

    def unfreezing(model: Any, steps: list[int]) -> None:
        steps.append(1)
        model[0].requires_grad_(len(steps) > 3)

    loader = list(DataLoader(TensorDataset(*vectors(96)), batch_size=16))
    one, other = frozen(), frozen()
    optimizers = [sgd(model.parameters()) for model in (one, other)]
    steps: list[int] = []
    for x, y in loader:
        unfreezing(one, steps)
        optimizers[0].zero_grad()
        torch.nn.functional.cross_entropy(one(x), y).backward()
        optimizers[0].step()
    steps = []

    def step(model: Any, batch: Any) -> Any:
        unfreezing(model, steps)
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    hm.train(other, loader, step, optimizer=optimizers[1], micro=16, **PLAIN)
    assert differences(one, other) == []


def test_clipping_is_torchs_own() -> None:
    data = DataLoader(TensorDataset(*vectors(96)), batch_size=16, shuffle=True)
    one, other = mlp(), mlp()
    torch.manual_seed(2)
    by_hand(one, data, sgd(one.parameters()), epochs=2, clip=0.3)
    torch.manual_seed(2)
    hm.train(other, data, optimizer=sgd(other.parameters()), epochs=2, clip=0.3, micro=16, **PLAIN)
    assert differences(one, other) == []


@pytest.mark.parametrize("per", ["per_batch", "per_epoch"])
def test_a_scheduler_moves_as_in_the_plain_loop(per: str) -> None:
    data = DataLoader(TensorDataset(*vectors(90)), batch_size=16, shuffle=True)
    steps = 4 * len(data) if per == "per_batch" else 4
    one, other = mlp(), mlp()
    optimizers = sgd(one.parameters()), sgd(other.parameters())
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(each, T_max=steps) for each in optimizers
    ]
    torch.manual_seed(2)
    by_hand(one, data, optimizers[0], epochs=4, **{per: schedulers[0]})
    torch.manual_seed(2)
    run = hm.train(
        other, data, optimizer=optimizers[1], scheduler=schedulers[1], epochs=4, micro=16, **PLAIN
    )
    assert differences(one, other) == []
    assert schedulers[0].state_dict()["last_epoch"] == schedulers[1].state_dict()["last_epoch"]
    assert any("scheduler: one step per " + per[4:] in note for note in run.notes)


def test_validation_between_epochs_does_not_change_what_is_learned() -> None:
    data = DataLoader(TensorDataset(*vectors(64)), batch_size=16, shuffle=True)
    held_out = DataLoader(TensorDataset(*vectors(40, seed=9)), batch_size=16)
    model = mlp(dropout=0.2)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(2)
    optimizer = sgd(one.parameters())
    for _ in range(3):
        by_hand(one, data, optimizer)
        one.eval()
        with torch.no_grad():
            seen = [torch.nn.functional.cross_entropy(one(x), y) * len(y) for x, y in held_out]
    torch.manual_seed(2)
    run = hm.train(
        other, data, optimizer=sgd(other.parameters()), val=held_out, epochs=3, micro=16, **PLAIN
    )
    assert differences(one, other) == []
    assert [metrics["epoch"] for metrics in run.metrics] == [1, 2, 3]
    assert run.metrics[-1]["loss"] == pytest.approx(float(sum(seen)) / 40, rel=1e-6)
