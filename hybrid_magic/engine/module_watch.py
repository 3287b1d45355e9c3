"""Which module a training step is in, forward and backward.

Forward passes are followed by module hooks. In the backward pass a module's turn begins when the
gradient of what it gave is there: hooks on those tensors, since full backward hooks on modules
would break in-place operations. Changes no value; knows no clock.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import nested


class ModuleWatch:
    """`switched` is called with the path of the module whose turn it is, None outside of all.

    `calls` counts forward passes by path; `ranges` names them in a torch.profiler trace too.
    """

    def __init__(
        self, model: nn.Module, switched: Callable[[str | None], None], *, ranges: bool = False
    ) -> None:
        self.calls: Counter[str] = Counter()
        self._model, self._switched, self._ranges = model, switched, ranges
        self._stack: list[tuple[str, Any]] = []
        self._backward: str | None = None
        self._given: list[tuple[weakref.ref[Tensor], int]] = []  # by the module that ended last
        self._handles: list[Any] = []
        self._open = False

    def open(self) -> None:
        """Begin to watch; a compiled module is watched as a whole, a scripted one not at all."""
        self._open = True
        waiting = [("", self._model)]
        seen: set[int] = set()
        while waiting:
            path, module = waiting.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                continue
            self._hook(path, module)
            if not hasattr(module, "_orig_mod"):
                children = module.named_children()
                found = [(f"{path}.{name}" if path else name, child) for name, child in children]
                waiting += reversed(found)  # the first path of a module that has several

    def _hook(self, path: str, module: nn.Module) -> None:
        before = module.register_forward_pre_hook(lambda *_: self._enter(path), prepend=True)
        after = module.register_forward_hook(
            lambda *found: self._leave(path, found[2]),
            always_call=True,  # a checkpoint ends its second forward pass early, by an error
        )
        self._handles += [before, after]

    def close(self) -> None:
        """End watching; hooks on tensors do nothing any more."""
        self._open = False
        for handle in self._handles:
            handle.remove()
        for _, opened in reversed(self._stack):  # a forward pass that raised
            if opened is not None:
                opened.__exit__(None, None, None)
        self._handles, self._stack, self._given = [], [], []

    def turn(self) -> None:
        """A forward or backward pass begins or ends here."""
        self._backward = None
        self._given = []
        if not self._stack:
            self._switched(None)

    def _enter(self, path: str) -> None:
        opened = None
        if self._ranges:
            opened = torch.profiler.record_function(path or type(self._model).__name__)
            opened.__enter__()
        self._stack.append((path, opened))
        self.calls[path] += 1
        self._switched(path)

    def _leave(self, path: str, output: Any) -> None:
        while self._stack:  # of children that raised, too, where the person caught it
            found, opened = self._stack.pop()
            if opened is not None:
                opened.__exit__(None, None, None)
            if found == path:
                break
        for tensor in nested.leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None and not self._seen(tensor):
                tensor.register_hook(lambda _: self._enter_backward(path))
        self._given = [
            (weakref.ref(tensor), tensor._version)
            for tensor in nested.leaves(output)
            if isinstance(tensor, Tensor)
        ]
        self._switched(self._stack[-1][0] if self._stack else self._backward)

    def _seen(self, tensor: Tensor) -> bool:
        """Return whether a child has given this very tensor on: its backward pass comes first."""
        return any(ref() is tensor and version == tensor._version for ref, version in self._given)

    def _enter_backward(self, path: str) -> None:
        if self._open and not self._stack:
            self._backward = path
            self._switched(path)
