"""How a profile is shown: the numbers of its data, the same in text and HTML, small, legible."""

from __future__ import annotations

import dataclasses
import html.parser
import io
import itertools
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image
from profiles_made import (
    ADVICE,
    CPU,
    GIB,
    GPU,
    HOSTILE_NAMES,
    LONG_PATHS,
    MADE,
    READS,
    TINY,
    UNKNOWN,
    tree,
)

from hybrid_magic.findings import Module, Pipeline, Stage, Work
from hybrid_magic.profiles import Profile
from hybrid_magic.report import profile_plots, profile_rows, profile_words, profiles
from hybrid_magic.report import quantities as q
from hybrid_magic.report.profile_tree import branches, parts

EVERY = pytest.mark.parametrize("profile", MADE.values(), ids=MADE.keys())


class Rows(html.parser.HTMLParser):
    """The rows of every table of a page, as lists of cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        self._open = tag in ("td", "th")
        if self._open:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.rows[-1][-1] += data.replace("\N{NO-BREAK SPACE}", " ")


def words(said: str) -> str:
    return " ".join(said.replace("\N{NO-BREAK SPACE}", " ").split())


def lines(said: str) -> list[str]:
    return [words(line) for line in said.splitlines()]


def test_the_first_line_is_speed_where_time_goes_and_peak_memory():
    first, *_ = profiles.text(GPU).splitlines()
    assert first == (
        "1,200 samples/s, 213 ms a step, 55 % of it in the backward pass; peak memory 5.4 GiB"
    )
    waiting = dataclasses.replace(GPU, stages=(Stage("data", 0.13, None, None, 8), *GPU.stages[1:]))
    assert "61 % of it waiting for data" in profiles.text(waiting)
    assert "no reading of memory on this device" in profiles.text(UNKNOWN).splitlines()[0]


def test_the_advice_follows_with_evidence_what_to_do_and_what_it_brings():
    said = profiles.text(GPU)
    assert "2. Compute in bf16: takes about 22 % off a step, frees about 38 % of the peak" in said
    at = [said.index(word) for one in ADVICE for word in (one.what, one.evidence, one.do)]
    assert at == sorted(at)
    assert at[-1] < said.index("Time and memory by stage")
    page = profiles.html(GPU)
    assert page.count("<li") >= len(ADVICE)
    assert page.index(ADVICE[2].do) < page.index("<table")


def test_without_advice_one_line_says_so():
    for said in (profiles.text(TINY), profiles.html(TINY)):
        assert profile_words.NOTHING in said
    assert profile_words.NOTHING not in profiles.text(GPU) + profiles.html(GPU)


def test_the_stages_have_time_share_host_time_and_peak():
    said = lines(profiles.text(GPU))
    assert "stage device time share host time peak memory" in said
    assert "backward 117 ± 2.3 ms 55 % 41.1 ms 5.4 GiB" in said
    assert "copy 4.10 ± 0.08 ms 1.9 % 900 µs 450 MiB" in said
    assert "whole step 213 ± 3.1 ms 100 % 5.4 GiB" in said
    said = lines(profiles.text(CPU))
    assert "stage time share peak memory" in said
    assert "backward 16.9 ms 54 % 44.2 MiB" in said


def test_modules_memory_sizes_and_cards_have_their_numbers():
    said = lines(profiles.text(CPU))
    assert "2 Conv2d 12.0 ms 39 % 4.15 ms 7.87 ms 43.1 MiB 2.1 GiB 2.4 GiB 1.42 TFLOP" in said
    assert "outside of modules 400 µs 1.3 %" in said
    assert "activations 33.0 MiB 75 %" in said
    assert "16 13.2 ms 1,212 samples/s 25.6 MiB" in said
    assert "L4 24 GB 19.8 GiB 18,424" in said
    assert f"a micro-batch of n samples takes 8.0 MiB + n {q.TIMES} 1.1 MiB" in words(
        profiles.text(CPU)
    )


def test_a_card_that_not_one_sample_fits_is_said():
    assert GPU.line is not None
    fits = tuple(dataclasses.replace(fit, largest=None) for fit in GPU.line.fits)
    none = dataclasses.replace(GPU, line=dataclasses.replace(GPU.line, fits=fits))
    assert "Tesla T4 13.1 GiB does not fit" in lines(profiles.text(none))
    assert "Tesla T4 none" in profiles.alt_text(none)
    assert "none on Tesla T4" in [text.get_text() for text in written(none)]


def test_host_reads_are_named_with_their_line():
    said = lines(profiles.text(READS))
    assert "cell, line 7: running += loss.item() 1 time 31.2 ms" in said
    assert "cell, line 8: correct += (out.argmax(1) == y).sum().item() 2 times 4.40 ms" in said


def test_the_end_says_what_the_numbers_are_of():
    said = words(profiles.text(GPU))
    assert said.endswith(
        "ResNet on cuda:0 (Tesla T4), 8 steps of 256 samples in micro-batches of 128, fp16 with "
        "SGD, torch 2.15.0, python 3.11.9, hybrid_magic 0.5.0, measured in 14.2 s"
    )
    assert GPU.notes[0] in said
    assert "micro-batches" not in profile_words.caption(CPU)


@pytest.mark.parametrize(
    ("held", "known", "verdict"),
    [
        (
            Pipeline(900.0, 1200.0, 12, 0, 2, False),
            "the loader alone gives 900 samples/s (2 cores, 12 batches), ",
            (
                ": the loader is the slower one, and without worker processes they take turns; "
                "batches do not come pinned"
            ),
        ),
        (
            Pipeline(1300.0, 1200.0, 1, 1, 1, True),
            "the loader alone gives 1,300 samples/s (1 worker process, 1 core, 1 batch), ",
            ": the model is the slower one; batches come pinned",
        ),
        (Pipeline(None, 1200.0, 0, None, 2, None), "", "; the loader was not timed alone"),
    ],
)
def test_the_loader_alone_stands_against_the_model_alone(held: Pipeline, known: str, verdict: str):
    found = dict(profile_words.sentences(dataclasses.replace(GPU, pipeline=held)))
    assert found["data"] == f"{known}the model alone does 1,200 samples/s{verdict}"


def roofline(achieved: float, intensity: float, *, host: float = 0.1, reads: bool = False) -> str:
    """Return the sentence for a device of 100 TFLOP/s and 1 TB/s: its ridge is 100."""
    flops = int(1e14 * achieved)
    work = Work({"bf16": flops}, int(flops / intensity), 1.0, {"bf16": 1e14}, 1e12)
    passes = (Stage("forward", 0.3, None, host / 3, 8), Stage("backward", 0.7, None, host, 8))
    kept = READS.reads if reads else ()
    profile = dataclasses.replace(GPU, work=work, stages=passes, reads=kept)
    return dict(profile_words.sentences(profile))["arithmetic"]


def test_the_roofline_is_a_sentence_with_what_limits_it():
    assert roofline(0.41, 50.0) == (
        "the step reaches 41 % of what this device does in bf16 (41.0 of 100 TFLOP/s); it is "
        "limited by memory traffic: it does 50.0 operations for each byte that it moves, fewer "
        "than the 100 that keep the arithmetic busy"
    )
    assert "; it is limited by arithmetic: it does 200 operations" in roofline(0.7, 200.0)
    host = "limited by the host, which needs 1.20 s to launch 1.00 s of work"
    assert host in roofline(0.1, 200.0, host=0.9)
    for said in (roofline(0.1, 200.0), roofline(0.1, 200.0, host=0.9, reads=True)):
        assert "neither arithmetic nor memory traffic limits it (they allow 100 TFLOP/s)" in said


def test_a_roofline_of_which_less_is_known_says_less():
    work = Work({"fp32": 10**12}, 10**10, 0.5, {}, None)
    said = dict(profile_words.sentences(dataclasses.replace(GPU, work=work)))["arithmetic"]
    assert said == "the step does 2.00 TFLOP/s, mostly in fp32; what the device can do is not known"
    alone = dataclasses.replace(work, peak_flops_per_s={"fp32": 4e12})
    said = dict(profile_words.sentences(dataclasses.replace(GPU, work=alone)))["arithmetic"]
    assert said.endswith("50 % of what this device does in fp32 (2.00 of 4.00 TFLOP/s)")
    for unknown in (None, dataclasses.replace(work, flops={})):
        said = dict(profile_words.sentences(dataclasses.replace(GPU, work=unknown)))["arithmetic"]
        assert said == "the operations of a step could not be counted"


@EVERY
def test_text_and_html_say_the_same(profile: Profile):
    said, shown = profiles.text(profile), profiles.html(profile)
    found = Rows(shown).rows
    assert len(found) >= 4
    in_text = set(lines(said))
    tables = profile_rows.stages, profile_rows.kinds, profile_rows.fits, profile_rows.sizes
    for table in (make(profile) for make in (*tables, profile_rows.reads)):
        for row in (table.heads, *table.rows):
            if table.rows:
                assert list(row) in found
                assert words(" ".join(row)) in in_text
    plain = words(html.unescape(re.sub("<[^>]*>", " ", shown))).lower()
    for sentence in (
        profile_words.headline(profile),
        *dict(profile_words.sentences(profile)).values(),
    ):
        assert words(sentence).lower() in plain
        assert words(sentence) in words(said)
    of_modules = {words(" ".join(row)) for row in found}
    rows = branches(profile.modules, profile.model, profiles.ROWS_IN_TEXT)
    for row in profile_rows.modules(profile, [row for row in rows if row.module.path]).rows:
        assert words(" ".join(row)) in in_text
        assert len(profile.modules) > profiles.ROWS_OPENED or words(" ".join(row)) in of_modules


@EVERY
def test_the_page_is_small_and_stands_alone(profile: Profile):
    bundle = profile._repr_mimebundle_()
    page = bundle["text/html"]
    assert len(page) + len(bundle["text/plain"]) < 300_000
    assert "<script" not in page
    assert "class=" not in page
    assert "background" not in page
    assert page.count("color:") == page.count("color: inherit")
    assert page.index(words(profile_words.headline(profile))[:3]) < page.index("<img")
    for tag in ("table", "tr", "td", "th", "div", "ol", "ul", "li", "details", "p"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag
    prose = profiles.text(profile).splitlines()
    assert max(map(len, prose)) <= 140


def test_all_modules_of_a_resnet_are_on_the_page_and_the_top_is_seen_at_once():
    page = profiles.html(GPU)
    top, opened = page.split("<details", 1)
    assert "More of the 151 modules" in opened
    shown = Rows(opened.split("</details>")[0]).rows
    assert len(shown) == 1 + len(GPU.modules) + 1  # heads, modules, outside
    assert "layer3" in top
    assert "downsample" not in top
    assert "<details" not in profiles.html(CPU)


def test_every_name_is_escaped():
    page = HOSTILE_NAMES._repr_mimebundle_()["text/html"]
    assert "<script" not in page
    assert "alert('x')" not in page
    assert page.count("&lt;script&gt;") > 15


def test_long_names_lose_their_middle_and_not_their_end():
    rows = branches(LONG_PATHS.modules, LONG_PATHS.model, 10)
    said = [row[0] for row in profile_rows.modules(LONG_PATHS, rows).rows]
    assert max(len(name.strip()) for name in said) == profile_rows.LONGEST_NAME
    assert any(name.endswith("_did_3") for name in said)


@EVERY
def test_the_figure_is_a_png_with_its_numbers_in_words(profile: Profile):
    data, metadata = profiles.figure_bundle(profile)
    drawn = Image.open(io.BytesIO(profile_plots.png(profile.figure())))
    assert drawn.width > 1000
    assert metadata["image/png"]["alt"] == data["text/plain"] == profiles.alt_text(profile)
    for stage in profile.stages:
        assert f"{stage.name} {q.brief(stage.seconds)}" in data["text/plain"]
    for fit in profile.line.fits if profile.line else ():
        assert f"{fit.device} {q.count(fit.largest)}" in data["text/plain"]


def written(profile: Profile) -> list[Text]:
    """Return what is drawn of text: a tick outside of its plot has a label too."""
    sheet, drawn, draw = profile.figure(), [], Text.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, *args: (drawn.append(text), draw(text, *args)))
        sheet.canvas.draw()
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


@EVERY
def test_nothing_written_in_the_figure_overlaps_or_is_cut(profile: Profile):
    texts = written(profile)
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]
    width, height = texts[0].figure.canvas.get_width_height()
    for said, box in boxes:
        assert box.x0 >= 0, said
        assert box.y0 >= 0, said
        assert box.x1 <= width, said
        assert box.y1 <= height, said
    for (said, one), (other, two) in itertools.combinations(boxes, 2):
        across = min(one.x1, two.x1) - max(one.x0, two.x0)
        along = min(one.y1, two.y1) - max(one.y0, two.y0)
        assert across <= 1 or along <= 4, (said, other)  # the room of letters that hang lower


def test_the_figure_says_what_was_not_measured():
    said = [text.get_text() for text in written(UNKNOWN)]
    assert said.count("no reading on this device") == 2
    assert "no module was timed" in said
    assert "no reading" in said


def test_the_figure_lists_what_fits_here_and_on_the_cards():
    said = [text.get_text() for text in written(GPU)]
    for listed in ("338 on Tesla T4", "515 on L4 24 GB", "1,884 on A100 80 GB"):
        assert listed in said


def without_insides(leaves: list[tuple[str, str, float]]) -> list[tuple[str, str, float]]:
    return [
        leaf for leaf in leaves if not any(path.startswith(f"{leaf[0]}.") for path, *_ in leaves)
    ]


LEAVES = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(".".join),
        st.sampled_from(["Linear", "ReLU"]),
        st.floats(0.01, 100.0),
    ),
    min_size=1,
    max_size=40,
    unique_by=lambda leaf: leaf[0],
).map(lambda made: sorted(without_insides(made), key=lambda leaf: leaf[0].split(".")))


@given(LEAVES, st.integers(2, 30), st.booleans())
def test_a_tree_of_any_size_has_the_rows_asked_for_and_adds_up(leaves, most, brief):
    modules = tree(leaves, 1.0, "Net")
    rows = branches(modules, "Net", most, brief=brief)
    assert len(rows) <= most
    assert rows[0].module == modules[0]
    ends = [row.module for row in rows if not row.opened]
    assert sum(end.forward_s for end in ends) == pytest.approx(modules[0].forward_s)
    order = [module.path for module in modules]
    shown = [order.index(row.module.path) for row in rows if row.module.path]
    assert shown == sorted(shown)
    depths = [row.depth for row in rows]
    assert all(after <= before + 1 for before, after in itertools.pairwise(depths))


def test_a_tree_opens_what_takes_time_and_sums_up_the_rest():
    names = [row.name for row in branches(GPU.modules, "ResNet", 13)]
    assert names == [
        "ResNet", "conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4", "3 smaller",
    ]  # fmt: skip
    equal = tree([(str(n), "Linear", 1.0) for n in range(30)], 1.0, "Deep")
    assert [row.name for row in branches(equal, "Deep", 5)] == [
        "Deep", "0", "1", "2", "27 more Linear",
    ]  # fmt: skip
    rising = tree([(str(n), "Linear", 1.0 + n) for n in range(9)], 1.0, "Deep")
    assert [row.name for row in branches(rising, "Deep", 4)] == ["Deep", "7", "8", "7 more Linear"]


def test_what_takes_less_than_a_tenth_is_looked_into_only_where_all_is_asked_for():
    names = [row.name for row in branches(GPU.modules, "ResNet", 40)]
    assert "5" in names  # the sixth block of layer3, which takes a quarter
    assert "downsample" not in names
    every = [row.name for row in branches(GPU.modules, "ResNet", 200, brief=False)]
    assert every.count("downsample") == 4


def test_modules_that_were_never_called_have_no_row():
    idle = Module("idle", "ModuleList", 0, None, None, 4, None, None, None)
    inside = Module("idle.0", "Linear", 1, 0.1, 0.2, 4, 1, 1, 1)
    whole = Module("", "Net", 1, 0.1, 0.2, 4, 1, 1, 1)
    names = [row.name for row in branches((whole, idle, inside), "Net", 9)]
    assert names == ["Net", "idle.0"]
    assert [row.name for row in branches((idle,), "Net", 9)] == ["idle"]
    assert parts((idle,), "Net", 9) == []


def unknown_variants() -> Iterator[Profile]:
    """Yield the GPU's profile with one thing at a time unknown."""
    optional = ("outside_s", "line", "work", "step_spread_s")
    yield from (dataclasses.replace(GPU, **{name: None}) for name in optional)
    empty = ("stages", "modules", "peaks", "sizes", "reads", "advice", "notes")
    yield from (dataclasses.replace(GPU, **{name: ()}) for name in empty)
    for name in ("forward_s", "backward_s", "activation_bytes", "peak_bytes", "flops"):
        yield dataclasses.replace(
            GPU, modules=tuple(dataclasses.replace(m, **{name: None}) for m in GPU.modules)
        )
    yield dataclasses.replace(
        GPU, sizes=tuple(dataclasses.replace(size, peak_bytes=None) for size in GPU.sizes)
    )


