"""What a loop keeps of its micro-batches, put together as the whole batch has it, or refused."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hybrid_magic.engine.merge import Unmergeable, merge, merged

SIZES, WEIGHTS = [3, 2], [0.6, 0.4]


def whole(*parts: Any, sizes: list[int] | None = None, weights: list[float] | None = None) -> Any:
    return merge(parts, sizes or SIZES, weights or WEIGHTS)


def cut(value: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return list(value.split(sizes))


# -- properties --


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.integers(0, 3))
def test_rows_come_back_in_their_order_however_they_were_cut(sizes: list[int], width: int) -> None:
    rows = torch.arange(sum(sizes) * (width + 1)).reshape(sum(sizes), width + 1)
    again = merge(cut(rows, sizes), sizes, [1.0] * len(sizes))
    assert torch.equal(again, rows)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_the_mean_over_samples_comes_back_however_they_were_cut(sizes: list[int]) -> None:
    values = torch.randn(sum(sizes), dtype=torch.float64)
    weights = [n / sum(sizes) for n in sizes]
    means = [part.mean() for part in cut(values, sizes)]
    assert float(merge(means, sizes, weights)) == pytest.approx(float(values.mean()), abs=1e-12)
    numbers = [float(mean) for mean in means]
    assert merge(numbers, sizes, weights) == pytest.approx(float(values.mean()), abs=1e-12)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_counts_and_lists_of_samples_come_back_however_they_were_cut(sizes: list[int]) -> None:
    names = [f"sample {number}" for number in range(sum(sizes))]
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    parts = [names[end - n : end] for end, n in zip(ends, sizes, strict=True)]
    assert merge(parts, sizes, [1.0] * len(sizes)) == names
    assert merge(sizes, sizes, [1.0] * len(sizes)) == len(names)


# -- kinds --


def test_a_loss_is_the_sum_by_weight_and_keeps_no_graph() -> None:
    parts = [torch.tensor(2.0, requires_grad=True) * 1, torch.tensor(3.0, requires_grad=True) * 1]
    loss = whole(*parts)
    assert float(loss) == pytest.approx(2.4)
    assert not loss.requires_grad
    assert float(whole(*parts, weights=[1.0, 1.0])) == 5.0  # a sum over samples


def test_a_micro_batch_in_which_nothing_counts_leaves_no_nan() -> None:
    assert float(whole(torch.tensor(2.0), torch.tensor(float("nan")), weights=[1.0, 0.0])) == 2.0
    assert whole(2.0, float("nan"), weights=[1.0, 0.0]) == 2.0


def test_counted_tensors_are_added_up() -> None:
    correct = whole(torch.tensor(2), torch.tensor(2))
    assert (int(correct), correct.dtype) == (4, torch.int64)


def test_rows_keep_no_graph() -> None:
    out = whole(torch.ones(3, 2, requires_grad=True) * 2, torch.ones(2, 2, requires_grad=True) * 2)
    assert out.shape == (5, 2)
    assert not out.requires_grad


def test_what_is_the_same_object_or_equal_is_kept() -> None:
    model, mask = nn.Linear(1, 1), torch.eye(4)
    assert whole(model, model) is model
    assert whole(len, len) is len
    assert torch.equal(whole(mask, mask.clone()), mask)
    assert whole("train", "train") == "train"
    assert whole(7, 7) == 7
    assert whole(0.5, 0.5) == 0.5
    assert whole(None, None) is None
    assert whole(torch.tensor(True), torch.tensor(True))
    assert whole(torch.float32, torch.float32) == torch.float32


@dataclasses.dataclass(frozen=True)
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


Pair = collections.namedtuple("Pair", "rows count")


def test_containers_are_merged_part_by_part() -> None:
    def part(n: int) -> dict[str, Any]:
        rows = torch.arange(n)
        return {
            "out": Output(torch.tensor(float(n)), torch.full((n, 2), float(n))),
            "pair": Pair(rows, n),
            "two": (rows, [rows.float() + 1, rows.double()]),
        }

    found = whole(part(3), part(2))
    assert float(found["out"].loss) == pytest.approx(3 * 0.6 + 2 * 0.4)
    assert found["out"].logits.tolist() == [[3, 3]] * 3 + [[2, 2]] * 2
    assert found["pair"].rows.tolist() == [0, 1, 2, 0, 1]
    assert found["pair"].count == 5
    assert found["two"][1][0].tolist() == [1, 2, 3, 1, 2]


def test_an_output_of_transformers_stays_one() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    parts = [
        outputs.SequenceClassifierOutput(loss=torch.tensor(float(n)), logits=torch.ones(n, 4))
        for n in SIZES
    ]
    found = whole(*parts)
    assert type(found) is type(parts[0])
    assert found.logits.shape == (5, 4)
    assert float(found["loss"]) == pytest.approx(2.6)
    assert parts[0].logits.shape == (3, 4)


def test_arrays_of_numpy_go_like_tensors() -> None:
    assert whole(np.arange(3), np.arange(2)).tolist() == [0, 1, 2, 0, 1]
    mean = whole(np.float32(2), np.float32(3))
    assert isinstance(mean, np.float32)
    assert mean == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((torch.ones(1, 3), torch.ones(1, 2)), r"its shapes, \[1, 3\] and \[1, 2\]"),
        ((torch.ones(3, 3), torch.ones(2, 2)), "its rows differ in shape"),
        ((torch.ones(3), torch.ones(2, 1)), "differ in kind"),
        ((torch.tensor(True), torch.tensor(False)), "true in one micro-batch"),
        ((True, False), "a bool that differs"),
        (("a", "b"), "a str that differs"),
        ((3, 1), "an? int that differs"),
        ((1, "b"), "now a int and now a str"),
        (([1], [1, 2, 3]), "1 items and 3"),
        (({"a": 1}, {"b": 1}), "other keys"),
        (({"a": object()}, {"a": object()}), "of its a: it is a object that differs"),
    ],
)
def test_what_does_not_tell_is_refused(parts: Any, why: str) -> None:
    with pytest.raises(Unmergeable, match=why):
        whole(*parts)


def test_what_could_be_samples_or_could_be_not_is_refused() -> None:
    mask = torch.eye(3)
    with pytest.raises(Unmergeable, match="the same"):
        whole(mask, mask.clone(), sizes=[3, 3])
    losses = [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)]
    for several in ([mask] * 3, losses, [1.0, 2.0, 3.0]):
        with pytest.raises(Unmergeable, match="3 values, as many as samples"):
            whole(several, list(several), sizes=[3, 3])


def test_a_tuple_is_no_list_of_samples_and_a_shape_is_the_wholes() -> None:
    loss, x = torch.tensor(1.0), torch.ones(2, 7)
    assert [float(part) for part in whole((loss, loss + 1), (loss, loss + 2), sizes=[2, 2])] == [
        1.0,
        pytest.approx(2.4),
    ]
    assert whole(x.shape, x.shape, sizes=[2, 2]) == (4, 7)


def test_one_micro_batch_gives_back_the_very_objects() -> None:
    out = torch.ones(3, requires_grad=True) * 2
    assert merged([{"out": out}], [3], [1.0])["out"] is out


def test_a_refusal_names_the_value() -> None:
    with pytest.raises(Unmergeable, match="^hidden: its shapes"):
        merged([{"hidden": torch.ones(1, 3)}, {"hidden": torch.ones(1, 2)}], SIZES, WEIGHTS)
    with pytest.raises(Unmergeable, match="^extra: not every micro-batch has it"):
        merged([{"extra": 1}, {}], SIZES, WEIGHTS)
