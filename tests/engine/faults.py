"""Faults put into steps on purpose, the step that a person writes by hand, and what must be equal.

A fault strikes at an operation of torch, counted through forward, backward, measurement, unscaling,
clipping, optimizer and the copies that the step itself makes; one on a list of tensors is done for
the first half of them when it strikes.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch._dynamo  # a dispatch mode would load it in the midst of a step
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hybrid_magic.engine import retry
from hybrid_magic.policy.facts import Settings

Choose = Callable[[int, int, list[int]], "int | None"]


class Faults:
    """Patched in for `train_step`: runs out of memory where `choose` says.

    `choose(step, attempt, sizes)` names the operation of an attempt, counted from 0, that fails
    (None: it goes through). `struck` notes (step, sizes, the size of the micro-batch in hand,
    operation) of every fault, `operations` how many the last whole attempt had.
    """

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.struck: list[tuple[int, list[int], int, str]] = []
        self.ran: list[tuple[int, list[int]]] = []
        self.operations = 0
        self.state: Any = None  # the run's step state
        self._step, self._attempt = -1, 0
        self._real: Any = None

    def train_step(self, state: Any, data: Any, *args: Any, **options: Any) -> Any:
        self.state = state
        if state.steps != self._step:
            self._step, self._attempt = state.steps, 0
        chosen = self.choose(state.steps, self._attempt, list(data.sizes))
        self._attempt += 1
        self.ran.append((state.steps, list(data.sizes)))
        mode = Striking(chosen)
        try:
            with mode:
                result = self._real(state, data, *args, **options)
        except torch.OutOfMemoryError:
            self.struck.append((state.steps, list(data.sizes), state.running, mode.last))
            raise
        self.operations = mode.count
        return result

    @contextlib.contextmanager
    def at_work(self) -> Iterator[Faults]:
        self._real = retry.train_step
        retry.train_step = self.train_step
        try:
            yield self
        finally:
            retry.train_step = self._real


class Striking(TorchDispatchMode):
    """Runs out of memory, once, at the operation `chosen`, counted from 0; None: at none."""

    def __init__(self, chosen: int | None) -> None:
        super().__init__()
        self.chosen, self.count, self.last = chosen, 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.count == self.chosen:
            self.chosen = None
            self.last = str(func)
            if "_foreach_" in self.last and isinstance(args[0], (list, tuple)):
                half = len(args[0]) // 2
                func(*(a[:half] if isinstance(a, (list, tuple)) else a for a in args), **kwargs)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0")
        self.count += 1
        return func(*args, **(kwargs or {}))


def scattered(number: int, share: float, operations: int) -> Choose:
    """Faults in a `share` of the attempts that can be cut, and in the second step, at random: a
    micro-batch is taken to have about so many operations."""
    dice = random.Random(number)
    struck: set[int] = set()

    def choose(step: int, attempt: int, sizes: list[int]) -> int | None:
        sure = step == 1 and not struck
        if max(sizes) < 3 or (dice.random() > share and not sure):
            return None
        struck.add(step)
        return dice.randrange(operations * (1 if sure else len(sizes)))

    return choose


class Odd(nn.Module):
    """Draws from Python's and NumPy's generators, and has buffers of every bad habit."""

    scale: torch.Tensor
    seen: torch.Tensor
    late: torch.Tensor | None

    def __init__(self, inner: nn.Module, *, always: bool = True) -> None:
        super().__init__()
        self.inner, self.always = inner, always  # in eval mode, too
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("late", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or self.always:
            self.seen += len(x)
            self.scale = self.scale * 0.9 + 0.1 * x.detach().mean()
        if self.training:
            self.late = self.scale[:1] if self.late is None else self.late + 1.0
        noise = 1.0 + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002
        return self.inner(x) * noise


class Replacing(torch.optim.Optimizer):
    """Keeps plain numbers, in its groups too, and makes its tensors anew in every step."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "seen": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["seen"] += 1
            for param in group["params"]:
                state = self.state[param]
                state["step"] = state.get("step", 0) + 1
                state["mean"] = 0.9 * state.get("mean", 0.0) + param.grad
                param.sub_(state["mean"], alpha=group["lr"] / state["step"])


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def step_by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    sizes: Sequence[int],
    *,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    factor: float = 1.0,
    loss: Callable[[Any, Any], torch.Tensor] = loss_of,
) -> None:
    """One accumulated step as a person writes it, in micro-batches of `sizes`."""
    start = 0
    for size in sizes:
        piece = [part[start : start + size] for part in batch]
        start += size
        with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
            part = loss(model, piece)
        part = part * (size / sum(sizes)) if len(sizes) > 1 else part
        (part if scaler is None else scaler.scale(part)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr * factor
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()


# -- what must be equal --


def everything(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any = None
) -> dict[str, Any]:
    """All that a step changes, copied: weights, buffers, optimizer, scaler."""
    held = {f"model {name}": value.clone() for name, value in model.state_dict().items()}
    saved = optimizer.state_dict()
    for number, state in saved["state"].items():
        held[f"state {number} keys"] = list(state)
        for name, value in state.items():
            held[f"state {number} {name}"] = copy.deepcopy(value)
    held["states"] = list(saved["state"])
    held["groups"] = copy.deepcopy(saved["param_groups"])
    if scaler is not None:
        held["scaler"] = scaler.state_dict()
        held["scaler stages"] = dict(scaler._per_optimizer_states)
    held["gradients"] = [name for name, p in model.named_parameters() if p.grad is not None]
    held["modes"] = [module.training for module in model.modules()]
    return held


def generators() -> dict[str, Any]:
    """The state of every random generator."""
    return {"torch": torch.get_rng_state(), "Python": random.getstate(), "NumPy": _numpy()}


def _numpy() -> Any:
    found: Any = np.random.get_state()  # noqa: NPY002
    return [part.tolist() if hasattr(part, "tolist") else part for part in found]


def set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["Python"])
    np.random.set_state(tuple(state["NumPy"]))  # noqa: NPY002


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def unequal(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names under which two of the above are not equal, bit for bit."""
    return [name for name in {**one, **other} if not _equal(one.get(name), other.get(name))]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


def settings(base: int, *, batch_statistics: bool = False, micro: int | None = None) -> Settings:
    """A fixed batch, its micro-batch left to memory."""
    return Settings(
        base=base,
        batch="fixed",
        max_batch=base,
        micro=micro,
        batch_statistics=batch_statistics,
    )
