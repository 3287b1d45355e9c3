"""Several processes that train one model: who they are, and what they tell each other.

They are torchrun's, or those that `--processes` started; each trains its share of every step. What
is small goes over gloo on the host, gradients over the device's own backend. What one process may
find differently (a clock, a size that ran out of memory, a request of the person's) is decided in
`meet`, once a step, before the gradients are summed. Knows no step and no data.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import HybridMagicError
from .control import ACTIONS, SETTINGS, RunControl
from .randomness import seed_everything
from .rendezvous import fresh_store

_ASKED = (*SETTINGS, *ACTIONS)
_MOST_MAIL = 8  # requests handed on in one step; the others wait


class PeerLost(HybridMagicError):  # noqa: N818 - it is a word, not a kind of mistake
    """Another process of the run has ended or failed; its own error says why."""


@dataclass(slots=True)
class Wishes:
    """What this process would have all do after the step; only the first one's clocks count."""

    interrupted: Callable[[], bool] = lambda: False
    over: Callable[[], bool] = lambda: False  # --minutes
    due: Callable[[], bool] = lambda: False  # a checkpoint


@dataclass(slots=True)
class Agreed:
    """What all have agreed on in the newest meeting. `ended`: and this process has come to it."""

    interrupted: bool = False
    over: bool = False
    due: bool = False
    ended: bool = False

    def come_to_interrupt(self) -> bool:
        """Return whether the run is interrupted, at the same step in every process."""
        self.ended = self.interrupted
        return self.ended


