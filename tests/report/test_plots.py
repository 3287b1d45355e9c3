"""The figure and the page: drawn from any run, small, off pyplot."""

import base64
import dataclasses
import io
import math
import subprocess
import sys

import pytest
from fake_training import GIB, FakeTraining, finished_run, start_record, step_record

from hybrid_magic.records import BatchChangeRecord, StepRecord, TelemetryRecord
from hybrid_magic.report import page, plots, series
from hybrid_magic.run import Run

PNG = b"\x89PNG"


def run_of(records, **start):
    run = Run(config={}, environment={}, outcome="finished", steps=len(records), seconds=1.0)
    run.add(start_record(**start))
    for record in records:
        run.add(record)
    return run


def unread(record):
    """Return the record of a device that can tell nothing."""
    names = [item.name for item in dataclasses.fields(StepRecord)]
    unknown = [name for name in names if name.endswith(("_s", "_bytes"))]
    return dataclasses.replace(record, loss=None, **dict.fromkeys(unknown))


RUNS = {
    "no step": run_of([]),
    "no start": Run(config={}, environment={}),
    "one step": run_of([step_record(1)]),
    "two steps": run_of([step_record(1), step_record(2)]),
    "no finite loss": run_of([step_record(n, loss=math.nan) for n in range(1, 9)]),
    "an infinite loss among others": run_of(
        [step_record(n, loss=math.inf if n == 4 else 1.0) for n in range(1, 9)]
    ),
    "nothing known": run_of(
        [unread(step_record(n)) for n in range(1, 9)],
        memory_budget_bytes=None,
        device_bytes=None,
        samples_per_epoch=None,
    ),
    "as many records as are kept": run_of([step_record(n, loss=n % 7) for n in range(1, 4097)]),
    "a change of each kind": run_of(
        [step_record(n) for n in range(1, 9)]
        + [
            BatchChangeRecord(3, 64, 128, "global", "grew"),
            BatchChangeRecord(4, 128, 1, "global", "shrank"),
            BatchChangeRecord(5, None, 3, "control", "you"),
            BatchChangeRecord(5, "fp16", "bf16", "precision", "scale"),
            BatchChangeRecord(6, 64, None, "micro", "memory"),
            BatchChangeRecord(9, None, None, "global", "odd"),
        ]
    ),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_every_run_has_a_figure_of_four_plots_under_the_limit(run):
    sheet = plots.figure(run)
    assert len(sheet.axes) == 4
    assert all(axes.get_title(loc="left") and axes.get_xlabel() for axes in sheet.axes)
    image = plots.png(sheet)
    assert image.startswith(PNG)
    bundle = page.mimebundle(run)
    assert len(bundle["text/html"]) + len(bundle["text/plain"]) < 300_000


def test_titles_say_what_the_plots_show():
    titles = [axes.get_title(loc="left") for axes in plots.figure(finished_run()).axes]
    assert titles[0].startswith("Loss 2.58")
    assert "validation 0.475" in titles[0]
    assert titles[1] == "Memory 4.4 GiB, 33 % of budget"
    assert titles[2] == "Batch 64 \N{RIGHTWARDS ARROW} 108, 4 decisions"
    assert titles[3].endswith("% backward")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([64, 64, 64, 64], "Batch stayed at 64"),
        ([64, 96, 96, 144], "Batch 64 → 144"),
        ([64, 192, 192, 64, 64], "Batch 64 → 192 → 64"),
        ([64, 64, 16, 16, 32, 32], "Batch 64 → 16 → 32"),
    ],
)
def test_the_title_tells_the_farthest_that_the_batch_went(sizes, said):
    records = [
        step_record(step, global_batch_size=size, microbatch_size=16)
        for step, size in enumerate((size for size in sizes for _ in range(3)), start=1)
    ]
    assert plots.figure(run_of(records)).axes[2].get_title(loc="left").startswith(said + ",")


