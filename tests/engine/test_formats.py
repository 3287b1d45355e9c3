"""The fast formats of mixed precision on tensor cores, and what they were before."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from hybrid_magic.engine.precision import Precision
from hybrid_magic.engine.prepare import tf32_places, use_fast_formats
from hybrid_magic.engine.undo import Undo
from hybrid_magic.engine.views import asks_for_views

GPU = torch.device("cuda", 0)


def ready(compute: Any = None) -> Any:
    return SimpleNamespace(precision=Precision("bf16", torch.device("cpu")), compute=compute)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Use the fast formats as on a GPU; returns what puts everything back."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def use(model: nn.Module, optimizer: Any) -> Undo:
        undo = Undo()
        assert use_fast_formats(undo, model, optimizer, ready(), GPU)
        return undo

    return use


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.randn(2, 3, 8, 8)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def convolutions() -> nn.Module:
    made: Any = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 2), nn.Flatten(), nn.Linear(150, 2)
    )
    made[2].to(memory_format=torch.channels_last)
    return made


def strides(model: nn.Module, optimizer: Any) -> list[list[tuple[int, ...]]]:
    """Of each weight, then of what the optimizer keeps of its shape."""
    return [
        [p.stride(), *(x.stride() for x in optimizer.state[p].values() if x.shape == p.shape)]
        for p in model.parameters()
        if p.dim() == 4
    ]


KINDS = [
    lambda params: torch.optim.AdamW(params, fused=True),
    lambda params: torch.optim.AdamW(params, amsgrad=True),
    lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
]


@pytest.mark.parametrize("kind", KINDS, ids=["fused", "amsgrad", "momentum"])
@pytest.mark.parametrize("before", [True, False], ids=["a loop of their own first", "fresh"])
def test_weights_and_what_the_optimizer_keeps_have_one_format(
    fast: Any, before: bool, kind: Any
) -> None:
    model: Any = convolutions()
    optimizer = kind(model.parameters())
    if before:
        step(model, optimizer)
    found = [p.stride() for p in model.parameters()]
    undo = fast(model, optimizer)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    for _ in range(2):
        assert all(len(set(each)) == 1 for each in strides(model, optimizer))
        step(model, optimizer)
    undo()
    assert [p.stride() for p in model.parameters()] == found
    assert all(len(set(each)) == 1 for each in strides(model, optimizer))
    assert len(strides(model, optimizer)[0]) > 1
    step(model, optimizer)


def test_values_are_the_same_in_another_format(fast: Any) -> None:
    model = convolutions()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    found = [p.detach().clone() for p in model.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    undo = fast(model, optimizer)
    for _ in range(2):
        assert all(map(torch.equal, found, model.parameters()))
        assert all(map(torch.equal, moments, (s["exp_avg"] for s in optimizer.state.values())))
        undo()


def test_however_the_person_has_set_tf32_it_is_used_and_put_back() -> None:
    """Each way in a process of its own: torch forgets none of them."""
    program = """
        import os, sys, torch, types, warnings
        warnings.simplefilter("ignore")
        from hybrid_magic.engine.precision import Precision
        from hybrid_magic.engine.prepare import use_fast_formats
        from hybrid_magic.engine.undo import Undo

        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        all_, products, cudnn = torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn

        def legacy():
            products.allow_tf32, cudnn.allow_tf32 = True, False

        ways = {"nothing": lambda: None, "legacy": legacy}
        for word in ("highest", "high", "medium"):
            ways[word] = lambda word=word: torch.set_float32_matmul_precision(word)
        new = hasattr(products, "fp32_precision") and hasattr(cudnn, "conv")
        places = {"all": all_, "products": products, "cudnn": cudnn}
        places |= {"conv": cudnn.conv, "rnn": cudnn.rnn} if new else {}
        for name, place in places.items() if new else ():
            for word in ("ieee", "tf32"):
                ways[name, word] = lambda place=place, word=word: setattr(
                    place, "fp32_precision", word
                )

        def told(read):
            try:
                return read()
            except RuntimeError:
                return "refused"

        def state():
            found = [place.fp32_precision for place in places.values() if new]
            flags = (lambda: products.allow_tf32, lambda: cudnn.allow_tf32)
            return found + [told(read) for read in (*flags, torch.get_float32_matmul_precision)]

        def holds():
            model, undo = torch.nn.Linear(2, 2), Undo()
            before = state()
            ready = types.SimpleNamespace(
                precision=Precision("bf16", torch.device("cpu")), compute=None
            )
            use_fast_formats(undo, model, None, ready, torch.device("cuda", 0))
            if new:
                during = {p.fp32_precision for p in (products, cudnn.conv, cudnn.rnn)}
                assert during == {"tf32"}, during
            else:
                assert products.allow_tf32 and cudnn.allow_tf32
            undo()
            assert state() == before, (before, state())

        for name, way in ways.items():
            child = os.fork()
            if not child:
                try:
                    way()
                    holds()
                except BaseException as error:
                    print(name, type(error).__name__, error, flush=True)
                    os._exit(1)
                os._exit(0)
            os.waitpid(child, 0)
        print(len(ways), "ways", flush=True)
    """
    run = [sys.executable, "-c", textwrap.dedent(program)]
    said = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said in (["15 ways"], ["5 ways"])


class Flattens(nn.Module):
    """The tutorials' network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 6, 5), nn.Linear(6 * 4 * 4, 2)

    def forward(self, x: Any) -> Any:
        return self.out(self.conv(x).view(-1, 6 * 4 * 4))