class Ranks:
    """This process, number `rank` of `size`.

    `waiting`: the `time.monotonic()` at which it began to wait for the others, None while it does
    not. `broken`: one of them is gone, or this one has left: nothing is told any more.
    """

    def __init__(self) -> None:
        self.local_rank = int(os.environ["LOCAL_RANK"])
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        if not dist.is_initialized():
            store, rank, size = fresh_store()
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
            atexit.register(_leave_group)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.waiting: float | None = None
        self.broken = False
        self.least = self.size  # samples of a micro-batch over all processes
        self.salt = 0  # of this epoch: what other processes than the first draw from
        self.agreed = Agreed()
        self.wishes = Wishes()
        self.control = _Handed(self)
        self.asked: RunControl | None = None  # the person's, of the first process
        gloo = "gloo" in str(dist.get_backend_config())
        self._host: Any = dist.group.WORLD if gloo else dist.new_group(backend="gloo")

    @property
    def first(self) -> bool:
        """Whether this process is the one that records, saves and is listened to."""
        return self.rank == 0

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Wait for the others; where one is gone nothing is told any more.

        Raises:
            PeerLost: one of them is gone.
        """
        if self.broken:
            raise PeerLost(_GONE)
        self.waiting = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            self.broken = True
            raise PeerLost(f"{_GONE} ({str(error).strip().splitlines()[-1][:120]})") from None
        finally:
            self.waiting = None

    def leave(self) -> None:
        """Tell nothing and wait for nobody any more."""
        self.broken = True

    def hear(self, control: RunControl | None) -> RunControl:
        """Return what a run obeys: what `control` is asked for in the first process, in each."""
        self.asked = control
        return self.control

    # -- small things, on the host --

    def gather(self, row: Sequence[float]) -> list[list[float]]:
        """Return the row of each process; all are as long."""
        mine = torch.tensor(row, dtype=torch.float64, device="cpu")
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._waiting():
            dist.all_gather(found, mine, group=self._host)
        return [each.tolist() for each in found]

    def most(self, row: Sequence[float]) -> list[float]:
        """Return the largest value at each place of the rows of all processes."""
        mine = torch.tensor(row, dtype=torch.float64, device="cpu")
        with self._waiting():
            dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._host)
        return mine.tolist()

    def of_all(self, value: Any) -> list[Any]:
        """Return the value of each process."""
        found: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(found, value, group=self._host)
        return found

    def of_first(self, value: Any) -> Any:
        """Return the first process's value."""
        held = [value if self.first else None]
        with self._waiting():
            dist.broadcast_object_list(held, src=0, group=self._host)
        return held[0]

    # -- once a step --

    def meet(self, row: Sequence[float]) -> list[list[float]]:
        """Tell `row` of this process's share of a step, learn everyone's, and agree on the rest."""
        mail = self._mail()
        wishes = [float(wish()) for wish in (self.wishes.interrupted, self._over, self._due)]
        rows = self.gather([*row, *wishes, *mail])
        head = len(row)
        interrupted, over, due = (any(each[head + n] for each in rows) for n in range(3))
        self.agreed = Agreed(interrupted, over, due)
        self.control.hand(rows[0][head + 3 :])
        return [each[:head] for each in rows]

    def _over(self) -> bool:
        return self.first and self.wishes.over()

    def _due(self) -> bool:
        return self.first and self.wishes.due()

    def _mail(self) -> list[float]:
        """Return what the person asks for, as numbers: pairs of a name and a value."""
        found: list[float] = []
        asked = self.asked
        if asked is not None:
            if asked.poll is not None:
                asked.poll()
            while asked.mail and len(found) < 2 * _MOST_MAIL:
                name, value = asked.mail.popleft()
                found += (_ASKED.index(name), math.nan if value is None else value)
        return found + [-1.0, 0.0] * (_MOST_MAIL - len(found) // 2)

    # -- tensors, where they are --

    def add_up(self, tensor: Tensor) -> Any:
        """Begin to add up the `tensor` of all processes in its place; `done` waits for it."""
        with self._waiting():
            return dist.all_reduce(tensor, async_op=True)

    def done(self, work: Any) -> None:
        """Wait for what `add_up` has begun."""
        with self._waiting():
            work.wait()

    def take_first(self, tensor: Tensor) -> None:
        """Write the first process's `tensor` into everyone's, by way of the host: before a run
        all of them may be on the same GPU."""
        value = tensor.detach().cpu().contiguous()
        with self._waiting():
            dist.broadcast(value, src=0, group=self._host)
        if not self.first:
            tensor.copy_(value)

    # -- random numbers --

    def draw_apart(self, *number: int) -> None:
        """Have another process than the first draw its own random numbers from here on, the same
        ones whenever it stands at `number` of this epoch."""
        if self.first:
            return
        seed_everything(zlib.crc32(repr((self.salt, self.rank, number)).encode()))


_GONE = "another process of this run is gone; its own error says why"


class _Handed(RunControl):
    """What the person asks of the first process, handed to every one in the same step."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(self._look)
        self._ranks, self._fresh = ranks, False

    def hand(self, mail: Sequence[float]) -> None:
        """Take in what came with a meeting."""
        self._fresh = True
        for name, value in zip(mail[::2], mail[1::2], strict=True):
            if name >= 0:
                self.mail.append((_ASKED[int(name)], None if math.isnan(value) else value))

    def _look(self) -> None:
        """After a step there is nothing new; in a pause, which has no steps, they meet here."""
        if not self._fresh:
            self.hand(self._ranks.of_first(self._ranks._mail()))
        self._fresh = False


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


_here: Ranks | None = None  # None: this process trains alone


def current() -> Ranks | None:
    """Return this process among those that train together, None where it trains alone."""
    return _here


def count() -> int:
    """Return how many processes train together, 1 where this one trains alone."""
    return 1 if _here is None else _here.size


def join() -> Ranks | None:
    """Return this process among those that torchrun has started, None where it trains alone."""
    global _here
    started = "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if _here is None and started and dist.is_available():
        _here = Ranks()
    return _here


def device_of(asked: str | None) -> str | None:
    """Return the device that this process trains on: `asked`, or its own of several GPUs.

    Raises:
        HybridMagicError: fewer GPUs than processes, or one of them is named.
    """
    kind = asked or "cuda"
    if _here is None or not kind.startswith("cuda") or not torch.cuda.is_available():
        return asked
    n = torch.cuda.device_count()
    if kind != "cuda" or _here.local_rank >= n:
        raise HybridMagicError(
            f"{_here.size} processes are to train on {kind}, and there are {n} GPUs; wanted one "
            "GPU each; leave --device out and use as many processes as GPUs, or --device cpu"
        )
    return f"cuda:{_here.local_rank}"
