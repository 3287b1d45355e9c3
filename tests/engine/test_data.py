"""P2: every sample once, in the loader's own order, at any sequence of sizes."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import multiprocessing
import pickle
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data._utils.pin_memory import pin_memory

from hybrid_magic.engine import nested
from hybrid_magic.engine.sampled import open_feed
from hybrid_magic.errors import HybridMagicError
from hybrid_magic.policy.facts import StepPlan


class Numbered(Dataset[Any]):
    """Sample i is the number i, under any collate."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(int(index)), torch.full((3,), float(index))


class Stream(IterableDataset[Any]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Any]:
        return iter(torch.arange(self.n))


class Endless(Sampler[int]):
    """A sampler that says it is shorter than it is, and one that says nothing."""

    def __init__(self, n: int, said: int | None) -> None:
        self.n, self.said = n, said

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))

    def __len__(self) -> int:
        if self.said is None:
            raise TypeError
        return self.said


def planner(sizes: list[list[int]]) -> Any:
    """Plans steps of these sizes, over and over, cut to what remains."""
    steps = itertools.cycle(sizes)

    def plan(remaining: int | None) -> StepPlan:
        wanted = next(steps)
        if remaining is not None:
            left, cut = remaining, []
            for size in wanted:
                cut.append(min(size, left))
                left -= cut[-1]
            wanted = [size for size in cut if size]
        return StepPlan(tuple(wanted), False)

    return plan


def numbers(batch: Any) -> list[int]:
    first = next(leaf for leaf in nested.leaves(batch) if isinstance(leaf, torch.Tensor))
    return [int(value) for value in first.reshape(len(first), -1)[:, 0]]


def read(loader: Any, sizes: list[list[int]], **options: Any) -> list[list[list[int]]]:
    """The samples of one epoch: steps of micro-batches of numbers."""
    feed = open_feed(loader, "train_loader", **options)
    try:
        steps = list(feed.epoch(planner(sizes)))
    finally:
        feed.close()
    for step in steps:
        assert [len(numbers(batch)) for batch in step.batches] == step.sizes
    return [[numbers(batch) for batch in step.batches] for step in steps]


def flat(steps: list[list[list[int]]]) -> list[int]:
    return [number for step in steps for batch in step for number in batch]


def plain(loader: Any) -> list[int]:
    return [number for batch in loader for number in numbers(batch)]


cuts = st.lists(st.lists(st.integers(1, 13), min_size=1, max_size=4), min_size=1, max_size=5)


@given(
    n=st.integers(1, 70),
    base=st.integers(1, 11),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    tensors=st.booleans(),
    sizes=cuts,
)
@settings(max_examples=120)
def test_a_map_style_loader_yields_its_samples_in_its_order(
    n: int, base: int, shuffle: bool, drop_last: bool, tensors: bool, sizes: list[list[int]]
) -> None:
    dataset = TensorDataset(torch.arange(n), torch.zeros(n)) if tensors else Numbered(n)
    loader = DataLoader(dataset, batch_size=base, shuffle=shuffle, drop_last=drop_last)
    if len(loader) == 0:
        with pytest.raises(HybridMagicError, match="train_loader is empty"):
            open_feed(loader, "train_loader")
        return
    torch.manual_seed(4)
    expected = plain(loader)
    after_plain = torch.get_rng_state()
    torch.manual_seed(4)
    assert flat(read(loader, sizes)) == expected
    assert torch.equal(torch.get_rng_state(), after_plain)
    assert loader.batch_size == base