def test_an_unknown_memory_is_said_and_not_drawn_as_zero():
    axes = plots.figure(RUNS["nothing known"]).axes[1]
    assert [text.get_text() for text in axes.texts] == ["no reading on this device"]
    assert not axes.lines


def watched(used_gib, budget_gib=13.2):
    """Return a run of 4.4 GiB on a device of which so much is taken in all."""
    budget, device = int(budget_gib * GIB), int(1.1 * budget_gib * GIB)
    run = finished_run(start=start_record(memory_budget_bytes=budget, device_bytes=device))
    for step in (1, 60, 120, 180):
        run.add(TelemetryRecord(step, step / 60, gpu_used_bytes=int(used_gib * GIB)))
    return run


def test_what_the_whole_device_holds_is_drawn_over_what_the_run_does():
    axes = plots.figure(watched(6.0)).axes[1]
    whole = next(line for line in axes.lines if line.get_label() == "whole device")
    assert list(whole.get_xdata()) == [1, 60, 120, 180]
    assert list(whole.get_ydata()) == pytest.approx([6.0] * 4)
    assert axes.get_ylim()[1] > 6.0
    assert axes.get_title(loc="left") == "Memory 4.4 GiB, 33 % of budget"  # the run's own


def test_what_others_hold_beyond_the_plot_is_said_instead():
    axes = plots.figure(watched(60.0, budget_gib=125)).axes[1]
    assert [line.get_label() for line in axes.lines] == ["reserved", "allocated"]
    (said,) = (text.get_text() for text in axes.texts)
    assert said.startswith("↑ whole device 60.0 GiB,\n")
    assert axes.get_ylim()[1] < 6


@pytest.mark.parametrize(
    ("used_gib", "budget_gib"), [(6.0, 13.2), (10.5, 9.8), (60.0, 125.0), (4.5, 1250.0)]
)
def test_nothing_that_is_said_of_memory_collides_or_leaves_the_plot(used_gib, budget_gib):
    sheet = plots.figure(watched(used_gib, budget_gib))
    plots.png(sheet)
    axes = sheet.axes[1]
    frame, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    assert frame.x0 - 2 <= legend.x0
    assert legend.x1 <= frame.x1 + 2
    curves = [line for line in axes.lines if line.get_label() in ("reserved", "allocated")]
    lowest = min(min(line.get_ydata()) for line in curves)
    assert legend.y1 <= axes.transData.transform((1, lowest))[1]
    highest = max(max(line.get_ydata()) for line in axes.lines)
    for text in axes.texts:
        box = text.get_window_extent()
        assert box.x1 <= frame.x1 + 2
        assert box.y0 >= axes.transData.transform((1, highest))[1] + 4


def drawn(sheet):
    """Return where each title and tick label stands, in pixels, once the figure is drawn."""
    plots.png(sheet)
    return [
        (
            [axes._left_title.get_window_extent()],
            [text.get_window_extent() for text in axes.yaxis.get_ticklabels()],
        )
        for axes in sheet.axes
    ]


@pytest.mark.parametrize(
    "records",
    [
        [step_record(n, loss=3e-7 / n) for n in range(1, 99)],
        [step_record(n, loss=2.3025 + 1e-6 * n) for n in range(1, 99)],
        [
            step_record(10**5 * n, loss=3e7 / n, global_batch_size=131_072 * n, step_s=123.4)
            for n in range(1, 99)
        ],
    ],
    ids=["tiny losses", "losses all alike", "large numbers"],
)
def test_titles_and_tick_labels_stay_on_the_sheet_and_beside_the_names_of_the_axes(records):
    sheet = plots.figure(run_of(records))
    width, height = sheet.canvas.get_width_height()
    for (titles, labels), axes in zip(drawn(sheet), sheet.axes, strict=True):
        name = axes.yaxis.label.get_window_extent()
        assert name.x0 >= 0
        assert all(box.x0 >= 0 and box.x1 <= width and box.y1 <= height for box in titles)
        assert all(name.x1 <= box.x0 for box in labels)
        assert not axes.yaxis.get_offset_text().get_text()


