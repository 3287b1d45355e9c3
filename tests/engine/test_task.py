"""What can be known to be wrong before training is told in one line, and nothing was changed."""

from __future__ import annotations

import copy
import random
import re
import types
from typing import Any

import pytest
import torch
from plain import cnn, differences, images, mlp, vectors
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hybrid_magic as hm
from hybrid_magic.engine.placement import choose_device


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        random.random()
        torch.rand(1)
        return {"a": 1}["label"]


def loader(n: int = 32) -> Any:
    return DataLoader(TensorDataset(*vectors(n)), batch_size=8)


def frozen() -> nn.Module:
    return mlp().requires_grad_(False)


CASES: list[Any] = [
    (lambda: ("model", loader()), {}, "the model is a str; wanted a torch.nn.Module"),
    (
        lambda: (frozen(), loader()),
        {},
        "only frozen parameters; wanted at least one with requires_grad",
    ),
    (lambda: (nn.ReLU(), loader()), {}, "the model has no parameters"),
    (lambda: (mlp().half(), loader()), {}, "6 parameters of torch.float16; wanted FP32 weights"),
    (lambda: (mlp().bfloat16(), loader()), {}, "parameters of torch.bfloat16"),
    (lambda: (nn.LazyLinear(3), loader()), {}, "lazy parameters without a shape"),
    (lambda: (mlp(), []), {}, "the loader is empty; wanted at least one batch"),
    (
        lambda: (mlp(), DataLoader(TensorDataset(*vectors(3)), batch_size=8, drop_last=True)),
        {},
        "is empty",
    ),
    (lambda: (mlp(), 5), {}, "the loader is a int; wanted a DataLoader"),
    (
        lambda: (mlp(), (b for b in loader())),
        {"epochs": 2},
        "can be read only once, and --epochs is 2",
    ),
    (
        lambda: (mlp(), DataLoader(Broken(), batch_size=4)),
        {},
        "failed on its first batch (KeyError: 'label')",
    ),
    (
        lambda: (mlp(), DataLoader(Broken(), batch_size=4, num_workers=1)),
        {},
        "failed on its first batch (KeyError",
    ),
    (lambda: (mlp(), [torch.zeros(4, 12)]), {}, "wanted (x, y) with a tensor y"),
    (lambda: (mlp(), loader()), {"epoch": 3}, "there is no option epoch; did you mean epochs?"),
    (lambda: (mlp(), loader()), {"device": "cuda:77"}, "--device cuda:77 cannot be used here"),
    (lambda: (mlp(), loader()), {"device": "banana"}, "--device banana cannot be used here"),
    (lambda: (mlp(), loader()), {"val": 3}, "the validation loader is a int"),
    (lambda: (mlp(), loader()), {"loss": 3}, "loss is a int; wanted a criterion"),
    (lambda: (mlp(), loader()), {"step": 3}, "step is 3; wanted a function"),
    (lambda: (mlp(), list(loader())), {"micro": 9}, "--micro 9 is above 8"),
]


@pytest.mark.parametrize(("make", "options", "words"), CASES, ids=[case[2][:40] for case in CASES])
def test_a_mistake_is_one_line_and_changes_nothing(make: Any, options: Any, words: str) -> None:
    model, data = make()
    before = copy.deepcopy(model)
    modes = [module.training for module in model.modules()] if isinstance(model, nn.Module) else []
    torch.manual_seed(3)
    random.seed(3)
    found, drawn = torch.get_rng_state(), random.getstate()
    last = hm.last_run
    with pytest.raises(hm.HybridMagicError, match=re.escape(words)) as error:
        hm.train(model, data, **options)
    assert "\n" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), found)
    assert random.getstate() == drawn
    assert hm.last_run is last
    if isinstance(model, nn.Module) and not isinstance(model, nn.LazyLinear):
        assert differences(model, before) == []
        assert [module.training for module in model.modules()] == modes


