"""Where each known trap of the field has its test. A test that is renamed or gone is found here.

The numbers are those of the list of traps that the house was designed against. Traps of parts that
are not built yet (caching, several processes, ablation, checkpoints, profiling) are not in it.
"""

from __future__ import annotations

import ast
import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent
TRAPS = {
    "T1 an error keeps tensors alive": "notebook/test_free.py: no_tensor_of_the_step_is_alive",
    "T2 raise from None": "notebook/test_free.py: nor_when_errors_are_chained",
    "T3 frames cleared too late": "engine/test_letting_go.py: nothing_lives_that_only_the_error",
    "T4 collecting inside except": "engine/test_field.py: memory_is_collected_after_running_out",
    "T5 faces of out of memory": "engine/test_out_of_memory.py: running_out_of_memory_is_known_by",
    "T6 half an optimizer step": "engine/test_out_of_memory.py: a_fault_at_every_operation",
    "T7 BatchNorm counted twice": "engine/test_out_of_memory.py: a_fault_at_every_operation",
    "T8 scaler left unscaled": "engine/test_out_of_memory.py: a_fault_at_every_operation",
    "T9 the longest samples last": "engine/test_field.py: the_longest_samples_may_come_last",
    "T10 traces of a finder": "engine/test_precision.py: measuring_leaves_no_trace",
    "T11 a size that never ran": "engine/test_field.py: every_size_that_was_decided_was_run",
    "T12 allocated, reserved, used": "engine/test_gpu.py: readings_agree_with_a_known_allocation",
    "T12 on the host": "engine/test_field.py: a_known_tensor_is_in_the_reading_of_the_host",
    "T13 slow instead of out of memory": "policy/test_microbatch.py: a_smaller_size_measured_clear",
    "T14 collecting in every step": "engine/test_field.py: memory_is_collected_after_running_out",
    "T15 kernels tuned anew": "engine/test_field.py: every_size_that_was_decided_was_run",
    "T16 the loader's own batch size": "engine/test_field.py: the_persons_loader_tells_the_truth",
    "T17 workers started anew": "engine/test_field.py: workers_are_started_once_an_epoch",
    "T18 every sample once": "engine/test_out_of_memory.py: every_sample_is_used_once_in_order",
    "T19 batches of any kind": "engine/test_data.py: batches_of_any_nesting_are_cut",
    "T20 loaders of any kind": "engine/test_data.py: everything_else_is_read_as_it_comes",
    "T21 BatchNorm of one sample": "engine/test_watching.py: batch_statistics_keep_two_samples",
    "T22 copies beside the work": "engine/test_gpu.py: what_is_copied_beside_the_work",
    "T24 the last, smaller window": "engine/test_cutting.py: a_mean_over_samples",
    "T25 token losses": "engine/test_cutting.py: targets_left_out_by_ignore_index",
    "T26 a window that leaks": "engine/test_step.py: an_error_between_two_micro_batches",
    "T27 unscaled once": "engine/test_step.py: scaled_gradients_are_unscaled_before",
    "T28 one bad micro-batch": "engine/test_unstable.py: one_bad_micro_batch_of_several",
    "T29 a scale that collapses": "engine/test_unstable.py: a_model_that_overflows_at_every_scale",
    "T30 a half model": "engine/test_task.py: a_mistake_is_one_line_and_changes_nothing",
    "T31 a frozen model": "engine/test_task.py: a_mistake_is_one_line_and_changes_nothing",
    "T32 emulated bf16": "engine/test_precision.py: auto_asks_what_a_gpu_computes_natively",
    "T33 losses unsafe in fp16": "engine/test_field.py: a_loss_that_is_not_safe_in_half",
    "T34 fused optimizers and clipping": "engine/test_field.py: a_fused_optimizer_clips",
    "T35 reads of the device": "engine/test_step.py: the_host_reads_device_values_once_a_step",
    "T36 hysteresis": "policy/test_simulated_devices.py: few_failures_the_best_micro_batch",
    "T37 callbacks while a cell runs": "notebook/test_pump.py: a_slider_moves_while_the_cell_runs",
    "T38 callbacks on a thread": "notebook/test_in_the_field.py: callbacks_hammered_from",
    "T39 a flood of updates": "notebook/test_in_the_field.py: a_front_end_is_sent_at_most_five",
    "T40 widgets of old stacks": "notebook/test_in_the_field.py: the_panel_is_made_of_core_widgets",
    "T41 figures that leak": "notebook/test_in_the_field.py: no_figure_is_left",
    "T42 interrupts anywhere": "engine/test_exits.py: an_interrupt_at_any_line",
    "T43 output in the wrong cell": "notebook/test_in_the_field.py: all_that_a_run_shows",
    "T44 results that hold tensors": "notebook/test_free.py: a_finished_run_leaves_no_tensor",
    "T45 an optimizer of another model": "notebook/test_capture.py: an_optimizer_made_before_the",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_the_trap_has_its_test(trap: str) -> None:
    path, start = TRAPS[trap].split(": ")
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [name for name in names if name.startswith(f"test_{start}")], (
        f"{path} has no test_{start}"
    )