@given(
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    kind=st.sampled_from(["list", "generator", "batch sampler", "iterable", "unbatched"]),
    sizes=cuts,
)
@settings(max_examples=100)
def test_everything_else_is_read_as_it_comes_and_cut(
    batches: list[int], kind: str, sizes: list[list[int]]
) -> None:
    n = sum(batches)
    ends = list(itertools.accumulate(batches))
    groups = [list(range(end - size, end)) for size, end in zip(batches, ends, strict=True)]
    loaders = {
        "list": lambda: [torch.tensor(group) for group in groups],
        "generator": lambda: (torch.tensor(group) for group in groups),
        "batch sampler": lambda: DataLoader(Numbered(n), batch_sampler=groups),
        "iterable": lambda: DataLoader(Stream(n), batch_size=batches[0]),
        "unbatched": lambda: DataLoader([torch.tensor(group) for group in groups], batch_size=None),
    }
    steps = read(loaders[kind](), sizes)
    assert flat(steps) == list(range(n))
    # all steps but the last hold the samples planned; none is joined over a batch's end
    most = max(batches) if kind != "iterable" else batches[0]
    assert all(len(batch) <= most for step in steps for batch in step)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("sizes", [[[8]], [[3, 3, 2], [16], [5, 1]]])
def test_worker_processes_keep_the_order_and_end_with_the_epoch(
    workers: int, sizes: list[list[int]]
) -> None:
    loader = DataLoader(Numbered(61), batch_size=8, shuffle=True, num_workers=workers)
    torch.manual_seed(4)
    expected = plain(loader)
    torch.manual_seed(4)
    assert flat(read(loader, sizes)) == expected
    gc.collect()
    assert multiprocessing.active_children() == []


def test_persistent_workers_serve_every_epoch_and_end_with_the_feed() -> None:
    loader = DataLoader(Numbered(20), batch_size=4, num_workers=2, persistent_workers=True)
    feed = open_feed(loader, "train_loader")
    for _ in range(3):
        steps = list(feed.epoch(planner([[3, 2]])))
        assert [
            number for step in steps for batch in step.batches for number in numbers(batch)
        ] == list(range(20))
    assert len(multiprocessing.active_children()) == 2
    feed.close()
    assert multiprocessing.active_children() == []


def test_an_epoch_left_early_leaves_no_worker_behind() -> None:
    loader = DataLoader(Numbered(400), batch_size=4, num_workers=2)
    feed = open_feed(loader, "train_loader")
    stream = feed.epoch(planner([[4]]))
    next(stream)
    stream.close()
    feed.close()
    gc.collect()
    assert multiprocessing.active_children() == []


def test_a_new_plan_acts_once_what_the_workers_were_asked_for_is_used() -> None:
    asked: list[int] = []

    def plan(remaining: int | None) -> StepPlan:
        asked.append(1)
        return StepPlan((4,) if len(asked) < 10 else (8,), False)

    feed = open_feed(
        DataLoader(Numbered(100), batch_size=4, num_workers=2, prefetch_factor=2), "train_loader"
    )
    sizes = [step.sizes[0] for step in feed.epoch(plan)]
    feed.close()
    assert sizes == [4] * 9 + [8] * 8


@pytest.mark.parametrize("said", [10, 23, 40, None])
def test_a_sampler_that_misstates_its_length_loses_no_sample(said: int | None) -> None:
    loader = DataLoader(Numbered(50), batch_size=4, sampler=Endless(23, said))
    assert flat(read(loader, [[3, 4], [6]])) == list(range(23))


def test_sampling_with_replacement_keeps_its_draws() -> None:
    sampler = WeightedRandomSampler([1.0] * 20, 50)
    loader = DataLoader(Numbered(20), batch_size=6, sampler=sampler)
    torch.manual_seed(4)
    expected = plain(loader)
    torch.manual_seed(4)
    assert flat(read(loader, [[5, 9]])) == expected


def test_a_step_of_the_base_batch_is_one_batch_as_it_comes() -> None:
    batches = [torch.arange(start, start + size) for start, size in [(0, 4), (4, 7), (11, 2)]]
    assert [sum(map(len, step)) for step in read(batches, [[4]])] == [4, 7, 2]


