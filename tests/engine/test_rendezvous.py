"""Processes that torchrun starts again find each other, and not those before them."""

import datetime as dt
import threading
import time

import pytest
import torch.distributed as dist

from hybrid_magic import HybridMagicError
from hybrid_magic.engine.rendezvous import agreed_name

SIZE = 3


def meeting(store, late=(), size=SIZE):
    """Return the names that `size` processes agree on; the `late` ones come after the rest."""
    found = [""] * size

    def come(rank):
        time.sleep(0.3 * (rank in late))
        found[rank] = agreed_name(store, rank, size)

    coming = [threading.Thread(target=come, args=(rank,), daemon=True) for rank in range(size)]
    for each in coming:
        each.start()
    for each in coming:
        each.join(20)
    return found


@pytest.mark.parametrize("late", [(), (0,), (1, 2), (0, 2)])
def test_started_again_they_agree_on_a_new_name_whoever_comes_first(late):
    store = dist.HashStore()
    before = meeting(store)
    again = meeting(store, late)
    assert len({*before}) == len({*again}) == 1
    assert "" not in before
    assert before[0] != again[0]


def test_those_that_ended_while_they_met_are_not_taken_for_living_ones():
    store = dist.HashStore()
    store.set_timeout(dt.timedelta(seconds=0.2))
    for rank in (1, 0, 2):  # one after the other: nobody meets anybody
        with pytest.raises(HybridMagicError, match="did not come; wanted all"):
            agreed_name(store, rank, SIZE)
    store.set_timeout(dt.timedelta(seconds=20))
    assert len({*meeting(store, (0,))}) == 1


@pytest.mark.slow
def test_a_store_over_the_network_will_do():
    served = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    clients = [dist.TCPStore("localhost", served.port, is_master=False) for _ in range(SIZE)]
    for _ in range(2):
        found = [""] * SIZE

        def come(rank, found=found):
            found[rank] = agreed_name(clients[rank], rank, SIZE)

        coming = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1, 0)]
        for each in coming:
            each.start()
            time.sleep(0.1)
        for each in coming:
            each.join(20)
        assert len({*found}) == 1
        assert found[0]
