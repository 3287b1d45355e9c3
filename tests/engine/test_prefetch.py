"""What runs on which stream of a GPU, on streams that are made up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from hybrid_magic.engine.prefetch import SideStreamMover

META = torch.device("meta")  # stands for the GPU


class Streams:
    """`now` is the stream that work is queued on, `log` what was done on which."""

    def __init__(self) -> None:
        self.now = "computing"
        self.log: list[str] = []

    def stream(self, device: Any) -> Any:
        return "side"

    @contextlib.contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def current(self, device: Any) -> Any:
        return self

    def wait_stream(self, other: str) -> None:
        self.log.append(f"{self.now} waits for {other}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", made.stream)
    monkeypatch.setattr(torch.cuda, "stream", made.on)
    monkeypatch.setattr(torch.cuda, "current_stream", made.current)
    Noted.streams = made
    return made


class Noted(torch.Tensor):
    """A tensor that says where it is moved and marked, and that it is on a GPU."""

    streams: Streams
    name = "tensor"
    is_cuda = True  # type: ignore[assignment]

    def to(self, *args: Any, **options: Any) -> Any:
        self.streams.log.append(f"{self.name} moved on {self.streams.now}")
        moved: Any = super().to(*args, **options)
        moved.name = self.name
        return moved

    def record_stream(self, stream: Any) -> None:
        self.streams.log.append(f"{self.name} marked for {stream.now}")


def noted(tensor: torch.Tensor, name: str) -> Noted:
    made = tensor.as_subclass(Noted)
    made.name = name
    return made


class Batch:
    """A batch of the person's own class."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def to(self, device: torch.device) -> Batch:
        return Batch(self.x.to(device))


def test_only_tensors_from_the_host_go_beside_the_work(streams: Streams) -> None:
    mover = SideStreamMover(META)
    batch = {
        "x": noted(torch.zeros(2, 3), "x"),
        "own": Batch(noted(torch.zeros(2), "inside")),
        "sparse": torch.eye(3).to_sparse(),
        "packed": pack_sequence([torch.zeros(2, 1)]),
    }
    sent = mover.send(batch)
    assert streams.log == ["x moved on side"]
    assert all(sent[name] is batch[name] for name in ("own", "sparse", "packed"))
    moved = mover.receive(sent)
    assert streams.log[1:3] == ["computing waits for side", "x marked for computing"]
    assert "inside moved on computing" in streams.log
    assert all(held.is_meta for held in (moved["x"], moved["own"].x, moved["sparse"]))
    assert moved["packed"].data.is_meta
    assert not moved["packed"].batch_sizes.is_meta


def test_what_is_on_the_device_is_laid_out_where_it_was_made(streams: Streams) -> None:
    """What makes it may be queued there still."""
    mover = SideStreamMover(META, channels_last=True)
    image = noted(torch.zeros(2, 3, 4, 4, device=META), "image")
    host = noted(torch.zeros(2, 3, 4, 4), "host")
    sent = mover.send((image, host))
    assert streams.log == ["host moved on side"]
    moved = mover.receive(sent)
    assert "image moved on computing" in streams.log
    assert all(leaf.is_contiguous(memory_format=torch.channels_last) for leaf in moved)
