"""What the calls of a training step are for: backward, optimizer step, scheduler, scaler, clipping.

Told apart by how a program makes the names, by what the notebook holds, and last by what people
call such things. Runs nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .names import own_scopes

_OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam",
               "RMSprop", "Rprop", "SGD", "SparseAdam", "Adafactor", "Lion", "Muon")  # fmt: skip
LEAVE = "or leave %%hybrid_train off this cell"


class RefusedError(Exception):
    """A loop that cannot be taken over: `line` of the person's text and why."""

    def __init__(self, node: ast.AST, text: str) -> None:
        super().__init__(text)
        self.line, self.text = getattr(node, "lineno", 1), text


@dataclass
class Backward:
    """One `.backward()`: the call, the loss, and the GradScaler that scales it, if any."""

    call: ast.Call
    loss: ast.expr
    scaler: ast.expr | None = None


@dataclass
class Roles:
    """The calls of a step by what they are for; pairs are (call, what it is called on)."""

    backwards: list[Backward] = field(default_factory=list)
    steps: list[tuple[ast.Call, ast.expr]] = field(default_factory=list)
    advances: list[tuple[ast.Call, ast.expr]] = field(default_factory=list)
    dropped: list[ast.Call] = field(default_factory=list)  # scaler.update(), scaler.unscale_(...)
    zeroed: list[ast.stmt] = field(default_factory=list)
    clipped: list[ast.Call] = field(default_factory=list)

    @property
    def optimizer(self) -> str:
        return text_of(self.steps[0][1])

    @property
    def scaler(self) -> str | None:
        return next((text_of(b.scaler) for b in self.backwards if b.scaler is not None), None)


def text_of(node: ast.AST) -> str:
    return ast.unparse(node)


