"""Model, loader, optimizer, criterion and scheduler out of a notebook's namespace.

Only looks. What is found by itself must be the only candidate; otherwise the candidates are listed.
Trains nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from ..errors import HybridMagicError
from .arguments import Line
from .cell import Cell, make_step

CRITERIA = ("criterion", "loss_fn", "loss_func", "loss_function")  # what people call their own
LOG_OF_NOTHING = "--log is for a step that the cell writes, and this cell is empty; leave --log out"
ROLES = ("val", "optimizer", "loss", "scheduler")  # options whose value is a name in the notebook


@dataclass
class Captured:
    """What a magic trains with, and what the person calls each; `found` says what was not named."""

    model: Any
    loader: Any
    optimizer: Any = None
    val: Any = None
    loss: Any = None
    scheduler: Any = None
    names: dict[str, str] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)

    def hand_to(self, work: Callable[..., Any], step: Any, line: Line, view: Any) -> Any:
        """Return what `work` (the engine's `train` or `ablate`) returns for this and the options of
        `line`, seen and steered by `view`."""
        __tracebackhide__ = True
        return work(
            self.model,
            self.loader,
            step,
            optimizer=self.optimizer,
            val=self.val,
            loss=self.loss,
            scheduler=self.scheduler,
            sink=view,
            control=view.control,
            names=self.names,
            found=self.found,
            **{name: value for name, value in line.options.items() if name not in ROLES},
        )


def step_and_capture(
    shell: Any, line: Line, cell: Cell, log: Sequence[str]
) -> tuple[Any, Captured]:
    """Return the step that a cell writes (None: it is to be inferred), and what it trains with.

    Raises:
        HybridMagicError: of either, or `log` where there is no step to read it from.
    """
    step = make_step(shell, cell, log)
    taken = capture(line, shell.user_ns, bare=step is None)
    if log and step is None:
        raise HybridMagicError(
            "--log is for a step that the cell writes, and this cell is empty; leave --log out"
        )
    return step, taken


def capture(line: Line, namespace: Mapping[str, Any], *, bare: bool) -> Captured:
    """Return what `line` names in `namespace`, and the only candidate for what it leaves out.

    Args:
        bare: whether the step is to be inferred, so that a criterion is looked for too.
    Raises:
        HybridMagicError: a name that does not exist, no candidate, or several.
    """
    first = namespace.get(line.model or "")
    if line.loader is None and isinstance(first, DataLoader):  # %hybrid_train loader
        line = Line(None, line.model, line.options)
    options, names, said = line.options, {}, []

    def named(role: str, name: str) -> Any:
        names[role] = name
        return _look_up(name, namespace, role)

    def only(role: str, candidates: dict[str, Any]) -> Any:
        ((name, value),) = candidates.items()
        names[role] = name
        said.append(f"{role}: {name}")
        return value

    model = named("model", line.model) if line.model else only("model", _one_model(namespace))
    loader = (
        named("loader", line.loader)
        if line.loader
        else only("loader", _one_loader(namespace, options.get("val")))
    )
    taken = Captured(model, loader, names=names, found=said)
    if "val" in options:
        taken.val = named("val", options["val"])
    if "optimizer" in options:
        taken.optimizer = named("optimizer", options["optimizer"])
    elif isinstance(model, nn.Module):
        found = _one_optimizer(namespace, model, names["model"])
        taken.optimizer = only("optimizer", found) if found else None
    if "loss" in options:
        taken.loss = named("loss", options["loss"])
    elif bare:
        found = _one_criterion(namespace)
        taken.loss = only("loss", found) if found else None
    if "scheduler" in options:
        taken.scheduler = named("scheduler", options["scheduler"])
    elif taken.optimizer is not None:
        found = _one_scheduler(namespace, taken.optimizer)
        taken.scheduler = only("scheduler", found) if found else None
    return taken


def _look_up(name: str, namespace: Mapping[str, Any], role: str) -> Any:
    if name in namespace:
        return namespace[name]
    near = difflib.get_close_matches(
        name, [key for key in namespace if not key.startswith("_")], n=1
    )
    do = f"did you mean {near[0]}?" if near else "run the cell that makes it"
    what = {"val": "validation loader", "loss": "criterion"}.get(role, role)
    raise HybridMagicError(f"the notebook has no {name}; wanted the name of the {what}; {do}")


def _distinct(namespace: Mapping[str, Any], fits: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the names whose values fit, the first of each object, IPython's own left out."""
    seen: set[int] = set()
    found: dict[str, Any] = {}
    for name, value in namespace.items():
        if name.startswith("_") or id(value) in seen or not fits(value):
            continue
        seen.add(id(value))
        found[name] = value
    return found


def _one_model(namespace: Mapping[str, Any]) -> dict[str, Any]:
    def trainable(value: Any) -> bool:
        return isinstance(value, nn.Module) and any(p.requires_grad for p in value.parameters())

    found = _distinct(namespace, trainable)
    inner = {id(part) for model in found.values() for part in model.modules() if part is not model}
    found = {name: model for name, model in found.items() if id(model) not in inner}
    if not found:
        frozen = _distinct(
            namespace,
            lambda value: isinstance(value, nn.Module) and any(True for _ in value.parameters()),
        )
        held = f"only frozen models ({', '.join(frozen)})" if frozen else "no model"
        raise HybridMagicError(
            f"the notebook holds {held}; wanted a torch.nn.Module with trainable parameters; "
            "make one, or name it"
        )
    return _single(found, "models", "%%hybrid_train MODEL LOADER")


def _one_loader(namespace: Mapping[str, Any], val: str | None) -> dict[str, Any]:
    kept = namespace.get(val or "")  # what validates is not trained on, unless it is named for that

    def fits(value: Any) -> bool:
        return isinstance(value, DataLoader) and value is not kept

    found = _distinct(namespace, fits)
    named = {name: value for name, value in namespace.items() if name.lower().startswith("train")}
    if len(found) > 1:
        found = _distinct(named, fits) or found
    if not found:
        but = f" but {val}, which validates" if isinstance(kept, DataLoader) else ""
        raise HybridMagicError(
            f"the notebook holds no DataLoader{but}; wanted one to train on; make it, or name any "
            "iterable of batches: %%hybrid_train MODEL LOADER"
        )
    return _single(found, "DataLoaders", "%%hybrid_train MODEL LOADER")


def _one_optimizer(namespace: Mapping[str, Any], model: nn.Module, called: str) -> dict[str, Any]:
    """Return the optimizer that holds the model's parameters, nothing when the notebook has none.

    An optimizer of another model is nobody's business, unless it is the only one there is: then it
    was meant for this model, and made before the model was made anew.
    """
    own = {id(parameter) for parameter in model.parameters()}
    found = _distinct(namespace, lambda value: isinstance(value, Optimizer))
    holding = {
        name: optimizer
        for name, optimizer in found.items()
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"])
    }
    if holding:
        return _single(holding, f"optimizers of {called}", "--optimizer NAME")
    models = _distinct(namespace, lambda value: isinstance(value, nn.Module))
    others = {id(p) for other in models.values() if other is not model for p in other.parameters()}
    for name, optimizer in found.items():
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in others for p in held):
            raise HybridMagicError(
                f"{name} holds {len(held)} of {len(held)} parameters that are not {called}'s; "
                "wanted an optimizer "
                "of this model; make it anew after the model: "
                f"{type(optimizer).__name__}({called}.parameters(), ...)"
            )
    return {}


