"""A profile of what people train: everything is as before, and the numbers are those by hand."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from field_models import KINDS, Fn, data, recomputed, same, small, state
from torch import Tensor, nn

import hybrid_magic as hm
from hybrid_magic.config import ProfileConfig
from hybrid_magic.engine import roofline
from hybrid_magic.engine.ablate import Training
from hybrid_magic.engine.control import RunControl
from hybrid_magic.engine.device import probe_for
from hybrid_magic.engine.profile import examine
from hybrid_magic.profiles import Module, Profile


@pytest.fixture(autouse=True)
def _known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the device takes longer than most of these profiles."""
    monkeypatch.setattr(roofline, "flops_per_s", lambda probe, precision: 1e12)
    monkeypatch.setattr(roofline, "bytes_per_s", lambda probe: 1e11)


# -- what must be as before --


def looked(
    model: nn.Module, loader: Any, step: Any = None, optimizer: Any = None, **options: Any
) -> Profile:
    """Return a short profile of a training that ends as it began, whatever ends it."""
    if optimizer is None:
        trained = [param for param in model.parameters() if param.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    before = state(model, optimizer, loader)
    try:
        options = {"steps": 2, "precision": "fp32", **options}
        return hm.profile(model, loader, step, optimizer=optimizer, **options)
    finally:
        after = state(model, optimizer, loader)
        changed = [name for name in before if not same(before[name], after[name])]
        assert not changed, changed


def by_path(found: Profile) -> dict[str, Module]:
    return {module.path: module for module in found.modules}


@pytest.mark.parametrize("kind", KINDS)
def test_what_people_train_ends_as_it_was_and_its_parts_add_up(kind):
    make, loader = KINDS[kind]
    found = looked(make(), loader())
    seconds = {stage.name: stage.seconds for stage in found.stages}
    assert sum(seconds.values()) == pytest.approx(found.step_s, rel=0.02)
    modules = by_path(found)
    top, passes = modules[""], seconds["forward"] + seconds["backward"]
    assert top.backward_s
    assert top.seconds + found.outside_s == pytest.approx(passes)
    for module in found.modules:
        parts = [m for m in found.modules if m.path and m.path.rpartition(".")[0] == module.path]
        for name in ("activation_bytes", "flops"):
            known = [getattr(each, name) for each in (module, top)]
            if None not in known:  # recurrent layers are not counted
                assert sum(getattr(part, name) for part in parts) <= known[0] <= known[1]
    for peak in found.peaks:
        assert sum(peak.kinds.values()) == peak.total_bytes
        assert min(peak.kinds.values()) >= 0
    assert found.table()


# -- by hand --


def test_a_perceptron_s_activations_and_operations_are_those_by_hand():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(),
                          nn.Linear(64, 10))  # fmt: skip
    found = looked(model, data(batch=32))
    kept = {path: module.activation_bytes for path, module in by_path(found).items()}
    hidden = 32 * 64 * 4
    assert kept == {"": 3 * hidden, "0": 0, "1": hidden, "2": hidden, "3": hidden, "4": 0}
    layers = [2 * 32 * a * b for a, b in ((16, 64), (64, 64), (64, 10))]
    assert found.work.total_flops == 3 * sum(layers) - layers[0]  # the input has no gradient
    weights = sum(param.numel() for param in model.parameters()) * 4
    last = found.peaks[-1].kinds
    assert [last[name] for name in ("parameters", "gradients", "optimizer state")] == [weights] * 3


def test_a_convolution_s_activations_and_operations_are_those_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    found = looked(model, data(3, 8, 8))
    kept = [module.activation_bytes for module in found.modules[1:]]
    image, pooled = 8 * 64 * 4, 8 * 16 * 16
    statistics = 2 * 8 * 4
    assert kept == [8 * image, 8 * image + statistics, 0, 0, 16 * image, pooled * (4 + 8), 0, 0]
    first, second, last = 2 * 8 * 64 * 8 * 27, 2 * 8 * 64 * 16 * 72, 2 * 8 * 256 * 10
    assert found.work.total_flops == 2 * first + 3 * second + 3 * last
    assert found.setting.convolution_flops == 2 * first + 3 * second