def last_name(node: ast.AST) -> str:
    """Return `c` of `a.b.c` or of `c`, "" for anything else."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def methods(nodes: Iterable[ast.AST], *attrs: str) -> Iterator[tuple[ast.Call, ast.expr]]:
    """Yield (call, receiver) of every `receiver.attr(...)` among `nodes`."""
    for node in nodes:
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr=attr)) if attr in attrs:
                yield node, owner


class Kinds:
    """What the names of a program are, by how it makes them and by what the notebook holds."""

    def __init__(self, tree: ast.AST, namespace: Mapping[str, Any] | None = None) -> None:
        self._made: dict[str, str] = {}
        classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self._own: dict[str, str] = {}  # what is made of a class that derives from no optimizer
        for node in ast.walk(tree):
            match node:
                case ast.Assign(value=ast.Call(func=ast.Name(id=name))) if name in classes:
                    bases = [last_name(base) for base in classes[name].bases]
                    if not any(_made_by(base) == "optimizer" for base in bases):
                        self._own.update((text_of(target), name) for target in node.targets)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                kind = _made_by(last_name(node.value.func))
                for target in node.targets if kind else ():
                    self._made[text_of(target)] = kind
        self._namespace = namespace or {}

    def own_class(self, node: ast.expr) -> str | None:
        """Return the name of the program's own class that `node` is of, if no optimizer's."""
        return self._own.get(text_of(node))

    def of(self, node: ast.expr) -> str:
        """Return "optimizer", "scheduler", "scaler" or "" for what is not known."""
        text = text_of(node)
        if text in self._made:
            return self._made[text]
        if isinstance(node, ast.Name) and node.id in self._namespace:
            return _kind_of_value(self._namespace[node.id])
        name = last_name(node).lower()
        if "scaler" in name:
            return "scaler"
        if "sched" in name or name.startswith(("lr", "warmup")):
            return "scheduler"
        return "optimizer" if "opt" in name else ""


def _made_by(maker: str) -> str:
    if maker in _OPTIMIZERS or maker.lower().endswith(("optimizer", "optim")):
        return "optimizer"
    if maker.endswith(("LR", "Scheduler", "Restarts", "Plateau", "schedule", "_with_warmup")):
        return "scheduler"
    return "scaler" if maker == "GradScaler" else ""


def _kind_of_value(value: Any) -> str:
    names = {kind.__name__ for kind in type(value).__mro__}
    if "GradScaler" in names:
        return "scaler"
    if names & {"LRScheduler", "_LRScheduler", "ReduceLROnPlateau"}:
        return "scheduler"
    return "optimizer" if "Optimizer" in names else ""


def holds_training(tree: ast.AST) -> bool:
    """Return whether a program calls `.backward()` anywhere."""
    return any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("backward", "manual_backward")
        for node in ast.walk(tree)
    )


def roles_of(body: Sequence[ast.stmt], kinds: Kinds) -> Roles:
    """Return what the calls of a step's statements are for.

    Raises:
        RefusedError: a `backward()` that is more than that of one loss.
    """
    found = Roles()
    for call, owner in methods(own_scopes(body), "backward", "manual_backward"):
        found.backwards.append(_backward(call, owner))
    found.steps = optimizer_steps(body, kinds)
    scaler = found.scaler
    for call, owner in methods(own_scopes(body), "step"):
        if kinds.of(owner) == "scheduler":
            found.advances.append((call, owner))
    for call, owner in methods(own_scopes(body), "update", "unscale_"):
        if text_of(owner) == scaler or kinds.of(owner) == "scaler":
            found.dropped.append(call)
    for node in own_scopes(body):
        if isinstance(node, ast.stmt) and _zeroes(node):
            found.zeroed.append(node)
        elif isinstance(node, ast.Call) and last_name(node.func).startswith("clip_grad"):
            found.clipped.append(node)
    return found


def optimizer_steps(body: Sequence[ast.stmt], kinds: Kinds) -> list[tuple[ast.Call, ast.expr]]:
    """Return the optimizer steps of a body with what is stepped: `o.step()`, `scaler.step(o)`."""
    calls = list(methods(own_scopes(body), "step"))
    scalers = {
        text_of(owner) for _, owner in methods(own_scopes(body), "scale", "unscale_", "update")
    }
    zeroed = {text_of(owner) for _, owner in methods(own_scopes(body), "zero_grad")}
    found: list[tuple[ast.Call, ast.expr]] = []
    unknown: list[tuple[ast.Call, ast.expr]] = []
    for call, owner in calls:
        kind = kinds.of(owner)
        if kind == "scaler" or (call.args and text_of(owner) in scalers):
            found += [(call, call.args[0])] if call.args else []
        elif kind == "optimizer" or (kind == "" and text_of(owner) in zeroed):
            found.append((call, owner))
        elif kind == "" and not call.args:
            unknown.append((call, owner))
    return found or unknown[:1]


def _zeroes(node: ast.stmt) -> bool:
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr="zero_grad"))):
            return True
        case ast.For(body=[ast.Assign(targets=[ast.Attribute(attr="grad")])]):
            return True
    return False


def _backward(call: ast.Call, owner: ast.expr) -> Backward:
    if last_name(call.func) == "manual_backward" or _launcher(owner):
        raise RefusedError(
            call,
            f"{text_of(call)} belongs to another training framework; wanted a plain "
            f"loss.backward(); take the framework's calls out, {LEAVE}",
        )
    started = bool(call.args)
    for keyword in call.keywords:
        kept = isinstance(keyword.value, ast.Constant) and not keyword.value.value
        if keyword.arg in ("retain_graph", "create_graph") and not kept:
            raise RefusedError(
                call,
                f"{text_of(call)} keeps the graph for a second pass; wanted one backward() a "
                f"step; add the losses up and call backward() once, {LEAVE}",
            )
        if keyword.arg in ("gradient", "inputs"):
            started = True
    if started:
        raise RefusedError(
            call,
            f"{text_of(call)} starts from a gradient of its own; wanted backward() of one number; "
            f"take the loss's mean() first, {LEAVE}",
        )
    match owner:
        case ast.Call(func=ast.Attribute(attr="scale", value=scaler), args=[loss]):
            return Backward(call, loss, scaler)
    return Backward(call, owner)


def _launcher(owner: ast.expr) -> bool:
    name = text_of(owner).lower()
    return any(word in name for word in ("accelerat", "fabric", "engine", "deepspeed"))
