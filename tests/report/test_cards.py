"""The live plots: small, well-formed, escaped, in bounded memory."""

import math
import re
import xml.etree.ElementTree as ET

import pytest
from fake_training import start_record, step_record

from hybrid_magic.records import BatchChangeRecord
from hybrid_magic.report.cards import HEIGHT, cards
from hybrid_magic.report.trace import Trace


def trace_of(records):
    trace = Trace()
    trace.extend(records)
    return trace


def parsed(html):
    return ET.fromstring(html.replace("&nbsp;", " "))


def test_a_hundred_thousand_steps_stay_in_a_hundred_points_and_few_kilobytes():
    trace = Trace()
    for first in range(1, 100_001, 1000):
        trace.extend(step_record(n, loss=1 / n) for n in range(first, first + 1000))
    assert len(trace.buckets) <= 64
    assert sum(bucket.steps for bucket in trace.buckets) == 100_000
    changes = [BatchChangeRecord(90_000 + n, 64, 96, "global", "grew " * 10) for n in range(30)]
    html = cards(trace, start_record(), changes)
    parsed(html)
    assert len(html) < 20_000
    assert len(cards(trace, start_record(), ())) < 10_000


def test_means_are_exact_and_spikes_survive_the_merging():
    losses = [float(n % 10) for n in range(5000)]
    losses[3210] = 500.0
    trace = trace_of(step_record(n + 1, loss=loss) for n, loss in enumerate(losses))
    assert sum(bucket.loss_sum for bucket in trace.buckets) == sum(losses)
    assert max(bucket.loss_max for bucket in trace.buckets) == 500.0
    assert trace.buckets[-1].step == 5000


@pytest.mark.parametrize(
    "records",
    [
        [],
        [step_record(1)],
        [step_record(1), step_record(2)],
        [step_record(n, loss=math.nan) for n in range(1, 5)],
        [
            step_record(
                1, loss=None, step_s=None, allocated_peak_bytes=None, reserved_peak_bytes=None
            )
        ],
        [step_record(n, reserved_peak_bytes=None) for n in range(1, 5)],
        [step_record(n, allocated_peak_bytes=None) for n in range(1, 5)],
    ],
    ids=["none", "one", "two", "no finite loss", "nothing known", "no reserved", "no allocated"],
)
def test_cards_are_well_formed_for_any_start_of_a_run(records):
    html = cards(trace_of(records), start_record(), ())
    assert len(parsed(html)) == 4
    assert "nan" not in html
    assert "inf" not in html


def test_a_memory_that_cannot_be_read_is_said():
    records = [step_record(1, allocated_peak_bytes=None, reserved_peak_bytes=None)]
    assert "no reading" in cards(trace_of(records), start_record(), ())


def test_a_memory_that_is_read_now_and_then_is_drawn_to_the_edge():
    records = [step_record(step) for step in range(1, 4)]
    records += [
        step_record(step, allocated_peak_bytes=None, reserved_peak_bytes=None)
        for step in range(4, 11)
    ]
    card = parsed(cards(trace_of(records), start_record(), []))[1]
    assert [line.get("points").split()[-1].split(",")[0] for line in card.iter("polyline")] == (
        ["300"] * 3
    )


@pytest.mark.parametrize(("used_gib", "shown"), [(8, True), (60, False)])
def test_what_the_whole_device_holds_is_drawn_where_it_fits_beside_the_rest(used_gib, shown):
    trace = trace_of([step_record(1)])
    trace.device_holds(used_gib << 30)
    trace.device_holds(None)
    trace.extend([step_record(2)])
    card = parsed(cards(trace, start_record(), []))[1]
    said = "".join(card.itertext())
    assert ("whole device" in said) == shown
    assert len(list(card.iter("polyline"))) == 3 + shown  # allocated, reserved, budget
    heights = [
        float(point.split(",")[1])
        for line in card.iter("polyline")
        for point in line.get("points").split()
    ]
    assert all(0 <= height <= HEIGHT for height in heights)


def test_the_highest_reading_of_the_device_survives_the_merging():
    trace = Trace(limit=4)
    for step in range(1, 100):
        trace.device_holds(9 << 30 if step == 50 else 1 << 30)
        trace.extend([step_record(step)])
    assert max(bucket.device_used_bytes for bucket in trace.buckets) == 9 << 30


def test_a_micro_batch_as_large_as_the_batch_is_seen_beside_it():
    card = parsed(cards(trace_of([step_record(1), step_record(2)]), start_record(), []))[2]
    whole, micro = card.iter("polyline")
    assert whole.get("points") == micro.get("points")
    assert (whole.get("stroke-dasharray"), micro.get("stroke-dasharray")) == (None, "5 5")


def test_a_decision_is_marked_with_its_reason_escaped():
    made = BatchChangeRecord(2, 64, 96, "global", "grew <64> & more")
    html = cards(trace_of(step_record(n) for n in (1, 2, 3)), start_record(), [made])
    assert "step 2: grew &lt;64&gt; &amp; more" in html
    parsed(html)


def test_the_cards_take_their_text_colour_from_the_page():
    html = cards(trace_of([step_record(1)]), start_record(), ())
    assert not re.search(r"(?<!-)color:(?!#)", html)
    assert "background" not in html