def flat(x: Any) -> Any:
    return x.view(len(x), -1)


class Calls(Flattens):
    def forward(self, x: Any) -> Any:
        return self.out(flat(self.conv(x)))


class Reshapes(Flattens):
    def forward(self, x: Any) -> Any:
        return self.out(torch.flatten(self.conv(x), 1))


def plain_step(model: Any, batch: Any) -> Any:
    return model(batch).mean()


def viewing_step(model: Any, batch: Any) -> Any:
    def loss(out: Any) -> Any:
        return out.view(-1).mean()

    return loss(model(batch))


@pytest.mark.parametrize(
    ("model", "compute", "asks"),
    [
        (Flattens(), None, True),
        (nn.Sequential(Calls()), plain_step, True),
        (Reshapes(), plain_step, False),
        (Reshapes(), viewing_step, True),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), None, False),
        (torchvision.models.resnet18(), None, False),
    ],
)
def test_where_views_are_asked_for_nothing_is_laid_out_anew(
    model: Any, compute: Any, asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asks_for_views(model, compute) == asks
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    optimizer, undo = torch.optim.SGD(model.parameters(), lr=0.1), Undo()
    assert use_fast_formats(undo, model, optimizer, ready(compute), GPU) == (not asks)
    x = torch.randn(2, 3, 8, 8)
    if not asks:
        x = x.contiguous(memory_format=torch.channels_last)
    (compute or plain_step)(model, x).backward()
    undo()
    assert all(param.is_contiguous() for param in model.parameters())


@pytest.mark.skipif(not tf32_places(), reason="this torch has the older switches only")
def test_runs_that_are_compared_take_either_kind_of_switches() -> None:
    program = """
        import torch
        from hybrid_magic.engine.compare import _arithmetic
        from hybrid_magic.launch import parcel

        cudnn = torch.backends.cudnn
        places = torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn
        places[1].fp32_precision = "ieee"
        for tf32 in (None, False, True):
            before = [place.fp32_precision for place in places]
            with _arithmetic(tf32):
                if tf32 is not None:
                    found = [place.fp32_precision for place in places]
                    assert found == ["ieee", *(["tf32" if tf32 else "ieee"] * 2)], found
            assert [place.fp32_precision for place in places] == before
        parcel._set_tf32(parcel._tf32())
        assert [place.fp32_precision for place in places] == before
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