def test_an_optimizer_of_other_parameters_is_the_commonest_mistake() -> None:
    model, other = mlp(), mlp()
    with pytest.raises(
        hm.HybridMagicError, match="holds 6 of 6 parameters that are not the model's"
    ):
        hm.train(model, loader(), optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    shared = torch.optim.SGD([*model.parameters(), next(other.parameters())], lr=0.1)
    with pytest.raises(hm.HybridMagicError, match="holds 1 of 7"):
        hm.train(model, loader(), optimizer=shared)


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "options", "words"),
    [
        (lambda p: torch.optim.LBFGS(p), None, {}, "LBFGS"),
        (lambda p: "adam", None, {}, "is a str; wanted a torch.optim.Optimizer"),
        (lambda p: torch.optim.SGD(p, lr=0.1), None, {"lr": 0.2}, "--lr 0.2 is for a fresh AdamW"),
        (lambda p: torch.optim.SGD(p, lr=0.1), lambda o: 3, {}, "the scheduler is a int"),
        (
            lambda p: torch.optim.SGD(p, lr=0.1),
            lambda o: torch.optim.lr_scheduler.StepLR(
                torch.optim.SGD(mlp().parameters(), lr=0.1), 1
            ),
            {},
            "the scheduler belongs to another optimizer",
        ),
    ],
)
def test_what_does_not_fit_the_optimizer_is_told(
    optimizer: Any, scheduler: Any, options: Any, words: str
) -> None:
    model = mlp()
    made = optimizer(list(model.parameters()))
    schedule = None if scheduler is None else scheduler(made)
    with pytest.raises(hm.HybridMagicError, match=words):
        hm.train(model, loader(), optimizer=made, scheduler=schedule, **options)


def test_a_generator_is_read_once_and_all_of_it() -> None:
    run = hm.train(mlp(), (batch for batch in loader()), batch="fixed")
    assert (run.samples_seen, run.outcome) == (32, "finished")


def test_a_loader_that_runs_dry_after_an_epoch_is_told_of() -> None:
    class Once:
        def __init__(self) -> None:
            self.batches = list(loader())

        def __iter__(self) -> Any:
            batches, self.batches = self.batches, []
            return iter(batches)

    with pytest.raises(hm.HybridMagicError, match="yielded nothing in epoch 2"):
        hm.train(mlp(), Once(), epochs=2, batch="fixed")


@pytest.mark.parametrize(
    ("targets", "criterion", "said"),
    [
        (lambda y: y, None, "cross-entropy, for integer class targets"),
        (lambda y: y.float(), None, "mean squared error"),
        (lambda y: y.float(), nn.L1Loss(), "L1Loss"),
    ],
)
def test_a_bare_step_is_inferred_and_said(targets: Any, criterion: Any, said: str) -> None:
    x, y = vectors(32)
    model = mlp(classes=5 if criterion is None and "cross" in said else 1)
    data = DataLoader(TensorDataset(x, targets(y)), batch_size=8)
    if criterion is not None:
        data = DataLoader(TensorDataset(x, targets(y).reshape(-1, 1)), batch_size=8)
    run = hm.train(model, data, val=data, loss=criterion, epochs=30)
    assert any(said in note for note in run.notes)
    assert any("a fresh AdamW with learning rate 0.001" in note for note in run.notes)
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    assert ("accuracy" in run.metrics[-1]) == ("cross" in said)


def test_a_transformers_model_is_called_with_its_batch() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config)
    rows = [
        {"input_ids": torch.arange(6) + i % 3, "labels": torch.tensor(i % 3)} for i in range(24)
    ]
    data = DataLoader(rows, batch_size=6, shuffle=True)
    run = hm.train(model, data, val=data, epochs=2)
    assert any("(**batch).loss" in note for note in run.notes)
    assert 0 <= run.metrics[-1]["accuracy"] <= 1
    with pytest.raises(
        hm.HybridMagicError, match="the model's output has no loss for it; wanted labels"
    ):
        hm.train(model, [{"input_ids": torch.arange(6).reshape(1, 6)}])


def test_everything_of_the_persons_is_as_found_after_a_run() -> None:
    model = mlp()
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = loader()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    hm.train(model, data, optimizer=optimizer, epochs=2)
    assert not any(module.training for module in model.modules())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(p.grad is None for p in model.parameters())
    assert (data.batch_size, data.num_workers) == (8, 0)
    assert not optimizer._optimizer_step_pre_hooks
    assert not model._forward_hooks


