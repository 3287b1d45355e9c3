"""What is advised on a profile: a planted problem comes first, and nothing is said without one."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from profiles_for_advice import ANY_PROFILE, GIB, blocks, line, stages, straight, tuned

from hybrid_magic.findings import Advice, HostRead, Size
from hybrid_magic.policy.advice import advise
from hybrid_magic.policy.advice_on_sizes import recompute
from hybrid_magic.policy.evidence import duration, percent, size
from hybrid_magic.profiles import Profile


def only(profile: Profile) -> Advice:
    """The one thing that is advised."""
    (advice,) = advise(profile)
    return advice


def test_a_well_tuned_training_is_left_alone():
    assert advise(tuned()) == ()


# -- input --


def slow_loader(workers=0, cores=16, rate=128 / 0.6, **changes):
    """128 samples at 213 a second take 600 ms, and the model takes 100."""
    pipeline = {"loader_samples_per_s": rate, "workers": workers, "cores": cores}
    return tuned(step_s=0.7, stages=stages(data=0.6), pipeline=pipeline, **changes)


def test_a_slow_loader_gets_the_workers_that_its_rate_asks_for():
    advice = only(slow_loader())
    assert advice.what == "Load data in 8 worker processes"  # 6 keep up, a quarter to spare
    assert "--workers 8" in advice.do
    assert advice.evidence.startswith("the model waits for data 86 % of a step")
    assert "the loader alone gives 213 samples/s, the model alone 1,300" in advice.evidence
    assert advice.saves == pytest.approx((0.6 - 0.001) / 0.7)  # handing over takes a millisecond


def test_no_more_workers_are_asked_for_than_there_are_cores():
    advice = only(slow_loader(cores=2))
    assert advice.what == "Load data in 2 worker processes"
    assert advice.saves == pytest.approx(
        1 - 0.3 / 0.7
    )  # still the loader's pace, now twice as fast
    assert only(slow_loader(cores=1)).what == "Load data in 1 worker process"


def test_workers_that_have_all_cores_leave_only_less_work_a_sample():
    advice = only(slow_loader(workers=4, cores=4))
    assert advice.what == "Do less work for each sample in the loader"
    assert advice.saves == pytest.approx(1 - 0.3 / 0.7)
    assert "have all 4 cores" in advice.evidence


def test_workers_that_are_enough_by_their_rate_are_not_added_to():
    assert advise(slow_loader(workers=4, rate=4000.0)) == ()


def test_a_loader_faster_than_the_model_still_costs_its_time_without_a_worker():
    changes = {"loader_samples_per_s": 1600.0, "model_samples_per_s": 1300.0, "workers": 0}
    advice = only(tuned(step_s=0.18, stages=stages(data=0.08), pipeline=changes))
    assert advice.what == "Load data in 2 worker processes"
    assert advice.saves == pytest.approx((0.08 - 0.001) / 0.18)


def test_samples_that_are_loaded_in_no_time_are_not_handed_to_workers():
    changes = {"loader_samples_per_s": 128e3, "model_samples_per_s": 64e3, "workers": 0}
    assert advise(tuned(step_s=0.003, stages=stages(data=0.001), pipeline=changes)) == ()


def test_on_a_cpu_workers_share_the_cores_with_the_model():
    setting = {"device_type": "cpu", "works_ahead": False, "fused": None, "channels_last": None}
    advice = only(slow_loader(cores=2, setting=setting))
    assert advice.saves == pytest.approx(1 - (128 / 1300 + 0.6 / 2 + 0.001) / 0.7)


def test_a_wait_that_the_device_works_through_costs_nothing():
    pipeline = {"loader_samples_per_s": 4000.0, "model_samples_per_s": 1280.0, "workers": 0}
    assert advise(tuned(stages=stages(data=0.05), pipeline=pipeline)) == ()


@pytest.mark.parametrize(("data", "said"), [(0.0099, 0), (0.0101, 1)])
def test_a_short_wait_for_data_is_no_matter(data, said):
    pipeline = {"loader_samples_per_s": 200.0, "model_samples_per_s": 9999.0, "workers": 0}
    assert len(advise(tuned(stages=stages(data=data), pipeline=pipeline))) == said


@pytest.mark.parametrize(
    ("workers", "grows", "words"),
    [
        (0, True, "--workers 8, or num_workers=8 in the DataLoader"),
        (0, False, "get_worker_info"),
        (None, False, "give the dataset to a DataLoader with num_workers=8"),
    ],
)
def test_what_can_be_changed_depends_on_the_loader(workers, grows, words):
    assert words in only(slow_loader(workers=workers, setting={"grows": grows})).do


def test_a_loader_that_was_not_timed_is_as_slow_as_the_wait_for_it():
    assert only(slow_loader(rate=None)).what == "Load data in 8 worker processes"


def test_memory_that_is_not_pinned_comes_first_where_copies_take_time():
    advice = only(tuned(stages=stages(copy=0.2, forward=0.0), pipeline={"pinned": False}))
    assert advice.do == "pin_memory=True in the DataLoader"
    copies = stages(copy=0.03, forward=0.01)
    assert only(tuned(stages=copies, pipeline={"pinned": False})).saves == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("copy", "pinned"), [(0.0098, False), (0.03, True), (0.03, None), (0.0, False)]
)
def test_memory_that_is_pinned_or_hardly_copied_is_no_matter(copy, pinned):
    assert advise(tuned(stages=stages(copy=copy), pipeline={"pinned": pinned})) == ()


def test_a_read_in_every_micro_batch_comes_first():
    read = HostRead("cell line 7: total += loss.item()", 1.0, 0.04)
    advice = only(tuned(reads=(read,)))
    assert advice.what == "Let the host run ahead of the device"
    assert "line 7: total += loss.item() makes the host wait" in advice.evidence
    assert "once a micro-batch, 40 ms of a step (40 %)" in advice.evidence
    assert advice.saves == pytest.approx(0.2)  # at most 40 of 100 ms, and half of that


@pytest.mark.parametrize("seconds", [0.0002, 0.098])
def test_a_read_that_costs_too_little_to_count_is_named_without_a_number(seconds):
    advice = only(tuned(reads=(HostRead("line 7", 1.0, seconds),)))
    assert (advice.saves, advice.frees) == (None, None)
    also = tuned(reads=(HostRead("line 7", 1.0, seconds),), setting={"precision": "fp32"})
    assert [one.saves is None for one in advise(also)] == [False, True]  # and comes last


def test_several_reads_are_named_by_what_they_cost():
    reads = [HostRead(f"line {i}", 1.0, 0.01 * i) for i in (1, 3, 2)]
    words = only(tuned(reads=tuple(reads))).evidence
    assert words.startswith("line 3 and line 2 and 1 more line make")
    assert "3 times a micro-batch" in words


def test_a_seldom_read_counts_where_it_is_long():
    advice = only(tuned(reads=(HostRead("line 7", 0.25, 0.03),)))
    assert "every 4 micro-batches, 30 ms of a step" in advice.evidence


def test_a_seldom_read_or_one_on_a_cpu_is_no_matter():
    assert advise(tuned(reads=(HostRead("line 7", 0.1, 0.002),))) == ()
    assert (
        advise(tuned(reads=(HostRead("line 7", 1.0, 0.04),), setting={"works_ahead": False})) == ()
    )


# -- computing --


FP32 = {"setting": {"precision": "fp32", "channels_last": False}}


def test_fp32_on_a_device_with_native_bf16_comes_first():
    work = {"flops": {"fp32": int(0.8 * 0.09 * 2e13)}, "traffic_bytes": int(0.2 * 0.09 * 1.5e12)}
    advice = only(tuned(**FP32, work=work))
    assert advice.what == "Train in mixed precision (bf16)"
    assert advice.do.startswith("--precision auto")
    assert "90 % of a step in fp32" in advice.evidence
    assert "bf16 15 times as fast as fp32" in advice.evidence
    # 90 % of the step: four fifths of it are arithmetic, of which a fifteenth would be left; but
    # the bytes, a fifth of it, are a quarter less at best.
    assert advice.saves == pytest.approx(0.9 * (0.8 - 0.2 * 3 / 4))
    assert advice.frees == pytest.approx((0.8 - 0.1) / 2, abs=1e-6)


def test_precision_does_not_help_where_overhead_is_most_of_the_time():
    work = {"flops": {"fp32": int(0.05 * 0.09 * 2e13)}, "traffic_bytes": int(0.1 * 0.09 * 1.5e12)}
    assert advise(tuned(**FP32, work=work)) == ()


def test_without_measured_peaks_tensor_cores_are_trusted_carefully():
    assert only(tuned(**FP32, work=None)).saves == pytest.approx(0.9 / 3)
    no_cores = {"precision": "fp32", "tensor_cores": False, "native": None}
    assert advise(tuned(setting=no_cores, work=None)) == ()


@pytest.mark.parametrize(("ratio", "said"), [(1.4, 0), (1.6, 1)])
def test_a_cpu_is_advised_bf16_where_it_was_measured_clearly_faster(ratio, said):
    setting = {"device_type": "cpu", "works_ahead": False, "native": None, "tensor_cores": False}
    setting |= {"precision": "fp32", "channels_last": None, "fused": None}
    peaks = {"fp32": 2e13, "bf16": ratio * 2e13}
    work = {"flops": {"fp32": 10**12}, "peak_flops_per_s": peaks}
    assert len(advise(tuned(setting=setting, work=work))) == said


def test_precision_that_auto_chose_or_that_has_little_to_do_is_left():
    assert advise(tuned(**FP32, work=None, config={"precision": "auto"})) == ()
    short = stages(forward=0.005, backward=0.009)
    assert advise(tuned(**FP32, work=None, stages=short)) == ()


def test_convolutions_in_the_wrong_format_come_first():
    advice = only(tuned(setting={"channels_last": False}))
    assert "memory_format=torch.channels_last" in advice.do
    assert advice.saves == pytest.approx(0.9 * 0.9 * (1 - 1 / 1.22))


@pytest.mark.parametrize(
    "setting",
    [
        {"convolution_flops": 4 * 10**12},
        {"tensor_cores": False},
        {"device_type": "cpu"},
        {"channels_last": None},
    ],
)
def test_the_format_is_no_matter_without_tensor_cores_or_many_convolutions(setting):
    assert advise(tuned(setting={"channels_last": False, **setting})) == ()


def test_the_format_is_no_matter_in_fp32():
    work = {"flops": {"fp32": 10**13}}
    assert advise(tuned(setting={"channels_last": False, "precision": "own"}, work=work)) == ()


def test_attention_written_by_hand_comes_first():
    setting = {"attention_bytes": 3 * GIB, "attention_scores": "8 x 12 x 512 x 512"}
    advice = only(tuned(setting=setting))
    assert "scaled_dot_product_attention" in advice.do
    assert 'attn_implementation="sdpa"' in advice.do
    assert "scores of 8 x 12 x 512 x 512, 3 GiB in all, 38 % of the peak" in advice.evidence
    assert advice.saves == pytest.approx(0.9 * 4 * 3 * GIB / 60e9)
    assert advice.frees == pytest.approx(3 / 8)


def test_attention_with_few_scores_is_no_matter():
    assert advise(tuned(setting={"attention_bytes": GIB // 2})) == ()  # 3.2 % of a step


def test_attention_counts_for_its_memory_where_that_is_short():
    little = {"attention_bytes": GIB // 2}
    _, advice = advise(tuned(setting=little, **FULL))
    assert advice.frees == pytest.approx(1 / 16)


def test_an_optimizer_that_is_not_fused_comes_first():
    advice = only(tuned(stages=stages(optimizer=0.02), setting={"fused": False}))
    assert advice.do == "fused=True in AdamW(...)"
    assert advice.saves == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("optimizer", "setting"),
    [
        (0.0098, {"fused": False}),
        (0.02, {"fused": None}),
    ],
)
def test_an_optimizer_that_is_quick_or_has_no_fused_form_is_left(optimizer, setting):
    assert advise(tuned(stages=stages(optimizer=optimizer), setting=setting)) == ()


# -- sizes --


def tiny_batch(overhead=0.08, each=0.001, **changes):
    """Steps of 8 samples: 80 ms of overhead and 1 ms a sample."""
    held = {"batch": 8, "micro": 8, "sizes": straight(overhead, each, 2, 4, 8, 64)}
    return tuned(**held | {"pipeline": {"model_samples_per_s": 80.0}} | changes)


def test_a_tiny_batch_is_advised_to_grow_until_overhead_is_a_third():
    advice = only(tiny_batch(each=0.001))
    assert advice.what == "Train in batches of 128"  # 16 times: 160 would leave a third
    assert advice.do.startswith("--batch 128")
    assert "88 ms for 8 samples and 208 ms for 128: 15 % of the time a sample" in advice.evidence
    # A sample takes 208/128 ms in place of 88/8, and a sixteenth of the optimizer and the rest.
    assert advice.saves == pytest.approx(0.9 * (1 - 208 / 88 / 16) + 0.07 * 15 / 16)
    assert only(tiny_batch(each=0.01, overhead=0.2)).what == "Train in batches of 48"


def test_a_size_that_was_timed_counts_more_than_the_line():
    # Overhead is most of it along the line, and yet twice the batch took twice the time.
    sizes = (Size(2, 0.08, None), Size(4, 0.081, None), Size(8, 0.082, None), Size(16, 0.164, None))
    assert advise(tiny_batch(sizes=sizes)) == ()


def test_a_batch_grows_no_further_than_memory_or_what_was_tried_allows():
    fits = line(fixed=GIB, each=GIB, budget=40 * GIB)
    assert only(tiny_batch(line=fits)).what == "Train in batches of 39"
    assert only(tiny_batch(line=None)).what == "Train in batches of 64"
    tried = straight(0.08, 0.001, 2, 4, 8)
    assert only(tiny_batch(sizes=tried)).what == "Train in batches of 32"  # 4 times what was tried
    assert advise(tiny_batch(line=line(fixed=9 * GIB, each=GIB, budget=20 * GIB))) == ()


@pytest.mark.parametrize(("overhead", "said"), [(0.0079, 0), (0.0081, 1)])
def test_a_batch_grows_where_overhead_is_more_than_half(overhead, said):
    assert len(advise(tiny_batch(overhead=overhead))) == said


def test_a_batch_that_is_cut_into_pieces_is_not_advised_to_grow():
    assert advise(tiny_batch(micro=4, config={"micro": "auto", "accum": "auto"})) == ()


def test_the_option_for_a_larger_batch_is_one_that_works():
    assert "batch_size=128 in the loader" in only(tiny_batch(setting={"grows": False})).do
    assert "--batch " not in only(tiny_batch(setting={"grows": False})).do
    adaptive = only(tiny_batch(config={"batch": "adaptive"})).do
    assert "--batch adaptive grows only as far as the noise of the gradient allows" in adaptive


def small_pieces(**changes):
    """A step of 128 samples in 16 micro-batches of 8, each with 8 ms of overhead."""
    held = {"micro": 8, "sizes": straight(0.008, 0.0001, 4, 8, 16, 32)}
    return tuned(**held | {"config": {"micro": 8, "accum": "auto"}} | changes)


def test_small_micro_batches_are_advised_to_grow_where_memory_allows():
    advice = only(small_pieces())
    assert advice.what == "Cut a step into micro-batches of 128"
    assert advice.do == "--micro 128, and no --accum"
    assert "16 micro-batches of 8 take 141 ms, 1 of 128 would take 21 ms" in advice.evidence
    assert advice.saves == pytest.approx(0.9 * (1 - 0.0208 / 0.1408))
    fits = line(fixed=0, each=GIB, budget=20 * GIB)
    assert only(small_pieces(line=fits)).what == "Cut a step into micro-batches of 20"
    assert only(small_pieces(line=None)).what == "Cut a step into micro-batches of 32"


def test_micro_batches_on_the_plateau_or_sized_by_auto_are_left():
    assert advise(small_pieces(sizes=straight(0.00003, 0.001, 4, 8, 16, 32))) == ()
    assert advise(small_pieces(config={"micro": "auto", "accum": "auto"})) == ()


FULL = {"line": line(fixed=1 * GIB, each=7 * GIB / 128, budget=8 * GIB)}


def test_a_full_memory_is_advised_smaller_micro_batches():
    advice = only(tuned(**FULL))
    assert advice.what == "Cut a step into micro-batches of 96"
    assert advice.do.startswith("--micro 96")
    assert advice.evidence == (
        "the peak with 128 samples at once is 8 GiB, of 8 GiB; with 96 at once it is 1.75 GiB lower"
    )
    assert advice.frees == pytest.approx(7 / 32)
    tighter = line(fixed=1 * GIB, each=7 * GIB / 128, budget=4 * GIB)
    assert only(tuned(line=tighter)).what == "Cut a step into micro-batches of 48"


def test_a_size_beyond_what_fits_by_the_line_counts_as_a_full_memory():
    assert only(tuned(line=line(fixed=1, each=GIB, budget=72 * GIB))).what.endswith("of 64")


def test_memory_that_is_not_full_is_left():
    almost = line(fixed=1 * GIB, each=7 * GIB / 128, budget=int(8.5 * GIB))
    modules = blocks(12, held=6 * GIB, forward_s=0.02)
    assert advise(tuned(line=almost, modules=modules)) == ()
    assert (
        recompute(tuned(line=almost, modules=modules, setting={"batch_statistics": True})) is None
    )


def test_what_repeats_is_recomputed_where_not_one_sample_fits():
    nothing = line(fixed=9 * GIB, each=GIB, budget=8 * GIB)
    modules = blocks(12, held=6 * GIB, forward_s=0.024)
    advice = only(tuned(line=nothing, modules=modules))
    assert advice.what == "Recompute the 12 Block blocks in the backward pass"
    assert "6 GiB of the peak of 8 GiB" in advice.evidence
    assert "costs 24 % of a step" in advice.evidence
    assert "checkpoint(block, x, use_reentrant=False) for blocks.0 and its like" in advice.do
    assert advice.frees == pytest.approx(6 / 8 * (1 - 1 / 12 - 1 / 10))


def test_those_blocks_are_recomputed_that_free_most_for_their_time():
    modules = blocks(4, held=6 * GIB, forward_s=0.08, kind="Slow")
    modules += blocks(4, held=3 * GIB, forward_s=0.01, kind="Quick")[1:]
    modules += blocks(4, held=2 * GIB, forward_s=0.08, kind="Poor")[1:]
    modules += blocks(4, held=0.5 * GIB, forward_s=0.0001, kind="Tiny")[1:]
    nothing = line(fixed=90 * GIB, each=GIB, budget=72 * GIB)
    assert only(tuned(line=nothing, modules=modules)).what.startswith("Recompute the 4 Quick")


def test_recomputing_pays_only_where_small_micro_batches_cost_more():
    held = {"micro": 4, "sizes": straight(0.002, 0.001, 1, 2, 4), **FULL}
    modules = blocks(12, held=6 * GIB, forward_s=0.024)
    setting = {"retries": 2, "loader_batch": 128}
    short = {"modules": modules, "setting": setting, "config": {"micro": "auto", "accum": "auto"}}
    cheap = tuned(**held | {"line": line(0, 2 * GIB, budget=9 * GIB)}, **short)
    first = advise(cheap)[0]
    assert first.what.startswith("Recompute")  # four samples at once take half as long again
    assert "memory ran out 2 times" in first.evidence
    cheaper = dataclasses.replace(cheap, sizes=straight(0.0004, 0.001, 1, 2, 4))
    assert advise(cheaper) == ()


def test_recomputing_is_advised_where_batch_statistics_need_all_samples():
    modules = blocks(12, held=6 * GIB, forward_s=0.024)
    advice = advise(tuned(**FULL, modules=modules, setting={"batch_statistics": True}))
    assert [one.what.split()[0] for one in advice] == ["Recompute", "Cut"]
    assert "counted twice" in advice[0].do
    assert "batch statistics are those of fewer samples" in advice[1].do
    smaller = {"batch": 32, "micro": 32, "line": line(fixed=1, each=GIB, budget=72 * GIB)}
    setting = {"batch_statistics": True, "loader_batch": 128}  # of which 72 fit
    assert only(tuned(**smaller, modules=modules, setting=setting)).what.startswith("Recompute")


def test_a_single_block_or_one_that_holds_little_is_not_recomputed():
    nothing = line(fixed=9 * GIB, each=GIB, budget=8 * GIB)
    assert advise(tuned(line=nothing, modules=blocks(1, held=6 * GIB, forward_s=0.02))) == ()
    assert advise(tuned(line=nothing, modules=blocks(12, held=GIB / 2, forward_s=0.02))) == ()


# -- the choice --


def everything_wrong() -> Profile:
    return tuned(
        step_s=0.4,
        stages=stages(data=0.2, copy=0.06, optimizer=0.06, forward=0.1, backward=0.2),
        setting={"precision": "fp32", "fused": False, "attention_bytes": 4 * GIB},
        pipeline={"pinned": False, "workers": 0, "loader_samples_per_s": 600.0},
        reads=(HostRead("line 7", 1.0, 0.1),),
    )


def test_at_most_three_are_given_most_worth_first():
    given = advise(everything_wrong())
    assert len(given) == 3
    saved = [one.saves or 0 for one in given]
    assert saved == sorted(saved, reverse=True)


def test_memory_ranks_only_where_it_is_short():
    setting = {"precision": "fp32", "fused": False}
    times = stages(optimizer=0.04, forward=0.01, backward=0.02)
    plenty = advise(tuned(setting=setting, stages=times, work=None))
    assert [one.what.split()[0] for one in plenty] == ["Use", "Train"]  # 20 and 10 % of a step
    short = advise(tuned(setting=setting, stages=times, work=None, **FULL))
    assert [one.what.split()[0] for one in short] == ["Train", "Cut", "Use"]  # and 35, 22 % freed


@pytest.mark.parametrize("step_s", [0.0, float("nan")])
def test_a_step_without_time_gives_nothing(step_s):
    assert advise(tuned(step_s=step_s)) == ()


def test_numbers_are_said_as_people_say_them():
    assert [percent(x) for x in (0.0412, 0.0996, 0.61)] == ["4.1 %", "10 %", "61 %"]
    assert [duration(s) for s in (0.00025, 0.012, 1.44)] == ["0.25 ms", "12 ms", "1.4 s"]
    assert [size(n) for n in (3 * GIB, 300 * 2**20, 5000)] == ["3 GiB", "300 MiB", "4.88 KiB"]


# -- any profile --


@settings(max_examples=150)
@given(ANY_PROFILE)
def test_any_profile_gets_at_most_three_with_shares_that_can_be(profile: Profile):
    given = advise(profile)
    assert len(given) <= 3
    assert given == advise(profile)
    for one in given:
        for share in (one.saves, one.frees):
            assert share is None or 0 <= share < 1
        assert one.what
        assert one.do
        assert "nan" not in one.evidence
        assert "inf " not in one.evidence
