"""The data that the notebooks train on: read from a folder, or from where people have it."""

from __future__ import annotations

import json
import lzma
import os
import sys
import types

import pytest

from hybrid_magic import HybridMagicError, datasets

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

CLASSES = 4


def write_mosaic(path, images):
    """Write `images` (uint8 [n, 32, 32, 3], n a multiple of 4) as a mosaic, four tiles a row."""
    rows = images.reshape(-1, 4, 32, 32, 3).swapaxes(1, 2).reshape(-1, 4 * 32, 3)
    Image.fromarray(rows).save(path, lossless=True)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch, images):
    """A data folder in miniature: two files of 8 images a split, 4 classes; 6 reviews a split."""
    monkeypatch.setattr(datasets, "IMAGE_FILES", {"train": 2, "test": 2})
    monkeypatch.setattr(datasets, "SMALL_IMAGES", {"train": 8, "test": 4})
    monkeypatch.setattr(datasets, "SMALL_TEXTS", {"train": 4, "test": 2})
    monkeypatch.setenv(datasets.FOLDER, str(tmp_path))
    (tmp_path / "cifar100").mkdir()
    for split in ("train", "test"):
        for number in (0, 1):
            path = tmp_path / f"cifar100/{split}_{number:02d}.webp"
            write_mosaic(path, images[8 * number : 8 * number + 8])
    labels = np.arange(16, dtype=np.uint8) % CLASSES
    names = np.array(["apple", "bear", "cup", "dolphin"])
    np.savez(
        tmp_path / "cifar100/labels.npz",
        train_fine=labels,
        test_fine=labels[::-1],
        fine_names=names,
    )
    (tmp_path / "imdb").mkdir()
    for split in ("train", "test"):
        with lzma.open(tmp_path / f"imdb/{split}.jsonl.xz", "wt", encoding="utf-8") as lines:
            for number, label in enumerate([1, 1, 1, 0, 0, 0]):
                text = f"{split} {number}: a fine\x85line<br />"
                row = {"split": split, "label": label, "text": text}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return tmp_path


def test_images_come_back_in_their_order_with_labels_and_names(folder, images):
    found, labels, names = datasets.cifar100("train")
    assert np.array_equal(found, images)
    assert found.dtype == np.uint8
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 1, 2, 3] * 4
    assert names == ["apple", "bear", "cup", "dolphin"]


def test_small_images_are_the_first_of_each_class(folder, images):
    found, labels, _ = datasets.cifar100("test", small=True)
    assert np.array_equal(found, images[:4])
    assert sorted(labels.tolist()) == [0, 1, 2, 3]


def test_a_folder_of_subsets_is_enough_for_a_small_request(folder, images):
    (folder / "small").mkdir()
    write_mosaic(folder / "small/cifar100_train8.webp", images[8:])
    np.savez(
        folder / "small/cifar100_labels.npz",
        train_fine=np.arange(8, dtype=np.uint8) % CLASSES,
        fine_names=np.array(["apple", "bear", "cup", "dolphin"]),
    )
    found, labels, _ = datasets.cifar100("train", small=True)
    assert np.array_equal(found, images[8:])
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_reviews_keep_their_odd_characters(folder):
    texts, labels = datasets.imdb("test")
    assert texts[0] == "test 0: a fine\x85line<br />"
    assert labels.tolist() == [1, 1, 1, 0, 0, 0]
    assert labels.dtype == np.int64


def test_small_reviews_are_half_positive(folder):
    texts, labels = datasets.imdb("train", small=True)
    assert labels.tolist() == [1, 1, 0, 0]
    assert [text.split(":")[0] for text in texts] == ["train 0", "train 1", "train 3", "train 4"]


def test_the_small_reviews_file_holds_both_splits(folder):
    (folder / "small").mkdir()
    with lzma.open(folder / "small/imdb_small.jsonl.xz", "wt", encoding="utf-8") as lines:
        for split, label in [("test", 0), ("train", 1), ("test", 1), ("train", 0)]:
            row = {"split": split, "label": label, "text": f"{split} {label}"}
            lines.write(json.dumps(row) + "\n")
    assert datasets.imdb("test", small=True)[0] == ["test 0", "test 1"]


