"""P1: however a step is cut, its gradient is that of the mean loss over its samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import Transformer, cut, mlp, sentences, step_state, vectors
from torch import nn

import hybrid_magic as hm
from hybrid_magic.engine import nested
from hybrid_magic.engine.step import train_step

TOLERANCE = 1e-12  # relative, in float64: the sum's order is all that differs


def weights_after(
    model: nn.Module, compute: Any, batch: Any, sizes: list[int], **options: Any
) -> torch.Tensor:
    """The parameters after one step of SGD with learning rate 1: so, the gradient."""
    trained = copy.deepcopy(model).double()
    state = step_state(trained, compute, torch.optim.SGD(trained.parameters(), lr=1.0), **options)
    train_step(state, cut(batch, sizes, nested.rows))
    return torch.cat([p.detach().reshape(-1) for p in trained.parameters()])


def assert_cut_changes_nothing(
    model: nn.Module, compute: Any, batch: Any, sizes: list[int], **options: Any
) -> None:
    whole = weights_after(model, compute, batch, [sum(sizes)], **options)
    pieces = weights_after(model, compute, batch, sizes, **options)
    assert torch.linalg.vector_norm(pieces - whole) <= TOLERANCE * torch.linalg.vector_norm(whole)


cuts = st.lists(st.integers(1, 9), min_size=1, max_size=7)


def pair_loss(**kwargs: Any) -> Any:
    def compute(model: Any, batch: Any) -> Any:
        x, y = batch
        output = model(x.double() if x.is_floating_point() else x)
        return F.cross_entropy(output.flatten(0, -2), y.flatten(), **kwargs)

    return compute


@given(cuts)
@settings(deadline=None, max_examples=40)
def test_a_mean_over_samples(sizes: list[int]) -> None:
    assert_cut_changes_nothing(mlp(), pair_loss(), vectors(sum(sizes)), sizes)


@given(cuts)
@settings(deadline=None, max_examples=25)
def test_a_sum_over_samples(sizes: list[int]) -> None:
    assert_cut_changes_nothing(mlp(), pair_loss(reduction="sum"), vectors(sum(sizes)), sizes)


@given(cuts, st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_targets_left_out_by_ignore_index(sizes: list[int], seed: int) -> None:
    x, _ = sentences(sum(sizes))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, x.shape, generator=generator)
    labels[torch.rand(x.shape, generator=generator) < 0.4] = -100
    labels[0, 0] = 1  # at least one target counts
    assert_cut_changes_nothing(
        Transformer(tokens=True, dropout=0.0), pair_loss(), (x, labels), sizes
    )


@given(cuts, st.integers(0, 4))
@settings(deadline=None, max_examples=25)
def test_a_class_left_out_by_ignore_index(sizes: list[int], left_out: int) -> None:
    x, y = vectors(sum(sizes))
    y[0] = (left_out + 1) % 5  # at least one target counts
    assert_cut_changes_nothing(mlp(), pair_loss(ignore_index=left_out), (x, y), sizes)


@given(cuts)
@settings(deadline=None, max_examples=25)
def test_classes_that_weigh_differently(sizes: list[int]) -> None:
    weight = torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
    assert_cut_changes_nothing(
        mlp(), pair_loss(weight=weight, ignore_index=4), vectors(sum(sizes)), sizes
    )


@given(cuts)
@settings(deadline=None, max_examples=15)
def test_a_loss_with_another_term_beside_it(sizes: list[int]) -> None:
    def compute(model: Any, batch: Any) -> Any:
        x, y = batch
        output = model(x.double())
        return F.cross_entropy(output, y, label_smoothing=0.1) + 0.01 * output.square().mean()

    assert_cut_changes_nothing(mlp(), compute, vectors(sum(sizes)), sizes)


@given(cuts)
@settings(deadline=None, max_examples=15)
def test_a_sum_divided_by_the_number_of_samples_is_a_mean(sizes: list[int]) -> None:
    def compute(model: Any, batch: Any) -> Any:
        x, y = batch
        return F.cross_entropy(model(x.double()), y, reduction="sum") / len(y)

    assert_cut_changes_nothing(mlp(), compute, vectors(sum(sizes)), sizes)


def divided(model: Any, x: Any, y: Any) -> Any:
    return (
        F.cross_entropy(model(x), y, reduction="sum") / len(y)
        + 0.01 * model[0].weight.square().sum()
    )


def fixed_scale(model: Any, x: Any, y: Any) -> Any:
    return F.cross_entropy(model(x), y, reduction="sum") / 16


def by_hand_sum(model: Any, x: Any, y: Any) -> Any:
    return ((model(x) - 1) ** 2).sum()


def small_sum(model: Any, x: Any, y: Any) -> Any:
    return 1e-3 * F.mse_loss(model(x), F.one_hot(y, 5).double(), reduction="sum")


@given(sizes=cuts, loss=st.sampled_from([divided, fixed_scale, by_hand_sum, small_sum]))
@settings(deadline=None, max_examples=40)
def test_what_the_criterion_does_not_tell_is_tried_out(sizes: list[int], loss: Any) -> None:
    def compute(model: Any, batch: Any) -> Any:
        return loss(model, batch[0].double(), batch[1])

    assert_cut_changes_nothing(mlp(), compute, vectors(sum(sizes)), sizes)


def test_labels_that_look_like_the_inputs_at_first_are_still_told_apart() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.arange(40).reshape(5, 8) % 30
    labels = ids.clone()
    labels[3:, 4:] = -100  # the first micro-batch has no padding
    batch = {"input_ids": ids, "labels": labels}
    assert_cut_changes_nothing(model, lambda model, batch: model(**batch).loss, batch, [3, 2])


def test_a_loss_that_a_cut_must_change_says_so() -> None:
    def in_batch(model: Any, batch: Any) -> Any:
        output = F.normalize(model(batch[0]))
        return F.cross_entropy(output @ output.T, torch.arange(len(output)))

    model = mlp()
    batch = vectors(24)
    options: dict[str, Any] = {"precision": "fp32", "batch": "fixed", "micro": 8}
    run = hm.train(model, [batch], in_batch, **options)
    assert any("not the mean of its parts' losses" in note for note in run.notes)
    plain = hm.train(mlp(), [batch], precision="fp32", batch="fixed", micro=8)
    assert not any("not the mean" in note for note in plain.notes)


@given(cuts)
@settings(deadline=None, max_examples=15)
def test_a_sum_with_more_added_is_a_sum(sizes: list[int]) -> None:
    def compute(model: Any, batch: Any) -> Any:
        x, y = batch
        output = model(x.double())
        return F.cross_entropy(output, y, reduction="sum") + output.square().sum()

    assert_cut_changes_nothing(mlp(), compute, vectors(sum(sizes)), sizes)


@pytest.mark.parametrize("shifted", [True, False], ids=["causal", "masked"])
def test_a_transformers_model_counts_its_own_targets(shifted: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    if shifted:
        config = transformers.GPT2Config(
            vocab_size=30,
            n_positions=16,
            n_embd=16,
            n_layer=1,
            n_head=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            **small, num_hidden_layers=1, hidden_dropout_prob=0, attention_probs_dropout_prob=0
        )
        model = transformers.BertForMaskedLM(config)
    ids = torch.randint(0, 30, (9, 8))
    labels = ids.clone()
    labels[torch.rand(ids.shape) < 0.5] = -100
    labels[0, 3] = 5
    batch = {"input_ids": ids, "labels": labels}
    assert_cut_changes_nothing(model, lambda model, batch: model(**batch).loss, batch, [2, 4, 3])


def test_a_whole_step_without_targets_is_skipped_and_not_divided_by_zero() -> None:
    x, y = vectors(6)
    model = mlp()
    state = step_state(
        model,
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        torch.optim.SGD(model.parameters(), lr=1.0),
    )
    before = copy.deepcopy(model.state_dict())
    train_step(state, cut((x, y), [3, 3], nested.rows))
    moved = copy.deepcopy(model.state_dict())
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    result = train_step(state, cut((x, torch.full_like(y, -100)), [3, 3], nested.rows))
    assert result.skipped
    assert all(torch.equal(moved[name], value) for name, value in model.state_dict().items())
