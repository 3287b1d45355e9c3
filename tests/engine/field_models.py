"""Small models and loaders of the kinds that people train, for the tests of a profile.

`state` is what a profile must leave as it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import hybrid_magic as hm


def data(*shape: int, n: int = 64, batch: int = 8, **how: Any) -> DataLoader[Any]:
    torch.manual_seed(0)
    values = torch.randn(n, *(shape or (16,)))
    order = torch.Generator().manual_seed(1)
    held = TensorDataset(values, torch.randint(0, 10, (n,)))
    return DataLoader(held, batch_size=batch, shuffle=True, generator=order, **how)


def tokens(length: int = 12) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(torch.randint(0, 50, (64, length)), torch.randint(0, 10, (64,))),
        batch_size=8,
    )


def small(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), *between, nn.ReLU(), nn.Linear(32, 10))


class Fn(nn.Module):
    """Layers, and how they are put together."""

    def __init__(self, forward: Callable[[Any, Any], Any], **layers: nn.Module) -> None:
        super().__init__()
        self._how = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self._how(self, x)


def pre_activation() -> nn.Module:
    block = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
    return Fn(
        lambda m, x: m.head((m.stem(x) + m.block(m.stem(x))).relu_().mean((2, 3))),
        stem=nn.Conv2d(3, 8, 3), block=block, head=nn.Linear(8, 10),
    )  # fmt: skip


def in_place() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.halves(m.a(x).add_(1.0))
        first = first.clone()
        first[:, :2] = 0
        return m.b(first.mul_(2.0) + second)

    halves = Fn(lambda _, x: x.chunk(2, 1))
    return Fn(forward, a=nn.Linear(16, 16), halves=halves, b=nn.Linear(8, 10))


def of_no_tensor() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        assert m.none(x) is None
        return m.head(m.named(x)["out"][0])

    named: Any = Fn(lambda m, x: {"out": [m.f(x), None]}, f=nn.Linear(16, 16))
    none: Any = Fn(lambda m, x: [m.f(x)].clear(), f=nn.Linear(16, 16))
    return Fn(forward, named=named, none=none, head=nn.Linear(16, 10))


def packed() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        lengths = torch.arange(12, 12 - len(x), -1).clamp(min=2)
        out, _ = m.rnn(rnn.pack_padded_sequence(m.words(x), lengths, batch_first=True))
        return m.head(rnn.pad_packed_sequence(out, batch_first=True)[0][:, 0])

    return Fn(forward, words=nn.Embedding(50, 8), rnn=nn.LSTM(8, 8, 2, batch_first=True),
              head=nn.Linear(8, 10))  # fmt: skip


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return Fn(lambda m, x: m.head(m.body(m.words(x)).mean(1)), words=nn.Embedding(50, 16),
              body=nn.TransformerEncoder(layer, 2), head=nn.Linear(16, 10))  # fmt: skip


def recomputed(*, reentrant: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.body, m.stem(x), use_reentrant=reentrant))

    return Fn(forward, stem=nn.Sequential(nn.Linear(16, 512), nn.Linear(512, 16)),
              body=nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)),
              head=nn.Linear(16, 10))  # fmt: skip


def three_times() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(m.inner(x))
        return m.head(x)

    return Fn(forward, inner=nn.Linear(16, 16), head=nn.Linear(16, 10))


def hooked() -> nn.Module:
    model = small()
    model[0].register_forward_hook(lambda _, given, out: out * 2)
    model[1].register_full_backward_hook(lambda *_: None)
    model[2].register_forward_pre_hook(lambda _, given: (given[0] + 1,))
    return model


def frozen() -> nn.Module:
    model = small(nn.BatchNorm1d(32))
    model[0].requires_grad_(False)
    model[1].eval()
    return model


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "pre-activation": (pre_activation, lambda: data(3, 8, 8)),
    "in place": (in_place, data),
    "of no tensor": (of_no_tensor, data),
    "packed": (packed, tokens),
    "transformer": (transformer, tokens),
    "three times": (three_times, data),
    "recomputed": (lambda: recomputed(reentrant=True), data),
    "parametrized": (lambda: small(parametrizations.weight_norm(nn.Linear(32, 32))), data),
    "of its own hooks": (hooked, data),
    "frozen": (frozen, data),
    "dropout": (lambda: small(nn.BatchNorm1d(32), nn.Dropout(0.1)), data),
    "short last batch": (small, lambda: data(n=20)),
    "one batch": (small, lambda: data(n=8)),
    "list": (small, lambda: list(data())),
    "samples": (small, lambda: data(n=16, batch=1)),
}


def state(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> dict[str, Any]:
    params, modules = dict(model.named_parameters()), dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kept: dict[str, Any] = {
        "weights": {name: param.detach().clone() for name, param in params.items()},
        "which": [id(param) for param in params.values()],
        "trained": [param.requires_grad for param in params.values()],
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in params.items()},
        "on weights": [len(param._backward_hooks or ()) for param in params.values()],
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "modes": [module.training for module in modules.values()],
        "hooks": [[len(getattr(m, name)) for name in hooks] for m in modules.values()],
        "attributes": [sorted(vars(module)) for module in modules.values()],
        "moments": [{k: torch.as_tensor(v).clone() for k, v in held.items() if v is not None}
                    for held in optimizer.state.values()],
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002 - the state people use
        "python": random.getstate(),
        "dispatch": len(_get_current_dispatch_mode_stack()),
        "last run": id(hm.last_run),
    }  # fmt: skip
    if getattr(loader, "generator", None) is not None:
        kept["order"] = loader.generator.get_state()
    return kept


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (Tensor, np.ndarray)):
        return type(one) is type(other) and bool((one == other).all())
    return one == other
