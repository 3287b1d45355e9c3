"""Checkpoints survive what happens to processes, disks and folders, and cost the caller a copy."""

from __future__ import annotations

import errno
import gc
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import threading
import time
import traceback
import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hybrid_magic.engine import checkpoint_folder, checkpoint_store, checkpoint_writer
from hybrid_magic.engine.checkpoint_copy import Copies, size_bytes
from hybrid_magic.engine.checkpoint_store import Store
from hybrid_magic.errors import HybridMagicError

Pair = namedtuple("Pair", "one other")


def tree_of(step: int, elements: int = 100) -> dict[str, Any]:
    return {"weights": torch.full((elements,), float(step)), "more": [step, {"text": "x"}]}


def is_of(tree: Any, step: int) -> bool:
    return tree["more"][0] == step and bool((tree["weights"] == step).all())


def names(folder: pathlib.Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "deep" / "run"


@pytest.fixture
def opened(folder: pathlib.Path) -> Iterator[Callable[..., Store]]:
    """Return a function that gives a checked Store of `folder`; all are closed at the end."""
    stores: list[Store] = []

    def give(**options: Any) -> Store:
        stores.append(Store(folder, **options))
        stores[-1].check(10_000)
        return stores[-1]

    yield give
    for store in stores:
        store.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def saved(store: Store, *steps: int, elements: int = 100) -> None:
    for step in steps:
        store.save(tree_of(step, elements), step=step)
        assert store.wait()


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked process; return the child's process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# What a checkpoint holds


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_is_saved_comes_back(opened: Callable[..., Store]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(
        memory_format=torch.channels_last
    )
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    tree = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "plain": [None, True, 2, 2.5, 1j, "text", b"bytes", {1, 2}, (3, (4,)), 10**40],
        "torch": [torch.float16, torch.device("cpu"), torch.Size([2]), torch.get_rng_state()],
        "numbers": [np.float64(3.5), np.int64(4), np.bool_(True), Pair(1, 2)],
        "arrays": [np.arange(3, dtype=np.uint16), np.arange(3, dtype=np.uint16) + 7],
        "strange": [torch.ones(2, 1).expand(2, 3), torch.empty(0), torch.ones(2, 2).to_sparse()],
    }
    store = opened()
    store.save(tree, step=7)
    assert store.wait()
    found = store.newest()
    assert found is not None
    assert (found.step, found.notes, store.problems()) == (7, [], [])
    got = found.tree
    for name, value in model.state_dict().items():
        assert torch.equal(got["model"][name], value)
        assert got["model"][name].stride() == value.stride()
    assert got["model"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    assert isinstance(got["model"], OrderedDict)
    optimizer.load_state_dict(got["optimizer"])
    assert got["plain"] == tree["plain"]
    assert got["torch"][:3] == tree["torch"][:3]
    assert got["numbers"] == [3.5, 4, True, (1, 2)]
    assert list(map(type, got["numbers"])) == [float, int, bool, tuple]
    assert [array.tolist() for array in got["arrays"]] == [[0, 1, 2], [7, 8, 9]]
    assert got["strange"][0].tolist() == [[1.0] * 3] * 2
    assert got["strange"][2].to_dense().tolist() == [[1.0] * 2] * 2


def test_random_states_of_python_and_numpy_go_through(opened: Callable[..., Store]) -> None:
    state = random.getstate(), np.random.get_state()  # noqa: NPY002
    store = opened()
    store.save({"python": state[0], "numpy": state[1]}, step=1)
    expected = random.random(), np.random.rand()  # noqa: NPY002 - the generator that people use
    store.wait()
    found = store.newest()
    assert found is not None
    random.setstate(found.tree["python"])
    name, keys, *rest = found.tree["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    assert (random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_a_file_opens_with_plain_torch_load(
    opened: Callable[..., Store], folder: pathlib.Path
) -> None:
    saved(opened(), 12)
    assert names(folder) == ["checkpoint-00000012.pt"]
    assert is_of(torch.load(folder / "checkpoint-00000012.pt", weights_only=True), 12)


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"a": [0, lambda: 0]}, "checkpoint['a'][1] is a function"),
        ({"a": nn.Linear(1, 1)}, "checkpoint['a'] is a Linear"),
        ({"a": torch.empty(1, device="meta")}, "checkpoint['a'] is a meta tensor"),
        ({"a": np.array([object()])}, "checkpoint['a'] is a ndarray"),
    ],
)
def test_what_could_not_be_read_back_is_refused_by_its_place(
    opened: Callable[..., Store], tree: Any, place: str
) -> None:
    store = opened()
    with pytest.raises(HybridMagicError) as told:
        store.save(tree, step=1)
    assert str(told.value).startswith(place)
    assert "wanted" in str(told.value)
    saved(store, 2)