def test_whatever_is_unknown_the_rest_is_shown():
    for profile in unknown_variants():
        said = profiles.text(profile) + profiles.html(profile) + profiles.alt_text(profile)
        assert "None" not in said
        assert "unknown" not in said
        profile.figure()


def test_quantities_of_a_step_read_as_a_person_says_them():
    said = {
        q.brief(0.0): "0 s",
        q.brief(4.52e-5): "45.2 µs",
        q.brief(0.003214): "3.21 ms",
        q.brief(0.2134, 0.0031): "213 ± 3.1 ms",
        q.brief(0.00049, 0.0011): "0.490 ± 1.1 ms",
        q.brief(1.239): "1.24 s",
        q.brief(75): "1 min 15 s",
        q.brief(None): "unknown",
        q.flops(3.92e9): "3.92 GFLOP",
        q.flops(12): "12 FLOP",
        q.flops(None): "unknown",
        q.flops_rate(12.1e12): "12.1 TFLOP/s",
        q.flops_rate(None): "unknown",
        q.size(16 * GIB): "16.0 GiB",
        q.unbroken("3 GFLOP in 4 µs, 5 TFLOP/s").replace("\N{NO-BREAK SPACE}", "_"): (
            "3_GFLOP in 4_µs, 5_TFLOP/s"
        ),
    }
    for found, wanted in said.items():
        assert found == wanted