def test_a_seed_makes_a_run_repeatable() -> None:
    trained = []
    for _ in range(2):
        model = mlp(dropout=0.3)
        data = DataLoader(TensorDataset(*vectors(40)), batch_size=8, shuffle=True)
        hm.train(model, data, seed=7, precision="fp32", batch="fixed", micro=8)
        trained.append(model)
    assert differences(*trained) == []


def test_a_model_left_in_eval_mode_still_has_batch_statistics() -> None:
    model = cnn().eval()
    data = DataLoader(TensorDataset(*images(40)), batch_size=8)
    run = hm.train(model, data, precision="fp32")
    assert min(record.microbatch_size for record in run.history) >= 8


def test_a_seed_of_a_refused_run_moves_no_random_number() -> None:
    model, data = frozen(), loader()
    found = torch.get_rng_state()
    with pytest.raises(hm.HybridMagicError):
        hm.train(model, data, seed=5)
    assert torch.equal(torch.get_rng_state(), found)


def test_what_is_logged_must_be_a_number_and_never_stands_for_the_epoch_or_the_loss() -> None:
    def compute(model: Any, batch: Any) -> Any:
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return loss, {"epoch": 70.0, "loss": 70.0}

    run = hm.train(mlp(), loader(), compute, val=loader(), batch="fixed")
    assert run.metrics[0]["epoch"] == 1
    assert run.metrics[0]["loss"] < 10

    def words(model: Any, batch: Any) -> Any:
        return compute(model, batch)[0], {"said": "hello"}

    with pytest.raises(hm.HybridMagicError, match="said to be logged is a str; wanted a number"):
        hm.train(mlp(), loader(), words)


@pytest.mark.parametrize(
    ("val", "epochs", "words"),
    [
        (mlp(), 1, "the validation loader is a Sequential; wanted a DataLoader"),
        ({"x": 1}, 1, "the validation loader is a dict"),
        (
            iter([vectors(4)]),
            2,
            "can be read only once, and is validated on after each of 2 epochs",
        ),
        ([], 1, "the validation loader is empty; wanted at least one batch"),
    ],
)
def test_what_cannot_be_validated_on_is_told_before_training(
    val: Any, epochs: int, words: str
) -> None:
    with pytest.raises(hm.HybridMagicError, match=words):
        hm.train(mlp(), loader(), val=val, epochs=epochs)


def test_a_generator_that_runs_dry_before_the_steps_asked_for_ends_the_run() -> None:
    run = hm.train(mlp(), (batch for batch in loader()), steps=50, batch="fixed")
    assert (run.outcome, run.steps, run.samples_seen) == ("finished", 4, 32)


def test_a_finished_one_cycle_is_told_of_before_a_step_is_taken() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    hm.train(model, loader(), optimizer=optimizer, scheduler=cycle, epochs=2)
    before = copy.deepcopy(model)
    with pytest.raises(hm.HybridMagicError, match="0 of its 8 steps left"):
        hm.train(model, loader(), optimizer=optimizer, scheduler=cycle, epochs=2)
    assert differences(model, before) == []


def test_limits_that_cannot_be_kept_are_refused_or_said() -> None:
    with pytest.raises(hm.ConfigError, match="--max-batch 4 is below 8, the batch of the loader"):
        hm.train(mlp(), loader(), max_batch=4)
    with pytest.raises(hm.HybridMagicError, match="on the meta device"):
        hm.train(mlp().to("meta"), loader())
    run = hm.train(mlp(), loader(), accum=50)
    assert any("--accum 50 is above" in note for note in run.notes)
    assert hm.train(mlp(), loader(), device=torch.device("cpu")).outcome == "finished"


@pytest.mark.parametrize(("asked", "found"), [("cuda", "cuda:1"), ("cuda:0", "cuda:0")])
def test_a_gpu_without_a_number_is_the_current_one(
    monkeypatch: pytest.MonkeyPatch, asked: str, found: str
) -> None:
    """Torch's own memory functions refuse one without."""

    def empty(size: int, *, device: torch.device) -> Any:
        number = 1 if device.index is None else device.index
        return types.SimpleNamespace(device=torch.device(device.type, number))

    model = nn.Linear(2, 2)
    monkeypatch.setattr(torch, "empty", empty)
    assert choose_device(asked, model) == torch.device(found)