def test_a_checkpoint_is_of_the_moment_of_its_save(
    opened: Callable[..., Store], held: SimpleNamespace
) -> None:
    store = opened()
    tree = tree_of(1)
    store.save(tree, step=1)
    tree["weights"].fill_(99)
    tree["more"][0] = 99
    held.go.set()
    store.wait()
    found = store.newest()
    assert found is not None
    assert is_of(found.tree, 1)


def test_tied_weights_are_copied_once_and_arrays_made_meanwhile_are_not_mixed_up() -> None:
    weight = torch.randn(1000)
    arrays = [np.full(1000, number, dtype=np.float32) for number in range(20)]
    tree = {"one": weight, "other": weight.view(1000), "arrays": arrays}
    copy = Copies().take(tree)
    assert copy["one"].data_ptr() == copy["other"].data_ptr() != weight.data_ptr()
    assert [int(array[0]) for array in copy["arrays"]] == list(range(20))
    assert 21 * 4000 < size_bytes(tree) < 21 * 4000 + 100_000


# Which ones are kept


def test_the_newest_three_are_kept_and_names_sort_by_step(
    opened: Callable[..., Store], folder: pathlib.Path
) -> None:
    store = opened()
    saved(store, 1, 20, 300, 4000, 50000)
    assert names(folder) == [f"checkpoint-{step:08d}.pt" for step in (300, 4000, 50000)]
    found = store.newest()
    assert found is not None
    assert found.step == 50000


def test_a_run_that_begins_anew_keeps_its_own_over_an_older_runs_later_steps(
    opened: Callable[..., Store], folder: pathlib.Path
) -> None:
    store = opened()
    saved(store, 100, 200, 300, 1)
    found = store.newest()
    assert found is not None
    assert found.step == 1
    assert len(names(folder)) == 3
    saved(store, 2, 3)
    assert names(folder) == [f"checkpoint-{step:08d}.pt" for step in (1, 2, 3)]


def test_only_files_of_our_own_names_are_removed(
    opened: Callable[..., Store], folder: pathlib.Path
) -> None:
    folder.mkdir(parents=True)
    mine = ["notes.txt", "checkpoint-1.pt", "checkpoint-00000001.pt.bak", "model.part"]
    for name in [*mine, "checkpoint-00000009.pt.4711.part"]:
        (folder / name).write_text("mine")
    saved(opened(keep=1), 5, 6)
    assert names(folder) == sorted([*mine, "checkpoint-00000006.pt"])


# Damage


def test_every_single_flipped_byte_is_seen(
    opened: Callable[..., Store], folder: pathlib.Path
) -> None:
    saved(opened(), 1)
    path = folder / "checkpoint-00000001.pt"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError):
            checkpoint_writer.read(path)
    path.write_bytes(whole)
    assert is_of(checkpoint_writer.read(path), 1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
        lambda whole: b"\0" * len(whole),
        lambda whole: whole + b"\0",
        lambda whole: whole.replace(b"format=1", b"format=2"),
    ],
    ids=["empty", "a byte short", "half", "flipped", "zeros", "longer", "another format"],
)
def test_a_damaged_newest_one_is_passed_over_with_a_word(
    opened: Callable[..., Store], folder: pathlib.Path, damage: Callable[[bytes], bytes]
) -> None:
    store = opened()
    saved(store, 1, 2)
    path = folder / "checkpoint-00000002.pt"
    path.write_bytes(damage(path.read_bytes()))
    found = store.newest()
    assert found is not None
    assert (found.step, len(found.notes)) == (1, 1)
    assert found.notes[0].startswith("checkpoint-00000002.pt")
    assert found.notes[0].count("passed over") == 1
    (folder / "checkpoint-00000001.pt").unlink()
    assert store.newest() is None
    assert store.problems() == found.notes
    saved(store, 3)  # and the next one is written and found
    assert store.newest() is not None


