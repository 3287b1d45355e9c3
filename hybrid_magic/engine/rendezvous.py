"""Where the processes of a run find each other: a store for each time that torchrun starts them.

Started again, they are given the store of those before, with the addresses of processes that have
ended in it, and who reads them too early is refused (pytorch#135712, #167288). How often each was
started is not the same on all machines. So the first process calls, and keeps to those who answer.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import torch.distributed as dist

from ..errors import HybridMagicError

_CALL = "hybrid_magic/call"
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.01, 0.5  # between two looks: a store may serve a thousand


def fresh_store() -> tuple[dist.Store, int, int]:
    """Return a store that these processes alone have written to, this one's number, and how many
    they are.

    Raises:
        HybridMagicError: some of them did not come.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    return dist.PrefixStore(agreed_name(store, rank, size), store), rank, size


def agreed_name(store: dist.Store, rank: int, size: int) -> str:
    """Return a name that the living processes agree on, whatever `store` holds of others.

    The first one writes a name, everyone answers with it and a name of its own, and goes on when
    the first one has repeated just that.
    """
    limit: Any = store  # torch tells of its `timeout` to no type checker
    own, end = uuid.uuid4().hex, time.monotonic() + limit.timeout.total_seconds()
    if rank > 0:
        return _answered(store, rank, own, end)
    store.set(_CALL, own)
    answers = [_answer_to(own, store, other, end) for other in range(1, size)]
    for other, answer in enumerate(answers, 1):
        store.set(f"{_CALL}/seen/{other}", answer)
    return own


def _answer_to(name: str, store: dist.Store, other: int, end: float) -> str:
    """Return what process `other` has answered to the call of `name`."""
    key, wait = f"{_CALL}/answer/{other}", _FIRST_WAIT_S
    while True:
        answer = _read(store, key)
        if answer.startswith(name):
            return answer
        wait = _pause(wait, end, f"process {other}")


def _answered(store: dist.Store, rank: int, own: str, end: float) -> str:
    """Return the name that the first process calls when it has seen the answer to it."""
    answer, wait = "", _FIRST_WAIT_S
    while True:
        name = _read(store, _CALL)
        if name and answer != name + own:
            answer, wait = name + own, _FIRST_WAIT_S
            store.set(f"{_CALL}/answer/{rank}", answer)
        if name and _read(store, f"{_CALL}/seen/{rank}") == answer:
            return name
        wait = _pause(wait, end, "the first process")


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(wait: float, end: float, who: str) -> float:
    """Wait so many seconds; return how long to wait the next time."""
    if time.monotonic() > end:
        raise HybridMagicError(
            f"{who} of this run did not come; wanted all that torchrun has started; look at their "
            "own errors"
        )
    time.sleep(wait)
    return min(2 * wait, _LONGEST_WAIT_S)
