"""The calculation of many devices: by hand, at its limits, and in its order; its small end runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import scale, scale_model, scale_ranks
from benchmarks.scale_model import DEVICES, Asked, Cluster, Link, Work
from hybrid_magic.policy import growth

ROOT = pathlib.Path(__file__).parent.parent
FAST, SLOW = Link("fast", 1e-6, 100e9), Link("slow", 10e-6, 10e9)
FREE = Link("free", 0.0, math.inf)
CLUSTER, NOTHING = Cluster(FAST, SLOW, 8), Cluster(FREE, FREE, 8)
WORK = Work(
    name="work",
    points=((10, 0.02), (100, 0.11)),  # 10 ms and 1 ms a sample
    micro=100,
    optimizer_s=0.002,
    gradient_bytes=100_000_000,
    base=100,
    noise=1000.0,
)
USUAL, ALONE = Asked(0.9, 1600), Asked(0.0, None)
clusters = st.builds(
    Cluster,
    *[st.builds(Link, st.just("a link"), st.floats(0, 1e-3), st.floats(1e8, 1e12))] * 2,
    per_machine=st.sampled_from([1, 2, 8]),
    algorithm=st.sampled_from(["ring", "tree"]),
)


def test_a_ring_and_a_tree_by_hand():
    assert scale_model.ring(SLOW, 4, 1e8) == pytest.approx(6 * (10e-6 + 25e6 / 10e9))
    # depth 3 (8 ends), 10 ms of bytes: sqrt(2 x 0.01 / 1e-5) = 44.7, so 45 pieces in 47 messages
    assert scale_model.tree(SLOW, 8, 1e8) == pytest.approx(2 * 47 * (10e-6 + 0.01 / 45))


def test_a_step_by_hand():
    """16 devices in 2 machines, 20 samples each: 30 ms and 2 ms; 10 buckets of 10 MB."""
    within = 14 * (1e-6 + 10e6 / 8 / 100e9)
    between = 2 * (10e-6 + 10e6 / 2 / 10e9)
    each = within + between  # 1.209 ms
    one = scale_model.step(WORK, CLUSTER, 16, 320, 10_000_000)
    assert one.compute_s == pytest.approx(0.032)
    assert one.communication_s == pytest.approx(10 * each)
    assert one.exposed_s == pytest.approx(each)  # the backward's 20 ms hide the rest
    bare = scale_model.step(WORK, CLUSTER, 16, 320, None)
    assert bare.exposed_s == pytest.approx(bare.communication_s)
    assert bare.step_s == pytest.approx(0.032 + 14 * (1e-6 + 125e-6) + 2 * (10e-6 + 5e-3))


def test_what_the_backward_cannot_hide_by_hand():
    """As before with ten times the bytes: 10 buckets of 11.8 ms; the last 18 of 20 ms hide some."""
    work = dataclasses.replace(WORK, gradient_bytes=1_000_000_000)
    one = scale_model.step(work, CLUSTER, 16, 320, 100_000_000)
    each = 14 * (1e-6 + 12.5e6 / 100e9) + 2 * (10e-6 + 50e6 / 10e9)
    assert one.exposed_s == pytest.approx(10 * each - 0.018)
    assert one.exposed_ratio == pytest.approx(one.exposed_s / (0.032 + one.exposed_s))


def test_the_fullest_device_counts_and_cuts_its_share_evenly():
    one = scale_model.step(WORK, NOTHING, 4, 4 * 250 + 1, None)  # 251 samples: 84 + 84 + 83
    assert one.accumulation == 3
    assert one.compute_s == pytest.approx(3 * 0.01 + 0.251 + 0.002)
    with pytest.raises(ValueError, match="batch=3 on devices=4; wanted a sample each"):
        scale_model.step(WORK, NOTHING, 4, 3, None)


def test_gradients_travel_once_a_step_however_it_is_cut():
    once, thrice = (scale_model.step(WORK, CLUSTER, 8, 800 * k, None) for k in (1, 3))
    assert (once.accumulation, thrice.accumulation) == (1, 3)
    assert thrice.communication_s == once.communication_s


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 50))
def test_buckets_end_when_they_do_one_after_another(backward_s, each_s, count):
    done = 0.0
    for number in range(1, count + 1):
        done = max(done, backward_s * number / count) + each_s
    late = scale_model.exposed(backward_s, each_s, count)
    assert late == pytest.approx(done - backward_s, abs=1e-9)


def test_without_communication_a_full_device_more_is_a_device_s_throughput_more():
    one = scale_model.step(WORK, NOTHING, 1, 100, None)
    for n in DEVICES:
        some = scale_model.step(WORK, NOTHING, n, 100 * n, None)
        assert some.batch / some.step_s == pytest.approx(n * one.batch / one.step_s)


def test_with_infinite_noise_goodput_is_throughput():
    work = dataclasses.replace(WORK, noise=1e18)
    for n in DEVICES:
        one = scale_model.step(work, CLUSTER, n, 100 * n, None)
        assert scale_model.goodput(work, one) == pytest.approx(one.batch / one.step_s)


def test_without_noise_more_samples_teach_nothing():
    work = dataclasses.replace(WORK, noise=0.0)
    assert all(scale_model.chosen(work, CLUSTER, n, ALONE).batch == 100 for n in (1, 2, 4, 8))


@pytest.mark.parametrize("n", [2, 8, 64, 1024])
def test_with_no_bytes_to_send_only_messages_cost(n):
    assert scale_model.ring(SLOW, n, 0) == pytest.approx(2 * (n - 1) * 10e-6)
    assert scale_model.tree(SLOW, n, 0) == pytest.approx(2 * math.log2(n) * 10e-6)


def test_with_no_latency_ring_and_tree_send_every_byte_about_twice():
    free = Link("free", 0.0, 10e9)
    assert scale_model.ring(free, 1024, 1e8) == pytest.approx(0.02, rel=1e-3)
    assert scale_model.tree(free, 1024, 1e8) == pytest.approx(0.02)


@given(clusters, st.floats(0, 1e9), st.floats(1, 4))
def test_more_bytes_more_devices_and_no_overlap_never_take_less(cluster, size, times):
    taken = [scale_model.all_reduce(cluster, n, size) for n in DEVICES]
    assert taken[0] == 0.0
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(taken))
    for n in (2, 64):
        more = scale_model.all_reduce(cluster, n, times * size)
        assert more >= scale_model.all_reduce(cluster, n, size) * (1 - 1e-9)
        whole, hidden = (
            scale_model.step(WORK, cluster, n, 100 * n, how) for how in (None, WORK.gradient_bytes)
        )
        assert hidden.step_s == pytest.approx(whole.step_s)  # one bucket is ready at the end


def test_the_policy_keeps_its_rules_and_comes_close_to_the_best():
    for n in DEVICES[:8]:
        one = scale_model.chosen(WORK, CLUSTER, n, USUAL)
        assert 100 <= one.batch <= growth.largest_efficient(100, 1000.0, 0.9)
        top = scale_model.best(WORK, CLUSTER, n, USUAL)
        assert 0.9 < scale_model.goodput(WORK, one) / scale_model.goodput(WORK, top) <= 1.01
    assert scale_model.chosen(WORK, CLUSTER, 256, USUAL) is None  # its ceiling is 222 samples
    assert scale_model.chosen(WORK, CLUSTER, 256, ALONE).batch >= 256


def test_a_row_holds_what_its_step_comes_to():
    one = scale_model.step(WORK, NOTHING, 2, 200, None)
    row = scale_model.row(WORK, one)
    assert row["efficiency"] == pytest.approx(1100 / 1200)
    assert row["lr_factor"] == pytest.approx(2 * 1100 / 1200)
    assert row["samples_per_second"] == pytest.approx(200 / 0.112)
    assert row["goodput"] == pytest.approx(200 / 0.112 * 1100 / 1200)
    adam = dataclasses.replace(WORK, family="adam")
    assert scale_model.row(adam, one)["lr_factor"] == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("goodputs", "most"),
    [((1, 2, 4, 5), 4), ((1, 1.4), 1), ((1, 2, None, None), 2), ((1, 1.5, 2.25), 4)],
)
def test_it_pays_while_every_doubling_gives_half_of_what_it_could(goodputs, most):
    assert scale_model.pays_to(goodputs) == most


def test_slow_links_are_told_and_accumulation_helps_on_them():
    slow = Cluster(FAST, Link("slow", 1e-5, 1e8), 8)
    work = dataclasses.replace(WORK, noise=3e4)
    found = scale_model.verdict(work, slow, Asked(0.9, 1600, None))
    assert found["half_at"] == 16  # the first that leaves the machine
    steps, gain = found["accumulation"][16]
    assert steps > 1
    assert gain > 0.5
    quick = scale_model.verdict(work, CLUSTER, USUAL)
    assert quick["half_at"] is None or quick["half_at"] > 128
    assert quick["pays_to"]["fixed batch"] <= quick["pays_to"]["policy"]
    assert 1 not in found["accumulation"] | quick["accumulation"]
    assert found["ceiling"] == 1600


def test_two_all_reduces_tell_the_link_and_a_perfect_machine_is_predicted():
    link, taken = Link("", 2e-4, 1e9), 0.01
    reduce = lambda n, size: scale_model.ring(link, n, size)
    size = 5_000_000
    one = {"alone": taken, "apart_2": taken, "apart_3": 1.5 * taken}
    one |= {"small": reduce(2, scale_ranks.SMALL), "large": reduce(2, scale_ranks.LARGE)}
    one |= {"together_2": taken + reduce(2, size), "together_3": 1.5 * taken + reduce(3, size)}
    found = {"gradient_bytes": size, "rounds": [one] * 3}
    told, lines = scale_ranks.compared(found, scale_ranks.Plan(), cores=2)
    assert (told.latency_s, told.bytes_per_s) == pytest.approx((2e-4, 1e9))
    assert [line["processes"] for line in lines] == ["2", "3 (oversubscribed)"]
    for line in lines:
        assert line["from one process"].value == pytest.approx(1)
        assert line["from all at once"].value == pytest.approx(1)


def test_the_program_writes_every_field_with_its_assumptions(tmp_path, capsys):
    saved = tmp_path / "scale.json"
    given = ["--work", "bert-large-v100", "--between", "mine", "--link", "mine=5e-6,3e9"]
    scale.main([*given, "--noise", "2000", "--json", str(saved)])
    printed = capsys.readouterr().out
    found = json.loads(saved.read_text())
    assert {"machine", "torch", "seed", "command"} <= set(found["environment"])
    assert "mine=5e-6,3e9" in found["environment"]["command"]
    assert found["assumptions"]["works"][0]["noise"] == 2000
    assert "mine 3 GB/s, 5 us" in found["assumptions"]["notes"]
    assert {row["devices"] for row in found["rows"]} == set(DEVICES)
    assert {row["way"] for row in found["rows"]} == {
        "fixed batch", "policy", "goodput alone", "weak scaling",
    }  # fmt: skip
    fields = {"step_s", "goodput", "efficiency", "exposed_ratio", "lr_factor", "accumulation"}
    assert all(fields <= set(row) for row in found["rows"])
    assert len(found["published"]) == len(scale_ranks.PUBLISHED)
    assert "A calculation, not a measurement" in printed
    assert "the policy pays up to" in printed
    assert saved.with_suffix(".md").read_text().strip() == printed.strip()
    assert saved.with_suffix(".png").stat().st_size > 10_000
    assert str(tmp_path) not in printed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--between", "400"], "no link '400'; take one of NVLink 3, "),
        (["--micro", "0"], "0 is not a count; give 1 or more"),
        (["--link", "mine"], "invalid _link value: 'mine'"),
        (["--points", "8"], "invalid _points value: '8'"),
    ],
)
def test_what_cannot_be_calculated_with_is_refused_in_words(given, words, capsys):
    with pytest.raises(SystemExit):
        scale.main(given)
    assert words in capsys.readouterr().err


@pytest.mark.thorough
def test_three_gloo_processes_measure_the_small_end(tmp_path):
    saved = tmp_path / "scale.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", "--measure", "--json", str(saved)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=170,
    )
    found = json.loads(saved.read_text())
    two, three = found["small_end"]
    assert two["measured, ms"]["n"] == len(found["measured"]["rounds"]) == scale_ranks.Plan.rounds
    # a shared machine stalls: the calculation is to be of the right size, no more
    assert 0.5 < two["from one process"]["value"] < 3
    assert 0.5 < three["from all at once"]["value"] < 3
    assert any(row["work"] == "MLP, one core here" for row in found["rows"])
