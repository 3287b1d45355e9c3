"""The same training through others' loops, one small function a peer, and through ours.

Each is given the model, the batches and the optimizer that the hand-written loop is given, and
returns what trains; building it is outside the clock. Each is set up as its own documentation says
for the least work a step: FP32 on the CPU, nothing logged, saved, drawn, clipped or scheduled.
A peer is imported only by its own function. Knows no clock and no result.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hybrid_magic.notebook.live import View

from . import loops

Fit = Callable[[], Any]
AT_ONCE = contextlib.nullcontext()  # a step of one batch needs no context


@dataclass(frozen=True)
class Parts:
    """What is trained: `loader` is a DataLoader, or a list of ready batches (x, y)."""

    model: nn.Module
    loader: Any
    optimizer: torch.optim.Optimizer
    accumulate: int  # loader batches in a step; divides the batches of an epoch
    epochs: int


Loop = Callable[[Parts], Fit]


@dataclass(frozen=True)
class Peer:
    """One of the others: its loop, the modules it needs, and the distributions to name."""

    loop: Loop
    modules: tuple[str, ...]
    distributions: tuple[str, ...]


def by_hand(parts: Parts) -> Fit:
    return lambda: loops.by_hand(*_in_order(parts))


def ours(parts: Parts, **options: Any) -> Fit:
    """Return `hm.train` with its records on and nothing shown."""
    return lambda: loops.ours(*_in_order(parts), device="cpu", **options)


def _in_order(parts: Parts) -> tuple[Any, ...]:
    return parts.model, parts.loader, parts.optimizer, parts.accumulate, parts.epochs


def ours_shown(parts: Parts) -> Fit:
    """Return the same under the live view, which writes text here: there is no front end."""
    view = View(kernel=None, plain=False)
    train = ours(parts, sink=view, control=view.control)

    def fit() -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            view.close(train())

    return fit


def accelerate(parts: Parts) -> Fit:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts.accumulate)
    model, optimizer = accelerator.prepare(parts.model, parts.optimizer)
    loader = parts.loader
    if not isinstance(loader, list):  # ready batches are iterated as they are
        loader = accelerator.prepare(loader)

    def fit() -> None:
        model.train()
        for _ in range(parts.epochs):
            for x, y in loader:
                with accelerator.accumulate(model) if parts.accumulate > 1 else AT_ONCE:
                    accelerator.backward(F.cross_entropy(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()

    return fit


def fabric(parts: Parts) -> Fit:
    """Return Fabric's loop; on one device it has no gradient exchange to hold back."""
    from lightning.fabric import Fabric

    runner = Fabric(accelerator="cpu", devices=1)
    model, optimizer = runner.setup(parts.model, parts.optimizer)
    loader = parts.loader
    if not isinstance(loader, list):
        loader = runner.setup_dataloaders(loader)

    def fit() -> None:
        model.train()
        for _ in range(parts.epochs):
            for number, (x, y) in enumerate(loader, start=1):
                loss = F.cross_entropy(model(x), y)
                if parts.accumulate > 1:
                    loss = loss / parts.accumulate
                runner.backward(loss)
                if number % parts.accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()

    return fit


def lightning(parts: Parts) -> Fit:
    """Return Lightning's Trainer in its `barebones` mode, made to show what the Trainer costs."""
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = parts.model

        def training_step(self, batch: Any, _number: int) -> torch.Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return parts.optimizer

    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=parts.epochs,
        accumulate_grad_batches=parts.accumulate,
        barebones=True,
    )
    module, loader = Module(), parts.loader
    if isinstance(loader, list):
        loader = Ready(loader)
    return lambda: trainer.fit(module, loader)


class Ready(list):  # type: ignore[type-arg]
    """Ready batches as one loader; a plain list is several loaders to Lightning."""