def test_what_the_caller_does_not_accept_is_passed_over(opened: Callable[..., Store]) -> None:
    store = opened()
    saved(store, 1, 2, 3)
    found = store.newest(lambda tree: None if is_of(tree, 1) else "of another model")
    assert found is not None
    assert found.step == 1
    assert found.notes == [
        f"checkpoint-0000000{step}.pt: of another model; it was passed over" for step in (3, 2)
    ]

    def refuse(tree: Any) -> str | None:
        raise HybridMagicError("another model")

    with pytest.raises(HybridMagicError, match="another model"):
        store.newest(refuse)


def test_a_folder_that_is_not_there_has_no_checkpoint(folder: pathlib.Path) -> None:
    store = Store(folder)
    assert store.newest() is None
    assert store.problems() == []
    assert not folder.exists()


# Killed


def _saves_until_killed(folder: pathlib.Path, step: int, pipe: int) -> None:
    store = Store(folder)
    store.check(10_000)
    while True:
        step += 1
        store.save(tree_of(step, 200_000), step=step)
        if step % 3 == 0:
            store.wait()
            os.write(pipe, step.to_bytes(8, "little"))


def _killed_at_random(folder: pathlib.Path, times: int) -> None:
    dice = random.Random(5)
    step = 0
    for _ in range(times):
        end, start = os.pipe()
        before = step
        child = in_child(lambda: _saves_until_killed(folder, before, start))  # noqa: B023
        os.close(start)
        assert select.select([end], [], [], 60)[0], "no checkpoint in a minute"
        time.sleep(dice.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        told = b""
        while data := os.read(end, 2**16):
            told += data
        os.close(end)
        assert not len(told) % 8
        written = int.from_bytes(told[-8:], "little")
        found = Store(folder).newest()
        assert found is not None
        assert found.step >= written > step
        assert found.notes == []
        assert is_of(found.tree, found.step)
        step = found.step
    store = Store(folder)
    store.check(10_000)  # a killed process holds no lock
    store.close()
    assert len(names(folder)) <= 4
    assert not [name for name in names(folder) if name.endswith(".part")]


def test_a_process_killed_at_20_moments_leaves_a_whole_checkpoint(folder: pathlib.Path) -> None:
    _killed_at_random(folder, 20)


@pytest.mark.thorough
def test_a_process_killed_at_100_moments_leaves_a_whole_checkpoint(folder: pathlib.Path) -> None:
    _killed_at_random(folder, 100)


# Disks and folders


def test_a_disk_that_fills_up_while_writing_loses_nothing_older(
    opened: Callable[..., Store], folder: pathlib.Path
) -> None:
    store = opened()
    saved(store, 1)
    # The system refuses what is written past a limit, as a full disk does, in the middle.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        saved(store, 2, 3, elements=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (told,) = store.problems()
    assert "the checkpoint of step 2 was not written" in told
    assert "GiB free; wanted 16.4 MiB; free some space" in told
    assert names(folder) == ["checkpoint-00000001.pt"]
    saved(store, 4, elements=100_000)
    assert names(folder) == ["checkpoint-00000001.pt", "checkpoint-00000004.pt"]
    assert store.problems() == []


def test_no_room_is_seen_before_anything_is_written(
    opened: Callable[..., Store], folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    saved(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24))
        patch.setattr(checkpoint_store, "write", lambda *args: pytest.fail("it was written"))
        saved(store, 2)
    (told,) = store.problems()
    assert "16 MiB free; wanted 16.1 MiB; free some space" in told
    assert names(folder) == ["checkpoint-00000001.pt"]


def test_a_folder_deleted_meanwhile_is_told_once_and_used_again_when_it_is_back(
    opened: Callable[..., Store], folder: pathlib.Path
) -> None:
    store = opened()
    saved(store, 1)
    shutil.rmtree(folder)
    saved(store, 2, 3)
    (told,) = store.problems()
    assert "is gone; wanted the folder of the run's start; make it anew" in told
    assert store.newest() is None
    folder.mkdir()
    saved(store, 4)
    assert names(folder) == ["checkpoint-00000004.pt"]
    shutil.rmtree(folder)
    saved(store, 5)
    assert len(store.problems()) == 1  # after a success it is news again


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system; wanted a folder"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; wanted"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free; wanted 16.1 MiB; free some space"),
        (MemoryError("no more"), "MemoryError: no more; wanted"),
    ],
)
def test_whatever_the_writing_meets_the_run_goes_on(
    opened: Callable[..., Store],
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    words: str,
) -> None:
    store = opened()
    saved(store, 1)

    def fails(path: pathlib.Path, *rest: Any) -> None:
        path.write_bytes(b"a part")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_store, "write", fails)
        saved(store, 2, 3)
    (told,) = store.problems()
    assert words in told
    assert "step 2 was not written" in told
    assert names(folder) == ["checkpoint-00000001.pt"]


