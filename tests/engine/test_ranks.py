"""Several processes train what one process trains: every sample once, the same weights.

The processes are torchrun's, on this machine, over gloo; `ranks_works` is what they do.
"""

import os
import pathlib
import subprocess
import sys

import pytest
import ranks_works
import torch

from hybrid_magic.engine.summing import _laid_out

pytestmark = pytest.mark.slow
PROGRAM = pathlib.Path(ranks_works.__file__)
LIKE_ONE = [
    "a_fixed_batch", "token_losses", "a_sum", "an_iterable", "a_list_of_batches",
    "worker_processes", "memory_that_runs_out_in_one", "validation", "unused_weights",
    "a_loss_that_is_not_finite_in_one", "other_models", "a_last_step_of_one_sample",
    "a_share_without_targets", "memory_for_one_sample_each",
]  # fmt: skip

OF_FOUR = [
    "a_fixed_batch", "token_losses", "an_iterable", "memory_that_runs_out_in_one",
    "unused_weights", "gone_on_with", "dropout", "batch_norm", "too_small_a_batch",
    "a_last_step_of_one_sample", "a_share_without_targets", "memory_for_one_sample_each",
]  # fmt: skip
BY_WORK = [(work, n) for n in (2, 4) for work in LIKE_ONE if n == 2 or work in OF_FOUR]


def launched(folder, processes):
    """Begin to run works in so many processes of torchrun, one: in a plain one; in four not all."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORKS_FOLDER": str(folder)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(PROGRAM), str(folder)]
    command += OF_FOUR if processes == 4 else []
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process of 1, 2 and 4 has seen: {processes: [{work: what}, one a process]}."""
    folder = tmp_path_factory.mktemp("ranks")
    for processes in ((1, 2), (4,)):
        running = [launched(folder, n) for n in processes]
        for each in running:
            said, _ = each.communicate(timeout=170)
            assert each.returncode == 0, said.decode()[-3000:]
    vars(sys.modules["__main__"]).setdefault("Seen", ranks_works.Seen)
    return {"folder": folder} | {
        n: [torch.load(folder / f"{n}-{rank}.pt", weights_only=False) for rank in range(n)]
        for n in (1, 2, 4)
    }


def far(one, other):
    """Return the largest difference of two sets of weights, relative to the largest weight."""
    most = 0.0
    for name, value in one.items():
        apart = (value.double() - other[name].double()).abs().max()
        most = max(most, float(apart / value.double().abs().max().clamp(min=1e-9)))
    return most


def alike(results):
    """Return whether all processes ended with the same bits."""
    first = results[0]["weights"]
    return all(
        torch.equal(value, each["weights"][name])
        for each in results
        for name, value in first.items()
    )


@pytest.mark.parametrize(("work", "processes"), BY_WORK)
def test_weights_and_samples_are_those_of_one_process(found, work, processes):
    (one,), results = ([each[work] for each in found[n]] for n in (1, processes))
    assert far(one["weights"], results[0]["weights"]) < 1e-12
    assert alike(results)
    assert sorted(n for each in results for n in each["samples"]) == one["samples"]
    for total in ("outcome", "steps", "samples_seen", "skipped_steps"):
        assert results[0]["summary"][total] == one["summary"][total]
    assert results[0]["lr"] == one["lr"]
    assert results[0]["summary"]["final_loss"] == pytest.approx(one["summary"]["final_loss"])
    for there, here in zip(
        results[0]["summary"]["metrics"], one["summary"]["metrics"], strict=True
    ):
        assert there == pytest.approx(here)


def test_a_growing_batch_is_decided_alike_and_its_run_replayed_by_one_process(found):
    results = [each["a_growing_batch"] for each in found[2]]
    assert alike(results)
    assert all(each["sizes"] == results[0]["sizes"] for each in results)
    assert any(what == "global" for _, what, *_ in results[0]["changes"])  # it grew
    assert any(results[0]["noise"])
    again = ranks_works.a_growing_batch(replay=results[0]["run"], batch="adaptive", micro="auto")
    assert far(again["weights"], results[0]["weights"]) < 1e-11
    assert sorted(n for each in results for n in each["samples"]) == again["samples"]


@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_gone_on_with_ends_bit_equal_in_every_process(found, processes):
    for each in (results["gone_on_with"] for results in found[processes]):
        whole, gone_on = each["whole"], each["gone_on"]
        assert far(whole["weights"], gone_on["weights"]) == 0
        assert whole["summary"]["steps"] == gone_on["summary"]["steps"]
    assert alike([results["gone_on_with"]["gone_on"] for results in found[processes]])