def _one_criterion(namespace: Mapping[str, Any]) -> dict[str, Any]:
    found = _distinct(namespace, lambda value: isinstance(value, nn.modules.loss._Loss))
    named = {
        name: value for name, value in namespace.items() if name in CRITERIA and callable(value)
    }
    found = {**found, **_distinct(named, lambda value: value not in found.values())}
    return _single(found, "criteria", "--loss NAME") if found else {}


def _one_scheduler(namespace: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    def of_this(value: Any) -> bool:
        kinds = (LRScheduler, ReduceLROnPlateau)
        return isinstance(value, kinds) and getattr(value, "optimizer", None) is optimizer

    found = _distinct(namespace, of_this)
    inner = {id(part) for outer in found.values() for part in getattr(outer, "_schedulers", [])}
    found = {name: scheduler for name, scheduler in found.items() if id(scheduler) not in inner}
    return _single(found, "schedulers", "--scheduler NAME") if found else {}


def _single(found: dict[str, Any], what: str, do: str) -> dict[str, Any]:
    if len(found) > 1:
        listed = ", ".join(f"{name} ({type(value).__name__})" for name, value in found.items())
        raise HybridMagicError(
            f"the notebook holds {len(found)} {what}: {listed}; wanted one; name it: {do}"
        )
    return found