@pytest.mark.parametrize("tensors", [True, False])
def test_a_sampler_may_yield_indices_that_are_tensors(tensors: bool) -> None:
    dataset = TensorDataset(torch.arange(50), torch.zeros(50)) if tensors else Numbered(50)
    loader = DataLoader(dataset, batch_size=16, sampler=SubsetRandomSampler(torch.arange(33)))
    torch.manual_seed(4)
    expected = plain(loader)
    torch.manual_seed(4)
    assert flat(read(loader, [[16]])) == expected
    torch.manual_seed(4)
    assert flat(read(loader, [[5, 1, 10]])) == expected


def test_custom_collate_is_handed_the_micro_batches() -> None:
    def pad(samples: list[Any]) -> dict[str, torch.Tensor]:
        return {
            "ids": torch.stack([number for number, _ in samples]),
            "n": torch.tensor(len(samples)),
        }

    loader = DataLoader(Numbered(10), batch_size=4, collate_fn=pad)
    feed = open_feed(loader, "train_loader")
    assert [
        int(batch["n"]) for step in feed.epoch(planner([[3, 2]])) for batch in step.batches
    ] == [3, 2, 3, 2]


Point = namedtuple("Point", ["x", "label"])


@dataclasses.dataclass
class Graph:
    nodes: torch.Tensor
    name: str


ROWS = torch.arange(6)
TREES = [
    ROWS,
    [ROWS, ROWS.reshape(6, 1)],
    (ROWS, {"mask": ROWS.bool(), "deep": [ROWS]}),
    Point(ROWS, ROWS),
    {
        "x": ROWS,
        "ids": ["a", "b", "c", "d", "e", "f"],
        "scale": 2.0,
        "none": None,
        "zero": torch.tensor(3),
    },
    Graph(ROWS, "g"),
    (
        [torch.zeros(3, size) for size in range(1, 7)],
        [{"box": torch.zeros(size, 4)} for size in range(6)],
    ),
]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: type(tree).__name__)
def test_batches_of_any_nesting_are_cut_between_samples(tree: Any) -> None:
    assert nested.count(tree) == 6
    piece = nested.rows(tree, 2, 5)
    assert type(piece) is type(tree)
    assert nested.count(piece) == 3
    everything = nested.rows(tree, 0, 6)
    for kept, leaf in zip(nested.leaves(everything), nested.leaves(tree), strict=True):
        assert torch.equal(kept, leaf) if isinstance(leaf, torch.Tensor) else kept == leaf


@pytest.mark.parametrize(
    "tree",
    [
        torch.tensor(1.0),
        {"x": torch.zeros(4, 2), "edges": torch.zeros(2, 9)},
        "text",
        [1, 2, 3],
        object(),
    ],
    ids=["number", "graph", "text", "numbers", "object"],
)
def test_what_cannot_be_cut_says_so(tree: Any) -> None:
    assert nested.count(tree) is None


def test_what_cannot_be_cut_is_trained_whole_and_said() -> None:
    graphs = [{"x": torch.zeros(4, 2), "edges": torch.zeros(2, 9)}] * 3
    feed = open_feed(graphs, "graphs")
    assert "cannot be cut" in (feed.note or "")
    assert [step.sizes for step in feed.epoch(planner([[1]]))] == [[1], [1], [1]]


def test_a_transformers_batch_stays_one() -> None:
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding(
        {"input_ids": torch.arange(8).reshape(4, 2), "labels": torch.arange(4)}
    )
    piece = nested.rows(batch, 1, 3)
    assert type(piece) is type(batch)
    assert piece["labels"].tolist() == [1, 2]
    assert batch["labels"].tolist() == [0, 1, 2, 3]


def packed(*lengths: int) -> PackedSequence:
    longest_first = list(lengths) == sorted(lengths, reverse=True)
    return pack_sequence([torch.randn(n, 2) for n in lengths], enforce_sorted=longest_first)