def hf_trainer(parts: Parts) -> Fit:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class OurTrainer(Trainer):
        def get_train_dataloader(self) -> Any:
            return parts.loader

        def compute_loss(self, model: nn.Module, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
            x, y = inputs
            return F.cross_entropy(model(x), y)

    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written
        use_cpu=True,
        seed=loops.SEED,
        per_device_train_batch_size=loops.BASE,
        num_train_epochs=parts.epochs,
        gradient_accumulation_steps=parts.accumulate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = OurTrainer(parts.model, arguments, optimizers=(parts.optimizer, None))
    trainer.remove_callback(PrinterCallback)
    return trainer.train


def ignite(parts: Parts) -> Fit:
    from ignite.engine import create_supervised_trainer

    engine = create_supervised_trainer(
        parts.model,
        parts.optimizer,
        F.cross_entropy,
        output_transform=lambda _x, _y, _predicted, _loss: None,  # its default reads the loss
        gradient_accumulation_steps=parts.accumulate,
    )
    return lambda: engine.run(parts.loader, max_epochs=parts.epochs)


def skorch(parts: Parts) -> Fit:
    """Return skorch without callbacks; accumulation as its FAQ has it."""
    from skorch import NeuralNet

    class Net(NeuralNet):
        def get_iterator(self, *_: Any, **__: Any) -> Any:
            return parts.loader

    class Accumulating(Net):
        def get_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().get_loss(*args, **kwargs) / parts.accumulate

        def train_step(self, batch: Any, **fit_params: Any) -> Any:
            number = len(self.history[-1, "batches"])
            step = self.train_step_single(batch, **fit_params)
            if number % parts.accumulate == 0:
                self.optimizer_.step()
                self.optimizer_.zero_grad()
            return step

    net = (Accumulating if parts.accumulate > 1 else Net)(
        parts.model,
        criterion=nn.CrossEntropyLoss,
        optimizer=lambda *_, **__: parts.optimizer,
        max_epochs=parts.epochs,
        train_split=None,
        callbacks="disable",
    ).initialize()
    samples = getattr(parts.loader, "dataset", None) or [None]  # get_iterator does not ask
    return lambda: net.partial_fit(samples)


def fastai(parts: Parts) -> Fit:
    """Return a fastai Learner with the callback that trains, and no other."""
    from fastai.callback.core import TrainEvalCallback
    from fastai.callback.training import GradientAccumulation
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    from fastai.torch_core import default_device

    default_device(use=False)  # the CPU
    waits = [GradientAccumulation(n_acc=parts.accumulate * loops.BASE)]  # in samples
    learner = Learner(
        DataLoaders(parts.loader, []),
        parts.model,
        loss_func=F.cross_entropy,
        opt_func=OptimWrapper(opt=parts.optimizer),
        lr=parts.optimizer.defaults["lr"],
        default_cbs=False,
        cbs=[TrainEvalCallback(), *(waits if parts.accumulate > 1 else [])],
    )
    return lambda: learner.fit(parts.epochs)


PEERS = {
    "Accelerate": Peer(accelerate, ("accelerate",), ("accelerate",)),
    "Fabric": Peer(fabric, ("lightning.fabric",), ("lightning",)),
    "Lightning": Peer(lightning, ("lightning.pytorch",), ("lightning",)),
    "HF Trainer": Peer(
        hf_trainer, ("accelerate", "transformers.trainer"), ("transformers", "accelerate")
    ),
    "Ignite": Peer(ignite, ("ignite.engine",), ("pytorch-ignite",)),
    "skorch": Peer(skorch, ("skorch",), ("skorch",)),
    "fastai": Peer(fastai, ("fastai.callback.training",), ("fastai",)),
}


def installed(peers: Mapping[str, Peer]) -> tuple[dict[str, Loop], dict[str, str], str]:
    """Import the peers' modules.

    Returns:
        The loops of those that are there, the reason of each that is not, and the versions.
    """
    there: dict[str, Loop] = {}
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    for name, peer in peers.items():
        try:
            for module in peer.modules:
                importlib.import_module(module)
        except ModuleNotFoundError as error:
            missing[name] = f"not installed ({error})"
        except Exception as error:  # noqa: BLE001 - what breaks in a peer is said
            missing[name] = f"cannot be imported ({said(error)})"
        else:
            there[name] = peer.loop
            versions |= {each: importlib.metadata.version(each) for each in peer.distributions}
    return there, missing, ", ".join(f"{name} {version}" for name, version in versions.items())


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