def test_without_a_folder_torchvisions_copy_is_read(monkeypatch, tmp_path, images):
    asked = {}

    class CIFAR100:
        def __init__(self, root, train, download):
            asked.update(root=root, train=train, download=download)
            self.data, self.targets, self.classes = images, [0, 1, 2, 3] * 4, list("abcd")

    monkeypatch.delenv(datasets.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    fake = types.SimpleNamespace(CIFAR100=CIFAR100)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", fake)
    found, labels, names = datasets.cifar100("test")
    assert np.array_equal(found, images)
    assert (labels.dtype, names) == (np.int64, list("abcd"))
    assert asked == {"root": str(tmp_path / "hybrid_magic"), "train": False, "download": True}


def test_without_a_folder_the_hubs_reviews_are_read(monkeypatch):
    rows = [{"text": "bad", "label": 0}, {"text": "good", "label": 1}]
    monkeypatch.delenv(datasets.FOLDER, raising=False)
    fake = types.SimpleNamespace(load_dataset=lambda name, split: rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    texts, labels = datasets.imdb("train")
    assert (texts, labels.tolist()) == (["bad", "good"], [0, 1])


def test_images_that_cannot_be_had_are_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv(datasets.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(HybridMagicError, match="set HYBRID_MAGIC_DATA to a folder") as error:
        datasets.cifar100(download=False)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_reviews_that_cannot_be_had_are_one_line_that_says_what_to_do(monkeypatch):
    monkeypatch.delenv(datasets.FOLDER, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it fails
    with pytest.raises(HybridMagicError, match="pip install datasets"):
        datasets.imdb()


def test_a_folder_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(datasets.FOLDER, str(tmp_path / "nowhere"))
    with pytest.raises(HybridMagicError, match="nowhere.* is no folder; wanted one that holds"):
        datasets.cifar100()


def test_a_file_that_is_missing_from_the_folder_is_named(folder):
    (folder / "cifar100/train_01.webp").unlink()
    with pytest.raises(HybridMagicError, match=r"train_01\.webp is not there"):
        datasets.cifar100("train")
    (folder / "imdb/test.jsonl.xz").unlink()
    with pytest.raises(HybridMagicError, match=r"test\.jsonl\.xz is not there"):
        datasets.imdb("test")


def test_a_split_that_does_not_exist_is_refused():
    for read in (datasets.cifar100, datasets.imdb):
        with pytest.raises(HybridMagicError, match="split is 'valid'; wanted"):
            read("valid")


needs_the_data = pytest.mark.skipif(
    not os.environ.get(datasets.FOLDER), reason="HYBRID_MAGIC_DATA names no folder of real data"
)


@needs_the_data
def test_the_real_small_images_have_every_class_equally_often():
    for split, each in (("train", 50), ("test", 10)):
        images, labels, names = datasets.cifar100(split, small=True)
        assert images.shape == (100 * each, 32, 32, 3)
        assert np.bincount(labels).tolist() == [each] * 100
    assert names[0] == "apple"
    assert names[99] == "worm"


@needs_the_data
def test_the_real_small_reviews_are_balanced():
    texts, labels = datasets.imdb("test", small=True)
    assert (len(texts), int(labels.sum())) == (1000, 500)


@needs_the_data
@pytest.mark.thorough
def test_the_real_images_have_the_published_mean_and_deviation():
    images, labels, _ = datasets.cifar100("train")
    assert np.bincount(labels).tolist() == [500] * 100
    pixels = images.reshape(-1, 3) / 255
    # The published values are given to eight digits.
    assert pixels.mean(0) == pytest.approx([0.50707516, 0.48654887, 0.44091784], abs=1e-8)
    assert pixels.std(0) == pytest.approx([0.26733429, 0.25643846, 0.27615047], abs=1e-8)


@needs_the_data
@pytest.mark.thorough
def test_all_the_real_reviews_are_there():
    for split in ("train", "test"):
        texts, labels = datasets.imdb(split)
        assert (len(texts), int(labels.sum())) == (25_000, 12_500)
