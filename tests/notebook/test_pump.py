"""The pump against a real kernel: everything answered, in order, and no interrupt lost."""

import random
import signal
import threading
import time

import pytest
from kernel_client import parent, printed, state

from hybrid_magic.notebook.pump import Pump, interrupts_held

SETUP = """
import time, ipywidgets
from hybrid_magic.notebook.pump import Pump
slider, got, order = ipywidgets.FloatSlider(max=1e9), [], []
slider.observe(lambda change: got.append(change["new"]), "value")

def train(seconds):
    pump, began, steps = Pump(every_s=0.0), time.monotonic(), 0
    order.append("train")
    while time.monotonic() - began < seconds:
        time.sleep(0.001) if steps % 2 else sum(range(2000))
        steps += 1
        pump()
    order.append("end")
    print("trained", pump.why, pump.handled, pump.held)

print(slider.model_id)
"""


@pytest.fixture
def slider(front_end):
    return front_end.text(SETUP).split()[-1]


def test_a_slider_moves_while_the_cell_runs_and_queued_cells_run_after_it(front_end, slider):
    chance = random.Random(1)
    running, queued, moved = front_end.send("train(3)"), [], []
    end = time.monotonic() + 2.2
    while time.monotonic() < end:
        time.sleep(chance.random() * 0.02)
        if chance.random() < 0.2:
            queued.append(
                front_end.send(f"order.append({len(queued)}); print('cell {len(queued)}')")
            )
        else:
            moved.append(front_end.move(slider, float(len(moved) + 1)))
    in_order = f"order == ['train', 'end', *range({len(queued)})]"
    asked = front_end.send(f"print(got == sorted(got), len(got), {in_order})")
    seen = front_end.until_idle(asked)

    assert printed(seen, asked).split() == ["True", str(len(moved)), "True"]
    trained = printed(seen, running).split()
    assert trained[:2] == ["trained", "None"]
    idle = {parent(message) for message in seen if state(message) == "idle"}
    assert idle >= {*moved, *queued}
    assert set(front_end.replies([running, *queued]).values()) == {"ok"}
    for number, cell in enumerate(queued):
        assert printed(seen, cell) == f"cell {number}\n"


def test_interrupts_amid_a_flood_of_messages_are_all_clean_and_the_kernel_lives(front_end, slider):
    chance, rounds, clean = random.Random(2), 8, 0
    for _ in range(rounds):
        running, queued = front_end.send("train(30)"), []
        time.sleep(0.1 + 0.1 * chance.random())
        for _ in range(chance.randrange(40)):
            time.sleep(0.002 * chance.random())
            if chance.random() < 0.15:
                queued.append(front_end.send("1"))
            else:
                front_end.move(slider, chance.random())
        front_end.manager.interrupt_kernel()
        seen = front_end.until_idle(running)
        clean += [m["content"]["ename"] for m in seen if m["msg_type"] == "error"] == [
            "KeyboardInterrupt"
        ]
        assert "no reply" not in front_end.replies([running, *queued]).values()
        time.sleep(0.2)  # the kernel aborts what was queued for a tenth of a second
    assert clean == rounds
    assert front_end.text("print('alive')") == "alive\n"


def test_no_cell_that_was_queued_runs_after_an_interrupt(front_end, slider):
    for _ in range(6):
        running = front_end.send("train(30)")
        queued = [front_end.send("order.append('queued')") for _ in range(3)]
        time.sleep(0.5)  # they have been read, and put back
        front_end.manager.interrupt_kernel()
        front_end.until_idle(running)
        found = front_end.replies([running, *queued])
        assert [found[running], *(found[one] for one in queued)] == ["error"] + ["aborted"] * 3
        time.sleep(0.2)  # the kernel aborts what was queued for a tenth of a second
    assert front_end.text("print('queued' in order)") == "False\n"


def test_a_callback_that_fails_prints_or_pumps_again_does_not_end_the_run(front_end, slider):
    front_end.run(
        "def bad(change):\n    Pump(every_s=0.0)()\n    print('called')\n    1 / 0\n"
        "slider.observe(bad, 'value')"
    )
    running = front_end.send("train(1.5)")
    time.sleep(0.4)
    moved = [front_end.move(slider, value) for value in (5.0, 6.0)]
    seen = front_end.until_idle(running)
    assert "trained None" in printed(seen, running)
    assert all(
        "called" in printed(seen, one) or "called" in printed(seen, running) for one in moved
    )
    assert front_end.text("print(got)") == "[5.0, 6.0]\n"


def test_a_kernel_that_is_not_as_expected_is_said_and_never_pumped():
    pump = Pump(kernel=object())
    assert "live controls are off, training is not affected" in pump.why
    began = time.perf_counter()
    for _ in range(1000):
        pump()
    assert time.perf_counter() - began < 0.1  # a thousand calls; one costs well under a microsecond


def test_without_a_kernel_the_pump_says_so():
    assert "there is no kernel here" in Pump().why


def interrupt_inside(times, reached):
    with interrupts_held():
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        reached.append("the end of the block")


def test_an_interrupt_waits_for_the_end_of_the_block_and_the_next_one_does_not():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_inside(1, reached)
    assert reached == ["the end of the block"]
    with pytest.raises(KeyboardInterrupt):
        interrupt_inside(2, reached)
    assert reached == ["the end of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_held_interrupt_goes_to_the_handler_that_the_run_had_set():
    noted = []
    before = signal.signal(signal.SIGINT, lambda *_: noted.append("asked"))
    try:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            assert noted == []
        assert noted == ["asked"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_off_the_main_thread_nothing_is_touched():
    before, found = signal.getsignal(signal.SIGINT), []

    def block():
        with interrupts_held():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert found == [before]