def test_older_ones_that_cannot_be_removed_are_told(
    opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path
) -> None:
    def refuse(path: pathlib.Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    store = opened(keep=1)
    saved(store, 1)
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    saved(store, 2)
    (told,) = store.problems()
    assert told.startswith(f"1 older checkpoints in {folder} cannot be removed; wanted only the")


def test_a_file_is_synced_before_it_gets_its_name_and_the_folder_after(
    opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path
) -> None:
    store = opened()
    events: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, pathlib.Path.unlink

    def synced(descriptor: int) -> None:
        target = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("folder synced" if target == folder else f"{target.suffix} synced")
        fsync(descriptor)

    def replaced(one: Any, other: Any) -> None:
        events.append("renamed")
        replace(one, other)

    def removed(path: pathlib.Path, missing_ok: bool = False) -> None:
        events.append(f"{path.suffix} removed")
        unlink(path, missing_ok=missing_ok)

    store._keep = 1
    saved(store, 1)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(pathlib.Path, "unlink", removed)
    saved(store, 2)
    assert events == [".part synced", "renamed", "folder synced", ".part removed", ".pt removed"]


# Before the run


def test_check_refuses_a_file_in_the_folders_place(tmp_path: pathlib.Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(HybridMagicError, match="'taken' is a file; wanted a folder; give"):
            Store(path).check(1)
    assert os.listdir(tmp_path) == ["taken"]


def test_check_refuses_a_folder_that_cannot_be_written(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True)
    system_open = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT:  # root may write whatever modes say
            raise OSError(errno.EROFS, "Read-only file system")
        return system_open(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(HybridMagicError, match=r"cannot be written \(Read-only file system\)"):
        Store(folder).check(1)
    monkeypatch.undo()
    store = Store(folder)
    store.check(1)
    store.close()


def test_check_refuses_a_disk_without_room_and_makes_nothing(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with pytest.raises(HybridMagicError, match=r"1 GiB free; wanted 2.02 GiB"):
        Store(folder).check(2**30)
    assert not folder.parent.exists()


def test_where_three_have_no_room_fewer_are_kept_and_it_is_said(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**24 + 30_000_000))
    store = Store(folder)
    store.check(9_000_000)
    (told,) = store.problems()
    assert "room for 2 checkpoints of 8.58 MiB and the one being written; wanted 3" in told
    saved(store, 1, 2, 3)
    store.close()
    assert len(names(folder)) == 2


def test_a_second_run_in_the_same_folder_is_told(
    opened: Callable[..., Store], folder: pathlib.Path
) -> None:
    opened()
    with pytest.raises(HybridMagicError, match="being written by a run in this process; wanted a"):
        Store(folder).check(1)


def test_a_second_process_in_the_same_folder_is_told(folder: pathlib.Path) -> None:
    end, start = os.pipe()

    def holds() -> None:
        Store(folder).check(1)
        os.write(start, b"x")
        signal.pause()

    child = in_child(holds)
    assert os.read(end, 1) == b"x"
    try:
        with pytest.raises(HybridMagicError, match=f"being written by process {child} on .*stop"):
            Store(folder).check(1)
    finally:
        os.kill(child, signal.SIGKILL)
        exit_code(child)
        os.close(start)
        os.close(end)
    store = Store(folder)
    store.check(1)
    store.close()


def test_without_locks_only_old_leftovers_are_removed(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_folder, "_lock", lambda descriptor: None)
    folder.mkdir(parents=True)
    for name, age_s in (("checkpoint-00000001.pt.1.part", 0), ("checkpoint-00000002.pt.1.part", 1)):
        (folder / name).write_bytes(b"")
        when = time.time() - age_s * 2 * checkpoint_folder.LEFT_OVER_S
        os.utime(folder / name, (when, when))
    store = Store(folder)
    store.check(1)
    assert names(folder) == ["checkpoint-00000001.pt.1.part"]
    saved(store, 1)
    store.close()


# Time, memory, ends


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A disk that answers only once `go` is set; `begun`: it was asked."""
    gates = SimpleNamespace(go=threading.Event(), begun=threading.Event())
    real = checkpoint_store.write

    def write(path: Any, tree: Any, label: Any, moved: Any) -> None:
        gates.begun.set()
        assert gates.go.wait(60)
        real(path, tree, label, moved)

    monkeypatch.setattr(checkpoint_store, "write", write)
    yield gates
    gates.go.set()


def test_save_does_not_wait_for_the_disk_and_the_newest_waits_alone(
    opened: Callable[..., Store], folder: pathlib.Path, held: SimpleNamespace
) -> None:
    store = opened()
    store.save(tree_of(1), step=1)
    assert held.begun.wait(60)
    for step in range(2, 50):
        store.save(tree_of(step), step=step)
    assert names(folder) == []
    held.go.set()
    assert store.wait()
    assert names(folder) == ["checkpoint-00000001.pt", "checkpoint-00000049.pt"]
    assert is_of(torch.load(folder / "checkpoint-00000001.pt"), 1)
    assert is_of(torch.load(folder / "checkpoint-00000049.pt"), 49)


def test_a_large_one_waits_until_the_one_before_is_written(
    opened: Callable[..., Store], held: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_store, "SECOND_COPY_BYTES", 0)
    made: list[Copies] = []
    monkeypatch.setattr(checkpoint_store, "Copies", lambda: made.append(Copies()) or made[-1])
    store = opened()
    store.save(tree_of(1), step=1)
    assert held.begun.wait(60)
    threading.Timer(0.05, held.go.set).start()
    store.save(tree_of(2), step=2)
    assert held.go.is_set()
    store.wait()
    saved(store, 3, 4)
    assert len(made) == 1


def test_copies_use_the_same_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies()
    first = copies.take(tree_of(1))["weights"].data_ptr()
    second = copies.take(tree_of(2))["weights"]
    assert second.data_ptr() == first
    assert bool((second == 2).all())
    assert copies.take({"weights": torch.zeros(7)})["weights"].shape == (7,)
    assert len(copies._buffers) == 1


def test_saving_a_large_tree_takes_one_copy_of_memory(folder: pathlib.Path) -> None:
    size = 2**27

    def saves() -> None:
        store = Store(folder)
        store.check(size)
        tree = {"weights": [torch.ones(2**20) for _ in range(size // 2**22)]}
        checkpoint_store.SECOND_COPY_BYTES = 0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for step in range(4):
            store.save(tree, step=step)
        store.close()
        risen = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        # One copy and what torch takes to pickle; two copies would be 2.
        assert size * 0.9 < risen < size * 1.4, risen / size

    assert exit_code(in_child(saves)) == 0


def test_save_takes_about_as_long_as_a_copy(
    opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_store, "write", lambda path, *rest: path.write_bytes(b""))
    tree = {f"layer{number}": torch.ones(2**17) for number in range(64)}  # 32 MiB
    store, copies = opened(), Copies()

    def seconds(work: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def save() -> None:
        store.save(tree, step=1)

    for work in (save, lambda: copies.take(tree)):  # the memory is made
        work()
    store.wait()
    save_s, copy_s = [], []
    for _ in range(7):
        save_s.append(seconds(save))
        store.wait()
        copy_s.append(seconds(lambda: copies.take(tree)))
    assert min(save_s) < 3 * min(copy_s)  # writing it would be 30 times as long


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_alive_after_close(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    made: list[weakref.ref[Copies]] = []

    def make() -> Copies:
        copies = Copies()
        made.append(weakref.ref(copies))
        return copies

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_store, "Copies", make)
    if fails:
        monkeypatch.setattr(checkpoint_writer._Digesting, "put", full)
    model = nn.Linear(50, 50)
    store = Store(folder)
    store.check(1)
    store.save({"model": model.state_dict(), "own": model.weight}, step=1)
    store.close()
    assert len(store.problems()) == fails
    alive = weakref.ref(model.weight)
    del model
    assert alive() is None
    assert [copies() for copies in made] == [None]
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    store.close()  # again, harmless


def test_an_interrupt_in_the_copy_leaves_a_store_that_saves(
    opened: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    saved(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save(tree_of(2), step=2)
    saved(store, 3)
    found = store.newest()
    assert found is not None
    assert is_of(found.tree, 3)


def _interrupted(*args: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_an_interrupt_of_close_ends_the_writing_and_leaves_no_part(
    opened: Callable[..., Store], folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(path: pathlib.Path, tree: Any, label: Any, moved: Callable[[], None]) -> None:
        path.write_bytes(b"a part")
        while True:
            moved()
            time.sleep(0.001)

    store = opened()
    saved(store, 1)
    monkeypatch.setattr(checkpoint_store, "write", endless)
    store.save(tree_of(2), step=2)
    main = threading.get_ident()
    threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        store.close()
    assert names(folder) == ["checkpoint-00000001.pt"]
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    monkeypatch.undo()
    saved(opened(), 3)


def test_a_disk_that_does_not_answer_bounds_every_wait(
    folder: pathlib.Path, held: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STALL_S", "STOP_S"):
        monkeypatch.setattr(checkpoint_store, name, 0.02)
    store = Store(folder)
    store.check(1)
    store.save(tree_of(1), step=1)
    assert not store.wait()
    monkeypatch.setattr(checkpoint_store, "SECOND_COPY_BYTES", 0)
    store.save(tree_of(2), step=2)
    thread = store._thread
    store.close()
    (told,) = store.problems()
    assert "took no byte for 0 s and its last checkpoint is not written; wanted a disk" in told
    held.go.set()
    assert thread is not None
    thread.join(60)
    assert names(folder) == []  # it answered too late: nothing is written after the end


def test_a_forked_process_has_no_part_in_it(
    opened: Callable[..., Store], folder: pathlib.Path, held: SimpleNamespace
) -> None:
    store = opened()
    store.save(tree_of(1), step=1)
    assert held.begun.wait(60)

    def closes() -> None:
        assert store.wait()
        store.close()
        with pytest.raises(AssertionError):
            store.save(tree_of(9), step=9)

    assert exit_code(in_child(closes)) == 0
    with pytest.raises(HybridMagicError):
        Store(folder).check(1)  # the parent's lock stands
    held.go.set()
    assert store.wait()
    assert names(folder) == ["checkpoint-00000001.pt"]


@pytest.mark.gpu
def test_a_copy_from_the_gpu_is_pinned_whole_and_of_its_moment(
    opened: Callable[..., Store],
) -> None:
    weights = torch.arange(2.0**24, device="cuda")
    copies = Copies()
    for add in range(3):
        copy = copies.take({"weights": weights})["weights"]
        weights += 1
        assert copy.is_pinned()
        assert float(copy[-1]) == 2.0**24 - 1 + add
    store = opened()
    store.save({"weights": weights[:1000]}, step=1)
    weights.zero_()
    store.wait()
    found = store.newest()
    assert found is not None
    assert found.tree["weights"].device.type == "cpu"
    assert found.tree["weights"][:3].tolist() == [3.0, 4.0, 5.0]