def test_a_checkpoint_of_two_processes_is_gone_on_with_by_one(found, tmp_path):
    whole = ranks_works.half_way(tmp_path / "whole", None)
    gone_on = ranks_works.half_way(found["folder"] / "half of 2", None)
    assert far(whole["weights"], gone_on["weights"]) < 1e-12
    used = [*gone_on["samples"], *(n for each in found[2] for n in each["half_way"]["samples"])]
    assert sorted(used) == whole["samples"]
    assert "in 2 processes and goes on" in " ".join(gone_on["notes"])


@pytest.mark.parametrize(
    ("work", "processes"),
    [("batch_norm", 2), ("batch_norm", 4), ("dropout", 2), ("dropout", 4), ("half_precision", 2)],
)
def test_what_cannot_equal_one_process_ends_alike_in_all(found, work, processes):
    results = [each[work] for each in found[processes]]
    assert alike(results)
    assert results[0]["summary"]["samples_seen"] == found[1][0][work]["summary"]["samples_seen"]
    assert results[0]["summary"]["final_loss"] < 1.3
    if work == "batch_norm":
        assert "what is learned of them is averaged" in " ".join(results[0]["notes"])
    if work == "dropout":  # each draws its own numbers
        assert len({tuple(each["drawn"]) for each in results}) == processes
    if work == "half_precision":
        one = found[1][0][work]["weights"]
        assert far(one, results[0]["weights"]) < 5e-3


def test_memory_that_runs_out_in_one_process_is_answered_by_all(found):
    results = [each["memory_that_runs_out_in_one"] for each in found[2]]
    assert all(each["summary"]["retries"] >= 1 for each in results)
    assert max(max(sizes) for sizes in results[0]["sizes"]) <= 2 * 4


@pytest.mark.parametrize("work", ["stopped_by_hand", "minutes"])
def test_what_is_asked_of_the_first_process_ends_all_at_the_same_step(found, work):
    results = [each[work] for each in found[2]]
    assert alike(results)
    assert len({each["summary"]["steps"] for each in results}) == 1
    used = sorted(n for each in results for n in each["samples"])
    assert len(used) == results[0]["summary"]["samples_seen"]
    if work == "stopped_by_hand":
        assert all(each["summary"]["outcome"] == "stopped" for each in results)
        assert all(each["changes"] == results[0]["changes"] for each in results)
        assert results[1]["lr"][-1] == pytest.approx(0.05)


def test_a_batch_smaller_than_the_processes_is_refused_before_anything_changes(found):
    for each in (results["too_small_a_batch"] for results in found[4]):
        assert "a step has 1 samples of the loader, and there are 4 processes" in each["error"]
        assert each["same"]


def test_no_memory_to_keep_gradients_is_answered_by_all(found):
    results = [each["no_memory_to_keep_gradients"] for each in found[2]]
    assert [each["struck"] for each in results] == [0, 1]
    assert all(each["summary"]["outcome"] == "finished" for each in results)
    assert all(each["summary"]["retries"] == 1 for each in results)
    assert alike(results)


def test_buffers_that_each_process_makes_of_its_data_stay(found):
    results = [each["buffers_of_other_shapes"] for each in found[2]]
    assert all(each["summary"]["outcome"] == "finished" for each in results)


def test_the_model_that_is_validated_is_the_one_that_is_kept(found):
    for each in (results["validated_batch_norm"] for results in found[2]):
        assert each["said"] == pytest.approx(each["truly"])


def test_a_validation_loader_that_is_shared_out_already_is_refused(found):
    for each in (results["shared_out_already"] for results in found[2]):
        assert "the validation loader has a DistributedSampler" in each["error"]


@pytest.mark.parametrize("work", ["interrupted_in_a_step", "interrupted_while_it_reads"])
def test_an_interrupt_of_one_process_ends_all_at_the_same_step_with_its_checkpoint(found, work):
    results = [each[work] for each in found[2]]
    assert all(each["outcome"] == "interrupted" for each in results)
    (steps,) = {each["steps"] for each in results}
    assert steps > 0
    assert results[0]["checkpoints"] == [f"checkpoint-{steps:08d}.pt"]


def test_what_is_summed_is_laid_out_as_the_weights_are():
    param = torch.empty(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    for each in (param, param[:, :, :1, :1], torch.empty(4, 3).t(), torch.empty(5)):
        flat = torch.arange(each.numel() + 3.0)[3:]
        made = _laid_out(flat, each)
        assert made.shape == each.shape
        assert sorted(made.flatten().tolist()) == flat.tolist()
        if each.is_contiguous() or each is param:
            assert made.stride() == each.stride()
