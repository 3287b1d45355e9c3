"""Real data for the notebooks and benchmarks: CIFAR-100 images and IMDB reviews.

Read from the folder that HYBRID_MAGIC_DATA names, else from where PyTorch people usually have them:
torchvision's download, the `datasets` package. Knows no model and no training; NumPy and Pillow are
imported when something is read.

The folder holds `cifar100/` and `imdb/` (everything), `small/` (subsets), or both. Images are
lossless mosaics of 32x32 tiles, 100 in a row, beside a file of labels; reviews are JSON lines.
"""

from __future__ import annotations

import importlib
import json
import lzma
import os
import pathlib
from typing import TYPE_CHECKING, Any

from .errors import HybridMagicError

if TYPE_CHECKING:
    import numpy as np

FOLDER = "HYBRID_MAGIC_DATA"
IMAGE_FILES = {"train": 10, "test": 2}  # of 5,000 images each
SMALL_IMAGES = {"train": 5_000, "test": 1_000}  # 50 and 10 of each of the 100 classes
SMALL_TEXTS = {"train": 4_000, "test": 1_000}  # half positive, half negative


def cifar100(
    split: str = "train", *, small: bool = False, download: bool = True
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return CIFAR-100's images, their classes and the classes' names.

    Args:
        split: "train" (50,000 images) or "test" (10,000).
        small: only 5,000 or 1,000 of them, equally many of each class.
        download: let torchvision fetch the data (169 MB) when no disk has it yet.

    Returns:
        images, uint8 [n, 32, 32, 3] (RGB); labels, int64 [n], 0 to 99; the 100 names.

    Raises:
        HybridMagicError: no such split, or the data cannot be had; it says what to do.

    Source:
        Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
    """
    folder = _folder(split)
    if folder is None:
        images, labels, names = _images_from_torchvision(split, download)
    else:
        images, labels, names = _images_from_folder(folder, split, small)
    if small:
        kept = _balanced(labels, SMALL_IMAGES[split])
        images, labels = images[kept], labels[kept]
    return images, labels, names


def imdb(split: str = "train", *, small: bool = False) -> tuple[list[str], np.ndarray]:
    """Return IMDB's film reviews and whether each is positive.

    Args:
        split: "train" or "test", 25,000 reviews each.
        small: only 4,000 or 1,000 of them, half positive.

    Returns:
        the texts as they were written (with `<br />`); labels, int64 [n], 1 positive, 0 negative.

    Raises:
        HybridMagicError: no such split, or the data cannot be had; it says what to do.

    Source:
        Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis".
    """
    import numpy as np

    folder = _folder(split)
    if folder is None:
        rows = _reviews_from_hub(split)
    else:
        rows = _reviews_from_folder(folder, split, small)
    texts, labels = (
        [row["text"] for row in rows],
        np.array([row["label"] for row in rows], np.int64),
    )
    if small:
        kept = _balanced(labels, SMALL_TEXTS[split])
        texts, labels = [texts[index] for index in kept], labels[kept]
    return texts, labels


def _folder(split: str) -> pathlib.Path | None:
    """Return the folder that the environment names, None when it names none."""
    if split not in SMALL_TEXTS:
        raise HybridMagicError(f'split is {split!r}; wanted "train" or "test"; name one of them')
    name = os.environ.get(FOLDER)
    if not name:
        return None
    if not pathlib.Path(name).is_dir():
        raise HybridMagicError(
            f"{FOLDER} is {name!r}, which is no folder; wanted one that holds cifar100/, imdb/ or "
            "small/; correct it, or unset it to use torchvision's and Hugging Face's copies"
        )
    return pathlib.Path(name)


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise HybridMagicError(
            f"{path} is not there; wanted it because {FOLDER} names its folder; "
            f"put it there, or unset {FOLDER}"
        )
    return path


def _images_from_folder(
    folder: pathlib.Path, split: str, small: bool
) -> tuple[Any, Any, list[str]]:
    import numpy as np

    if small and (folder / "small").is_dir():
        paths = [folder / f"small/cifar100_{split}{SMALL_IMAGES[split]}.webp"]
        table = folder / "small/cifar100_labels.npz"
    else:
        files = 1 if small else IMAGE_FILES[split]
        paths = [folder / f"cifar100/{split}_{number:02d}.webp" for number in range(files)]
        table = folder / "cifar100/labels.npz"
    with np.load(_existing(table)) as arrays:
        labels, names = arrays[f"{split}_fine"], [str(name) for name in arrays["fine_names"]]
    images = np.concatenate([_tiles(path) for path in paths])
    return images, labels[: len(images)].astype(np.int64), names


def _tiles(path: pathlib.Path) -> np.ndarray:
    """Return a mosaic's images, uint8 [n, 32, 32, 3], row by row."""
    import numpy as np
    from PIL import Image

    with Image.open(_existing(path)) as picture:
        mosaic = np.asarray(picture.convert("RGB"))
    rows, columns = mosaic.shape[0] // 32, mosaic.shape[1] // 32
    return mosaic.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)


def _images_from_torchvision(split: str, download: bool) -> tuple[Any, Any, list[str]]:
    import numpy as np

    cache = (
        pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hybrid_magic"
    )
    try:
        from torchvision.datasets import CIFAR100

        data = CIFAR100(str(cache), train=split == "train", download=download)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "check the connection" if download else "pass download=True"
        raise HybridMagicError(
            f"CIFAR-100 is not in {cache} ({reason}); wanted torchvision and its 169 MB download; "
            f"{remedy}, or set {FOLDER} to a folder that has it"
        ) from None
    return data.data, np.array(data.targets, np.int64), list(data.classes)


def _reviews_from_folder(folder: pathlib.Path, split: str, small: bool) -> list[dict[str, Any]]:
    path = folder / "small/imdb_small.jsonl.xz"
    if not (small and path.is_file()):
        path = folder / f"imdb/{split}.jsonl.xz"
    # A line at a time: str.splitlines would cut at U+0085 too, which hundreds of reviews hold.
    with lzma.open(_existing(path), "rt", encoding="utf-8") as lines:
        return [row for row in map(json.loads, lines) if row["split"] == split]


def _reviews_from_hub(split: str) -> list[dict[str, Any]]:
    try:
        hub = importlib.import_module("datasets")  # the package; pyright would read this file
        return list(hub.load_dataset("stanfordnlp/imdb", split=split))
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HybridMagicError(
            f"the IMDB reviews could not be loaded ({reason}); wanted the `datasets` package and a "
            f"connection; pip install datasets, or set {FOLDER} to a folder that has them"
        ) from None


def _balanced(labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices, in order, of the first rows of each class that make `count` in all."""
    import numpy as np

    classes = np.unique(labels)
    each = count // len(classes)
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:each] for label in classes]))