def test_the_ground_of_the_picture_is_white():
    from PIL import Image

    image = Image.open(io.BytesIO(plots.png(plots.figure(finished_run())))).convert("RGB")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    there = [colour for number, colour in image.getcolors(256) if number > 100]
    for filled in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):  # blue and orange keep their colour
        assert min(max(abs(a - b) for a, b in zip(one, filled, strict=True)) for one in there) <= 2


def test_pyplot_is_never_touched_and_a_persons_own_style_is_left_alone():
    program = (
        "import sys, matplotlib\n"
        "from fake_training import finished_run\n"
        "matplotlib.rcParams['axes.facecolor'] = 'black'\n"
        "sheet = finished_run().figure()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.rcParams['axes.facecolor'] == 'black'\n"
        "assert sheet.axes[0].get_facecolor() == (1, 1, 1, 1)\n"
        "assert sheet._repr_png_().startswith(b'\\x89PNG')\n"
    )
    path = [entry for entry in sys.path if entry]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{program}"], check=True
    )


def test_report_loads_no_matplotlib_before_a_figure_is_asked_for():
    program = (
        "from fake_training import finished_run\n"
        "from hybrid_magic.report import cards, page, plots, tables\n"
        "tables.html(finished_run())\n"
        "assert not {'matplotlib', 'torch', 'IPython', 'ipywidgets'} & set(sys.modules)\n"
    )
    path = [entry for entry in sys.path if entry]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{program}"], check=True
    )


def test_the_page_holds_the_picture_and_the_words_that_stand_for_it():
    run = finished_run()
    bundle = page.mimebundle(run)
    assert 'alt="Four plots of a training run. Loss: 2.58 at the first step' in bundle["text/html"]
    data, metadata = page.figure_bundle(run)
    assert base64.b64decode(data["image/png"]).startswith(PNG)
    assert data["text/plain"] == metadata["image/png"]["alt"]
    assert "Global batch: 64 at the start, 108 at the end." in data["text/plain"]


def test_thinning_keeps_the_highest_and_the_lowest_point():
    points = [(n, 1.0) for n in range(10_000)]
    points[1234], points[7777] = (1234, 99.0), (7777, -99.0)
    kept = series.thinned(points)
    assert len(kept) <= series.MOST_POINTS
    assert {(1234, 99.0), (7777, -99.0)} <= set(kept)
    assert kept == sorted(kept)


def test_a_staircase_keeps_every_corner_and_no_dip_that_comes_back():
    sizes = [64, 64, 64, 64, 96, 96, 96, 32, 96, 96, 17]
    corners = series.stairs(range(1, 12), sizes)
    assert corners == [(1, 64), (5, 96), (11, 96)]
    assert series.height_at(corners, 4) == 64
    assert series.height_at(corners, 5) == 96


def test_the_last_whole_step_is_not_the_rest_of_an_epoch():
    records = [step_record(n, global_batch_size=size) for n, size in enumerate([64, 96, 96, 17])]
    assert series.last_whole_step(records).global_batch_size == 96


def test_a_validation_stands_where_its_epoch_ended():
    run = FakeTraining(epochs=2, per_epoch=640)()
    ends = [record.step for record in run.history if record.samples_seen >= 640]
    assert [step for step, _ in series.validations(run)] == [ends[0], run.history[-1].step]


def test_stage_times_add_up_to_the_step():
    bars = series.stage_bars([step_record(n) for n in range(1, 200)])
    assert len(bars) <= series.MOST_BARS
    assert sum(bar.steps for bar in bars) == 199
    for bar in bars:
        assert bar.stages_ms == pytest.approx([1, 4, 8, 1, 1])  # rounding of sums