def test_a_packed_sequence_is_moved_as_torch_moves_it() -> None:
    held, plain = packed(3, 2, 4), torch.zeros(3, 2)
    moved = nested.to_device({"x": held, "y": plain}, torch.device("meta"))
    assert type(moved["x"]) is PackedSequence
    assert [leaf.device.type for leaf in moved["x"]] == ["meta", "cpu", "meta", "meta"]
    assert moved["y"].device.type == "meta"


@pytest.mark.parametrize("lengths", [(3, 2, 4), (5,), (1,), (1, 1, 1)])
def test_a_packed_sequence_is_never_cut(lengths: tuple[int, ...]) -> None:
    held = packed(*lengths)
    targets = torch.zeros(sum(lengths))  # one a step in time
    for batch in (held, (held, targets), {"x": [held], "y": targets}):
        assert nested.count(batch) is None


# -- pinned for a GPU: what lies on the host


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Torch as where there is a GPU; returns what is pinned, and refuses what torch would."""
    found: list[torch.Tensor] = []

    def pin(self: torch.Tensor, *_: Any) -> torch.Tensor:
        if self.device.type != "cpu" or self.is_sparse:
            raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
        found.append(self)
        return self

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if hasattr(torch, "accelerator"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        cuda = torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: cuda)
    return found


class Mixed(Numbered):
    """Samples that lie on the device, but for their labels."""

    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3, device="meta"), int(index)


@pytest.mark.parametrize("plain", [True, False], ids=["tensors", "dataset"])
def test_a_dataset_on_the_device_is_not_pinned(with_gpu: list[Any], plain: bool) -> None:
    if plain:
        data: Any = TensorDataset(torch.zeros(8, 3, device="meta"), torch.arange(8))
    else:
        data = Mixed(8)
    feed = open_feed(DataLoader(data, batch_size=4), "train_loader", pin=True)
    batches = [batch for step in feed.epoch(planner([[4]])) for batch in step.batches]
    assert [(type(batch), batch[0].device.type) for batch in batches] == [(list, "meta")] * 2
    assert [batch[1].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [tensor.tolist() for tensor in with_gpu] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def sparse(samples: list[Any]) -> dict[str, torch.Tensor]:
    rows = torch.stack([row for _, row in samples])
    return {"x": rows.to_sparse(), "y": rows}


def test_what_a_collate_fn_makes_is_pinned_as_far_as_that_can_be(with_gpu: list[Any]) -> None:
    loader = DataLoader(Numbered(4), batch_size=4, collate_fn=sparse)
    feed = open_feed(loader, "train_loader", pin=True)
    (step,) = feed.epoch(planner([[4]]))
    assert step.batches[0]["x"].is_sparse
    assert [tensor is step.batches[0]["y"] for tensor in with_gpu] == [True]


def test_worker_processes_hand_over_what_is_to_be_pinned(with_gpu: list[Any]) -> None:
    loader = DataLoader(Numbered(4), batch_size=4, collate_fn=sparse)
    made: Any = open_feed(loader, "train_loader", workers=1, pin=True)
    assert made._loader.pin_memory
    collate = pickle.loads(pickle.dumps(made._loader.collate_fn))
    handed = pickle.loads(pickle.dumps(collate([Numbered(4)[n] for n in range(4)])))
    batch: Any = pin_memory(handed, "cuda")  # what the loader's thread does
    assert batch["x"].is_sparse
    assert [tensor is batch["y"] for tensor in with_gpu] == [True]


@pytest.mark.parametrize("loader", [[], iter([])], ids=["list", "iterator"])
def test_an_empty_loader_is_told_of(loader: Any) -> None:
    with pytest.raises(HybridMagicError, match="train_loader (is empty|yields nothing); wanted"):
        open_feed(loader, "train_loader")


def test_what_is_no_loader_is_told_of() -> None:
    with pytest.raises(HybridMagicError, match="train_loader is a int; wanted a DataLoader"):
        open_feed(3, "train_loader")
