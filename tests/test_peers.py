"""The peers benchmark compares weights, takes turns, and names what it left out."""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import importlib.util
import json

import pytest
import torch
from torch import nn

from benchmarks import loops, measure, peer_loops, peers

READY, LOADER = (
    dataclasses.replace(loops.WORKS[number], counted=False, accumulate=2) for number in (0, 2)
)


@pytest.fixture(autouse=True)
def _short_collections():
    """Each turn collects garbage first: not all that pytest holds."""
    gc.freeze()
    yield
    gc.unfreeze()


def careless(parts):
    """A loop that forgets to accumulate."""
    return peer_loops.by_hand(dataclasses.replace(parts, accumulate=1))


def broken(parts):
    raise RuntimeError("no such option\nand more")


def diverged(parts):
    def fit():
        with torch.no_grad():
            for parameter in parts.model.parameters():
                parameter.fill_(float("nan"))

    return fit


@pytest.mark.parametrize("work", [READY, LOADER], ids=["ready", "loader"])
def test_ours_ends_in_the_weights_of_the_loop_by_hand_and_one_that_does_not_is_told(work):
    others = {"careful": peer_loops.by_hand, "careless": careless, "diverged": diverged}
    rows, failed = peers.measure_work(work, peers.OWN | others, 1, 16)
    found = {row["loop"]: row for row in rows}
    assert failed == {}
    for name in (*peers.OWN, "careful"):
        assert found[name]["differs_by"] == found[name]["with_generator_differs_by"] == 0
    assert found["careless"]["differs_by"] > 1e-4
    page = peers.page_of(rows, peers.goals_of(rows, [work]), {}, {"command": ""})
    assert page.count("**differ by ") == 4  # two loops, two loaders
    assert "**differ by nan**" in page


def test_every_loop_takes_its_turn_in_a_rotating_order_and_starts_alike():
    order, drawn = [], set()

    def noted(name):
        def loop(parts):
            torch.rand(len(name))  # building a loop may draw
            torch.set_num_threads(2)

            def fit():
                length = len(parts.loader) * parts.epochs
                order.append(name if length > 2 else name.lower())
                drawn.add((torch.rand(1).item(), torch.get_num_threads()))

            return fit

        return loop

    contestants = {peers.BY_HAND: noted("A"), "other": noted("B"), "third": noted("C")}
    peers.measure_work(READY, contestants, 3, 16)
    assert "".join(order) == "ABC" + "ABCabc" + "BCabcA" + "CabcAB"
    assert len(drawn) == 1
    assert drawn.pop()[1] == 1  # thread


def test_counts_are_those_of_one_step():
    def four_calls_and_a_read(parts):
        def leaf():
            pass

        def fit():
            for _ in range(len(parts.loader) // parts.accumulate):
                [leaf() for _ in range(4)]  # a comprehension may be a call of its own
                torch.ones(()).item()

        return fit

    found = peers.counts(dataclasses.replace(READY, counted=True), four_calls_and_a_read)
    assert found["calls_per_step"] in (4, 5)
    assert found["host_reads_per_step"] == 1


def test_a_peer_that_is_missing_or_breaks_is_named_and_the_others_go_on(
    monkeypatch, tmp_path, capsys
):
    module = "a_framework_that_is_not_there"
    fakes = {
        "Absent": peer_loops.Peer(careless, (module,), (module,)),
        "Broken": peer_loops.Peer(broken, ("torch",), ("torch",)),
        "Sound": peer_loops.Peer(peer_loops.by_hand, ("torch",), ("torch",)),
    }
    monkeypatch.setattr(peers, "PEERS", fakes)
    monkeypatch.setattr(peers, "WORKS", [READY])
    saved = tmp_path / "peers.json"
    with_flags = ["--steps", "16", "--blocks", "1", "--json", str(saved)]
    peers.main(with_flags)
    page, found = capsys.readouterr().out, json.loads(saved.read_text())
    assert f"Left out: Absent: not installed (No module named '{module}')." in page
    assert "failed (RuntimeError: no such option)." in page
    assert [row["loop"] for row in found["rows"]] == [*peers.OWN, "Sound"]
    best = {line["measure"]: line["best_other"] for line in found["goals"]}
    assert best["cpu_ratio"]["loop"] == "Sound"
    assert found["environment"]["peers"] == f"torch {importlib.metadata.version('torch')}"
    assert found["environment"]["command"] == "python -m benchmarks.peers --blocks 1 --steps 16"
    assert saved.with_suffix(".md").read_text().strip() == page.strip()
    assert str(tmp_path) not in page


def test_a_goal_is_met_by_all_of_the_interval_and_set_beside_the_best_of_the_others():
    def row(loop, *ratio):
        found = {"cpu_ratio": measure.Interval(*ratio, 7), "differs_by": 0.0}
        found |= {"shown_to_ours": None, "calls_per_step": None}
        return {"work": READY.name, "loop": loop} | found

    def ratio_goal(*ours):
        others = [row("one", 1.3, 1.2, 1.4), row("two", 1.2, 1.1, 1.3)]
        own = [row(peers.BY_HAND, 1, 1, 1), row(peers.OURS, *ours), row(peers.SHOWN, *ours)]
        lines = peers.goals_of([*own, *others], [READY])
        return next(line for line in lines if line["measure"] == "cpu_ratio")

    assert READY.ratio_goal == 1.1
    assert ratio_goal(1.05, 1.0, 1.1)["met"] is True
    assert ratio_goal(1.05, 1.0, 1.2)["met"] is None
    assert ratio_goal(1.3, 1.2, 1.4)["met"] is False
    assert ratio_goal(1.05, 1.0, 1.1)["best_other"]["loop"] == "two"


def test_a_break_of_our_own_loop_ends_the_benchmark():
    with pytest.raises(RuntimeError, match="no such option"):
        peers.measure_work(READY, peers.OWN | {peers.OURS: broken}, 1, 16)


def test_an_unknown_peer_is_refused_with_the_names_that_there_are(capsys):
    with pytest.raises(SystemExit):
        peers.main(["--peer", "Fabrik"])
    assert "Fabric" in capsys.readouterr().err


def test_models_are_equal_bit_by_bit_or_not():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.load_state_dict(one.state_dict())
    assert peers.apart(one, two) == 0.0
    with torch.no_grad():
        two.bias[1] += 0.5
    assert peers.apart(one, two) == pytest.approx(0.5)


@pytest.mark.parametrize("name", peer_loops.PEERS)
@pytest.mark.parametrize("work", [READY, LOADER], ids=["ready", "loader"])
def test_a_peer_that_is_installed_trains_to_the_weights_of_the_loop_by_hand(name, work):
    absent = [
        module
        for module in peer_loops.PEERS[name].modules
        if importlib.util.find_spec(module.partition(".")[0]) is None
    ]
    if absent:
        pytest.skip(f"{absent[0]} is not installed")
    for accumulate in (1, 2):
        sized = dataclasses.replace(work, accumulate=accumulate)
        models = []
        for loop in (peer_loops.by_hand, peer_loops.PEERS[name].loop):
            parts = peers.fresh(sized, 8, epochs=2)
            peers.ready(loop, parts)()
            models.append(parts.model)
        assert peers.apart(*models) == 0.0
