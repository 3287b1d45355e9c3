"""The paper's table and the parts for a GPU run, on tiny sizes, and say what they should."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import types

import numpy as np
import pytest
import torch

import hybrid_magic as hm
from benchmarks import gpu, gpu_oom, gpu_parts, gpu_tuned, paper, paper_report, paper_works

pytest.importorskip("torchvision")
CPU = torch.device("cpu")
CIFAR = paper_works.Sizes("cifar", 1, 8, samples=16, val_samples=4, depth=18, stem=7, made_up=True)
IMDB = paper_works.Sizes(
    "imdb", 2, 8, samples=40, val_samples=16, size="tiny", length=12, made_up=True
)


@pytest.mark.parametrize("sizes", [CIFAR, IMDB], ids=["cifar", "imdb"])
def test_the_plain_loop_ends_in_the_weights_of_the_fp32_variant(sizes, monkeypatch):
    work, made, models = paper_works.open_work(sizes), paper_works.Work.model, []
    keep = lambda self, seed: models.append(made(self, seed)) or models[-1]
    monkeypatch.setattr(paper_works.Work, "model", keep)
    paper.by_hand(work, "plain", 3, CPU)
    optimizer = work.optimizer(work.model(3))
    hm.train(
        models[1], work.loader(3), paper_works.step, optimizer=optimizer, val=work.val_loader(),
        scheduler=work.scheduler(optimizer), epochs=sizes.epochs, seed=3,
        precision="fp32", batch="fixed", micro=8,
    )  # fmt: skip
    theirs, ours = (model.state_dict() for model in models)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_the_fp32_variant_is_the_plain_loop(reviews):
    plain = paper.by_hand(reviews, "plain", 3, CPU)
    fp32 = paper.by_package(reviews, "fp32", 3, CPU)
    for name in ("accuracy", "loss", "steps", "samples_seen"):
        assert getattr(fp32, name) == pytest.approx(getattr(plain, name), rel=1e-6)
    assert paper.by_hand(reviews, "plain", 4, CPU).loss != plain.loss


def trial(variant, seed, seconds=2.0, accuracy=0.5, **more):
    given = {"outcome": "finished", "steps": 4, "samples_seen": 32, "precision": "fp32"}
    return hm.TrialRecord(variant, seed, seconds=seconds, accuracy=accuracy, **(given | more))


@pytest.fixture
def counted(monkeypatch):
    """Trials that take no time; what was asked for."""
    asked = []

    def run(_work, variant, seed, _device):
        asked.append((variant, seed))
        return trial(variant, seed, peak_allocated_bytes=7)

    monkeypatch.setattr(paper, "by_hand", run)
    monkeypatch.setattr(paper, "by_package", run)
    return asked


@pytest.fixture(scope="module")
def reviews():
    return paper_works.open_work(IMDB)


def test_trials_take_turns_that_rotate_and_an_interrupted_benchmark_goes_on(
    counted, reviews, tmp_path, monkeypatch
):
    log = tmp_path / "paper.jsonl"
    variants = ("plain", "fp32", "hybrid")
    first = paper.run_trials(reviews, variants, 1, log, CPU)
    log.write_text(log.read_text() + '{"key": {"si')  # killed while it wrote
    trials = paper.run_trials(reviews, variants, 2, log, CPU)
    assert counted == [*((name, 0) for name in variants), ("fp32", 1), ("hybrid", 1), ("plain", 1)]
    assert trials[:3] == first
    assert trials[0].peak_allocated_bytes is None  # on a CPU it is the process's
    longer = paper_works.Work(dataclasses.replace(IMDB, epochs=9), reviews.train, reviews.val)
    paper.run_trials(longer, ("plain",), 1, log, CPU)
    assert counted[6:] == [("plain", 0)]
    monkeypatch.setattr(paper.measure, "package_digest", lambda: "changed")
    paper.run_trials(reviews, variants, 1, log, CPU)
    assert counted[7:] == [("fp32", 0), ("hybrid", 0)]  # the hand-written loop stands


def test_no_seed_is_begun_that_would_not_end_in_time(counted, reviews, tmp_path):
    late = time.monotonic() - 1
    assert len(paper.run_trials(reviews, ("plain",), 3, tmp_path / "a.jsonl", CPU, late)) == 1
    soon = time.monotonic() + 60
    assert len(paper.run_trials(reviews, ("plain",), 3, tmp_path / "b.jsonl", CPU, soon)) == 3


def test_differences_are_against_the_hand_written_loop_and_against_fp32(tmp_path, reviews):
    names = ("plain", "fp32", "hybrid")
    seconds = {"plain": 4.0, "fp32": 5.0, "hybrid": 2.0}
    trials = [trial(name, seed, seconds[name]) for seed in range(3) for name in names]
    by_hand, by_package = paper_report.ablations(trials, names)
    assert by_hand.variants[2].time_reduction_ratio == pytest.approx(0.5)
    assert by_package.names == ("fp32", "hybrid")
    assert by_package.variants[1].time_reduction_ratio == pytest.approx(0.6)
    page = paper_report.save(
        tmp_path / "paper", {"command": "x"}, [(paper_report.described(reviews), [by_hand])]
    )
    assert "| hybrid | fp32 | 3 | 4 | 2.00 ± 0.00 | 50.0 [50.0, 50.0] | 2.00 ± 0.00 |" in page
    assert "not BERT-base's size" in page
    assert "made-up data" in page
    (work,) = json.loads((tmp_path / "paper.json").read_text())["works"]
    assert len(work["against"][0]["trials"]) == 9
    assert "tabular" in (tmp_path / "paper.tex").read_text()


def test_what_ran_out_of_memory_is_a_row(reviews, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(paper, "train_by_hand", full)
    found = paper.by_hand(reviews, "plain", 0, CPU)
    assert (found.outcome, found.seconds, found.accuracy) == ("oom", None, None)
    text = paper_report.compared(hm.Ablation(trials=[found, trial("fp32", 0)]))
    assert "| plain |  | oom |" in text


def test_all_are_judged_in_strict_fp32():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
            seen.append((torch.is_autocast_enabled("cpu"), *flags))
            return x

    x, y = torch.eye(4), torch.tensor([0, 1, 2, 0])
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        paper_works.step(Spy().train(), (x, y))
        _, named = paper_works.step(Spy().eval(), (x, y))
    assert [found[0] for found in seen] == [True, False]
    assert seen[1] == (False, False, False)
    assert named["accuracy"] == 0.75
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize(("variant", "convolutions"), [("plain", False), ("shipped", True)])
def test_the_plain_loop_is_strict_and_the_shipped_one_as_pytorch_ships(
    variant, convolutions, reviews, monkeypatch
):
    seen = []

    def look(*_):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        raise torch.OutOfMemoryError("enough")

    monkeypatch.setattr(paper, "train_by_hand", look)
    paper.by_hand(reviews, variant, 0, CPU)
    assert seen == [(convolutions, False)]


def test_a_work_cut_down_keeps_what_was_fitted(reviews):
    less = reviews.cut(dataclasses.replace(IMDB, samples=10, val_samples=5))
    assert (len(less.train), len(less.val)) == (10, 5)
    assert torch.equal(less.train[9][0], reviews.train[9][0])
    assert reviews.cut(dataclasses.replace(IMDB, samples=None)).loader(0).dataset[39]


def test_images_are_cropped_and_flipped_anew_and_words_are_known_from_training_alone(reviews):
    images = paper_works.open_work(CIFAR)
    one, other = images.train[0][0], images.train[0][0]
    assert one.shape == (3, 32, 32)
    assert not torch.equal(one, other)
    assert images.val[0][0].shape == (3, 32, 32)
    train, val = paper_works._reviews(
        ["a b a"], np.array([0]), ["a c", ""], np.array([1, 0]), length=4, most=9
    )
    assert train.tensors[0].tolist() == [[2, 3, 2, 0]]
    assert val.tensors[0].tolist() == [[2, 1, 0, 0], [1, 0, 0, 0]]


def test_the_order_of_samples_follows_from_the_seed_alone(reviews):
    orders = []
    for drawn in (0, 1):
        torch.manual_seed(drawn)
        orders.append(list(reviews.loader(3).sampler))
    assert orders[0] == orders[1] != list(reviews.loader(4).sampler)


def test_the_learning_rate_rises_and_falls_to_nothing_over_the_samples(reviews):
    optimizer = reviews.optimizer(reviews.model(0))
    peak = optimizer.param_groups[0]["lr"]
    scheduler = reviews.scheduler(optimizer)
    rates = []
    for _ in range(10):  # two epochs of five batches
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert (
        max(rates)
        <= paper_works.ENCODERS["tiny"][-1] * math.sqrt(8 / 64)
        == pytest.approx(max(peak, rates[0]))
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
    assert sorted(rates, reverse=True) == rates


@pytest.mark.parametrize("data", ["made up", "real"])
def test_the_whole_program_from_its_command_line(data, tmp_path, capsys, monkeypatch):
    if data == "made up":
        monkeypatch.setitem(paper.FOR_SMOKE, "made_up", True)
    elif not os.environ.get("HYBRID_MAGIC_DATA"):
        pytest.skip("HYBRID_MAGIC_DATA names no folder with the data")
    sizes = "--samples 64 --val-samples 50 --length 16 --seeds 1 --minutes 5 --device cpu"
    asked = ["--smoke", "--work", "imdb", "--variants", "plain,fp32", *sizes.split()]
    paper.main([*asked, "--out", str(tmp_path)])
    page = (tmp_path / "paper_smoke.md").read_text()
    assert capsys.readouterr().out.endswith(page + "\n")
    assert "64 samples" in page
    assert ("made-up data" in page) == (data == "made up")
    assert "--work imdb --variants plain,fp32 --seeds 1 --minutes 5.0 --smoke" in page
    assert str(tmp_path) not in page
    assert len((tmp_path / "paper_smoke.jsonl").read_text().splitlines()) == 2


# -- the GPU's program


def test_a_part_tried_out_on_a_cpu_writes_json_and_a_page_that_says_so(tmp_path, capsys):
    gpu.main(["--dry-run", "--part", "transformer", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "dry_gpu_transformer.json").read_text())
    assert found["dry_run"] is True
    assert {trial["variant"] for trial in found["against"][0]["trials"]} == {
        *("plain", "fp32", "hybrid:bf16")
    }
    assert {"machine", "torch", "command"} <= set(found["environment"])
    page = (tmp_path / "dry_gpu_transformer.md").read_text()
    assert "nothing here is a measurement" in page
    assert "made-up data" in page
    capsys.readouterr()


@pytest.mark.parametrize("part", ["handtuned", "accuracy-target"])
def test_the_hand_measured_parts_fill_their_tables(part, tmp_path, capsys, monkeypatch):
    sizes = gpu_parts.Bench.sizes
    monkeypatch.setattr(gpu_parts.Bench, "sizes", lambda self, work, **_: sizes(self, "imdb"))
    gpu.main(["--dry-run", "--part", part, "--out", str(tmp_path)])
    page = (tmp_path / f"dry_gpu_{part.replace('-', '_')}.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 2
    capsys.readouterr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("part", gpu.NEED_CUDA)
def test_what_needs_cuda_says_so_in_one_line(part, tmp_path, capsys):
    gpu.main(["--dry-run", "--part", part, "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"{part}: needs a CUDA device; nothing was measured\n"
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main(["--part", part, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


class Limited(torch.nn.Module):
    """Runs out of memory on more than `Limited.most` samples, as a GPU would."""

    most = 10**9

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if len(x) > Limited.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.inner(x)


@pytest.fixture
def limited(monkeypatch):
    """A CPU that stands in for a GPU whose process can be given less memory."""
    made = paper_works.Work.model
    monkeypatch.setattr(paper_works.Work, "model", lambda *given: Limited(made(*given)))
    allowed = lambda share, _: monkeypatch.setattr(Limited, "most", 10**9 if share == 1 else 3)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", allowed)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    total = types.SimpleNamespace(total_memory=2**40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)


def test_a_forced_out_of_memory_error_is_counted_and_found_to_leave_no_trace(limited):
    row = gpu_oom.Forced(dataclasses.replace(IMDB, samples=16), "fp32", CPU).row()
    assert row["retries"] >= 1
    assert row["went on with"] <= 3
    assert (row["equal"], row["repeats"]) == ("yes", "yes")
    assert Limited.most == 10**9  # what the process may have was put back


def test_memory_at_equal_global_batch_is_told_with_what_half_of_it_allows(limited, monkeypatch):
    monkeypatch.setattr(Limited, "most", 4)
    found = gpu_parts._within(paper_works.open_work(IMDB), 2**40, "fp32", CPU)
    assert found["out_of_memory_errors"] >= 1
    assert max(found["micro_batches"]) <= 4
    assert "in micro-batches of" in gpu_parts._halved(found)
    monkeypatch.setattr(Limited, "most", 0)
    found = gpu_parts._within(paper_works.open_work(IMDB), 2**40, "fp32", CPU)
    assert "out of memory" in gpu_parts._halved(found)


def test_the_largest_useful_batch_is_where_doubling_stops_to_pay(reviews, monkeypatch):
    speeds = {8: 100.0, 16: 190.0}
    monkeypatch.setattr(gpu_tuned, "_by_hand", lambda _w, batch, *_: speeds[batch])
    assert gpu_tuned._largest(reviews, CPU) == (16, speeds)  # there are 16 samples
    speeds[16] = 102.0
    assert gpu_tuned._largest(reviews, CPU) == (8, speeds)

    def full(_work, batch, *_):
        if batch > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 1.0

    monkeypatch.setattr(gpu_tuned, "_by_hand", full)
    assert gpu_tuned._largest(reviews, CPU) == (8, {8: 1.0, 16: None})


def test_the_clock_takes_epochs_first_and_then_samples():
    sizes = paper_works.Sizes("cifar", 10, 100)
    fitted = lambda seconds: gpu_parts.fitted(sizes, (10_000, 3_000), 1e-3, (1.0, 0.5), 2, seconds)
    assert fitted(1e6) == (sizes, [])
    # an epoch of two seeds and two variants: 30 s of training, 4 s of judging
    assert fitted(3 * 34)[0] == dataclasses.replace(sizes, epochs=3)
    less, said = fitted(17)
    assert (less.epochs, less.samples, less.val_samples) == (1, 5_000, 1_500)
    assert said == ["epochs 1 of 10", "samples 5000 of 10000", "val_samples 1500 of 3000"]
    assert fitted(0)[0].samples == 1_000


def test_data_carried_in_pieces_are_one_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("HYBRID_MAGIC_DATA", raising=False)
    for piece, name in (("a", "imdb/train.x"), ("b", "imdb/test.x"), ("b", "small/y")):
        (tmp_path / piece / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / piece / name).write_text(name)
    with gpu.data_from([tmp_path / "a", tmp_path / "b"]):
        folder = os.environ["HYBRID_MAGIC_DATA"]
        assert sorted(os.listdir(f"{folder}/imdb")) == ["test.x", "train.x"]
        assert gpu_parts.only_small("cifar")
        assert not gpu_parts.only_small("imdb")
    assert "HYBRID_MAGIC_DATA" not in os.environ


def test_only_what_the_device_computes_natively_is_compared(monkeypatch):
    device = torch.device("cuda")
    for major, wanted in ((9, {"tf32", "mp:bf16", "hybrid:fp16"}), (7, {"mp:fp16"})):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, m=major: (m, 0))
        variants = gpu.variants_on(device)
        assert wanted <= set(variants)
        assert ("tf32" in variants) == ("mp:bf16" in variants) == (major >= 8)
        assert variants[:2] == ("plain", "fp32")