def test_attention_that_is_written_out_is_found_with_its_scores():
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (t.view(len(x), 64, 2, 4).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
        out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return m.head(out.transpose(1, 2).flatten(2).mean(1))

    model = Fn(forward, qkv=nn.Linear(8, 24), head=nn.Linear(8, 10))
    found = looked(model, data(64, 8))
    assert found.setting.attention_scores == "8 x 2 x 64 x 64"
    assert found.setting.attention_bytes == 8 * 2 * 64 * 64 * 4
    assert by_path(found)[""].flops == 8 * (2 * 2 * 64 * 8 * 24 + 3 * 2 * 2 * 2 * 64 * 64 * 4) + (
        3 * 2 * 8 * 8 * 10
    )


# -- what ends it early --


class Boom(Exception):
    """The person's own."""


def ending(at: int, error: type[BaseException], where: str) -> tuple[nn.Module, Any, list[Any]]:
    """Return a model, a loader, and the weak references to what the model made; the `at`-th time
    that a forward pass, a backward pass or the loader comes by, it raises."""
    passed, made = [0], []

    def count(value: Any) -> Any:
        passed[0] += 1
        if passed[0] == at:
            raise error
        return value

    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.a(x)
        made.append(weakref.ref(out))
        if where == "forward":
            count(out)
        elif where == "backward":
            out.register_hook(count)
        return m.b(out.relu())

    model = Fn(forward, a=nn.Linear(16, 32), norm=nn.BatchNorm1d(32), b=nn.Linear(32, 10))
    loader: Any = data()
    if where == "loader":
        collate = torch.utils.data.default_collate
        loader = data(collate_fn=lambda rows: count(collate(rows)), num_workers=0)
    return model, loader, made


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("where", "at"),
    [("forward", 1), ("forward", 4), ("forward", 7), ("forward", 12), ("forward", 18),
     ("backward", 1), ("backward", 5), ("backward", 8), ("backward", 12), ("backward", 15),
     ("loader", 5), ("loader", 20), ("loader", 30)],
)  # fmt: skip
def test_an_error_or_an_interrupt_at_any_moment_leaves_everything_as_it_was(where, at, error):
    model, loader, made = ending(at, error, where)
    with pytest.raises(error) as raised:
        looked(model, loader)
    del raised
    gc.collect()
    assert all(ref() is None for ref in made)


def test_a_stop_ends_it_with_what_was_seen():
    found = looked(small(), data(), **stopping_after(9))
    assert found.steps == 2
    assert found.line is None


def stopping_after(steps: int) -> dict[str, Any]:
    control, seen = RunControl(), []

    def sink(record: Any) -> None:
        seen.append(record)
        if sum(type(record).__name__ == "StepRecord" for record in seen) == steps:
            control.ask("stop")

    return {"sink": sink, "control": control}


# -- what went wrong once --


def test_a_recomputed_part_does_not_take_the_backward_pass_of_what_lies_before_it():
    again, plain = (by_path(looked(recomputed(reentrant=r), data())) for r in (False, True))
    assert again["stem"].flops == plain["stem"].flops
    assert again["stem"].backward_s


def test_a_module_of_two_names_has_its_time():
    inner = nn.Linear(16, 16)
    again = nn.ModuleDict({"x": inner})
    model = Fn(lambda m, x: m.h(m.again["x"](m.a(x))), a=inner, again=again, h=nn.Linear(16, 10))
    shared = by_path(looked(model, data()))["a"]
    assert shared.calls == 2
    assert shared.seconds


def test_a_loader_with_workers_gets_its_line():
    assert looked(small(), data(n=400, num_workers=2)).line is not None


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_script_module_ends_as_it_was():
    model = torch.jit.trace(small(), torch.randn(2, 16))
    assert looked(model, data()).step_s


class Short(Training):
    """A loop of three steps, as a cell has it."""

    def train(self, options: dict[str, Any], sink: Any, control: RunControl) -> Any:
        return super().train(options | {"steps": 3}, sink, control)


def test_a_loop_of_few_steps_is_taken_until_enough_was_seen():
    model = small()
    given = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    given |= dict.fromkeys(("val", "loss", "scheduler"))
    subject = Short(model, data(), None, given, None, ())
    config = ProfileConfig.from_options({"precision": "fp32"})
    found = examine(subject, config, probe_for(torch.device("cpu")))
    assert found.peaks
    assert found.modules[0].seconds


def test_a_stop_while_steps_are_timed_ends_it_with_those():
    assert looked(small(), data(), steps=5, **stopping_after(4)).steps == 1


def test_a_stop_before_a_step_is_timed_is_told():
    with pytest.raises(hm.HybridMagicError, match="stopped"):
        looked(small(), data(), **stopping_after(2))


def test_a_gradient_penalty_is_profiled():
    def step(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1]) + (slope.norm(dim=1) - 1).square().mean()

    assert looked(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)), data(), step).step_s


def test_gradients_that_were_there_stay():
    model = small()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    looked(model, data())


def test_what_a_model_has_written_down_is_taken_back():
    model: Any = Fn(lambda m, x: (m.seen.append(x), m.f(x))[1], f=nn.Linear(16, 10))
    model.seen = []
    looked(model, data())
    assert model.seen == []


def test_a_lazy_model_is_told():
    with pytest.raises(hm.HybridMagicError, match="lazy parameters"):
        hm.profile(nn.Sequential(nn.LazyLinear(10)), data())
