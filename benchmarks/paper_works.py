"""The two works of the paper's table: ResNet on CIFAR-100, a Transformer encoder on IMDB.

Data as one would really load them (random crops and flips for every image of every epoch; words,
and a vocabulary of the training split), models, optimizers and schedules. Plain PyTorch: knows no
hybrid_magic but its reader of files, no variant and no clock.
"""

from __future__ import annotations

import collections
import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from hybrid_magic import datasets

from . import data

WARMUP = 0.05  # of the steps: the learning rate rises
ENCODERS = {
    # width, layers, heads, words known (padding and the unknown one among them), and the highest
    # learning rate at 64 reviews a step
    "tiny": (64, 2, 2, 4_000, 1e-3),
    "small": (256, 6, 4, 30_000, 3e-4),
    "base": (768, 12, 12, 30_000, 1e-4),  # BERT-base's size
}


@dataclass(frozen=True)
class Sizes:
    """What is trained and how large: every field changes what a trial means.

    `samples` and `val_samples` are the most that are used, None all. `depth` and `stem` are
    ResNet's, `size` and `length` (tokens of a review) the encoder's. `made_up` data are for trying
    the program out.
    """

    work: str
    epochs: int
    batch: int
    small: bool = False
    samples: int | None = None
    val_samples: int | None = None
    workers: int = 0
    depth: int = 50
    stem: int = 3
    size: str = "base"
    length: int = 256
    made_up: bool = False


@dataclass(frozen=True)
class Work:
    """A work with its data: makes the loaders, the model, the optimizer and its schedule."""

    sizes: Sizes
    train: Dataset[Any]
    val: TensorDataset

    def loader(self, seed: int, *, pin: bool = False) -> DataLoader[Any]:
        """Return the training loader; the order of samples follows from `seed` alone."""
        return DataLoader(
            self.train,
            batch_size=self.sizes.batch,
            shuffle=True,
            num_workers=self.sizes.workers,
            persistent_workers=self.sizes.workers > 0,
            pin_memory=pin,
            generator=torch.Generator().manual_seed(seed),
        )

    def cut(self, sizes: Sizes) -> Work:
        """Return the first `samples` and `val_samples` of the data, with what was fitted on all."""
        val = TensorDataset(*(tensor[: sizes.val_samples] for tensor in self.val.tensors))
        kept = range(min(sizes.samples or sys.maxsize, len(self.train)))  # type: ignore[arg-type]
        return Work(sizes, Subset(self.train, kept), val)

    def val_loader(self) -> DataLoader[Any]:
        return DataLoader(self.val, batch_size=500 if self.sizes.work == "cifar" else 250)

    def example(self) -> list[Tensor]:
        """Return a batch as the loader yields them, without touching a loader's order."""
        count = min(self.sizes.batch, len(self.train))  # type: ignore[arg-type]
        return torch.utils.data.default_collate([self.train[index] for index in range(count)])

    def model(self, seed: int) -> nn.Module:
        """Return the model with fresh weights, the same for the same seed."""
        torch.manual_seed(seed)
        if self.sizes.work == "cifar":
            return resnet(self.sizes.depth, self.sizes.stem)
        return Encoder(self.sizes.size, self.sizes.length)

    def optimizer(self, model: nn.Module, **how: Any) -> torch.optim.Optimizer:
        """Return SGD or AdamW; `how` is handed on (fused)."""
        if self.sizes.work == "cifar":
            lr = 0.1 * self.sizes.batch / 128
            return torch.optim.SGD(
                model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4, **how
            )
        lr = ENCODERS[self.sizes.size][-1] * math.sqrt(self.sizes.batch / 64)
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, **how)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Return a short rise and a cosine to zero, advanced after every loader batch."""
        batches = math.ceil(len(self.train) / self.sizes.batch)  # type: ignore[arg-type]
        total = self.sizes.epochs * batches
        rise = max(1, round(WARMUP * total))

        def share(step: int) -> float:
            return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * step / total))

        scheduler = LambdaLR(optimizer, share)
        scheduler.interval = "batch"  # type: ignore[attr-defined]
        return scheduler


def open_work(sizes: Sizes) -> Work:
    """Return the work with its data read, and tokenised where they are texts."""
    read: Any = (made_up if sizes.made_up else real)[sizes.work]
    splits = [*read("train", sizes), *read("test", sizes)]
    if sizes.work == "cifar":
        return Work(sizes, *_images(*splits))
    return Work(sizes, *_reviews(*splits, length=sizes.length, most=ENCODERS[sizes.size][3]))


def step(model: nn.Module, batch: Sequence[Tensor]) -> Any:
    """Return the loss of a batch; in eval mode also its accuracy, both in strict FP32: whatever a
    model was trained in, all are judged alike."""
    x, y = batch
    if model.training:
        return F.cross_entropy(model(x), y)
    with strict_fp32(), torch.autocast(x.device.type, enabled=False):
        logits = model(x)
        accuracy = (logits.argmax(1) == y).float().mean()
        return F.cross_entropy(logits, y), {"accuracy": accuracy}


@contextlib.contextmanager
def strict_fp32(strict: bool = True) -> Iterator[None]:
    """Switch TF32 off, in convolutions and in matrix products; not `strict`: as PyTorch ships."""
    found = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = not strict
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = found


# -- images


def _images(
    train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray
) -> tuple[Dataset[Any], TensorDataset]:
    from torchvision.transforms import v2

    mean, spread = train.mean((0, 1, 2)) / 255, train.std((0, 1, 2)) / 255
    normalise = [
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean.tolist(), spread.tolist()),
    ]
    crop = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    seen = v2.Compose(normalise)(_channels_first(val))
    return (
        Images(_channels_first(train), train_labels, v2.Compose([*crop, *normalise])),
        TensorDataset(seen, torch.from_numpy(val_labels)),
    )


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


class Images(Dataset[Any]):
    """Images, uint8 [n, 3, 32, 32], changed anew whenever one is asked for."""

    def __init__(self, images: Tensor, labels: np.ndarray, change: Any) -> None:
        self.images, self.labels, self.change = images, labels.tolist(), change

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.change(self.images[index]), self.labels[index]


def resnet(depth: int, stem: int, classes: int = 100) -> nn.Module:
    """Return torchvision's ResNet; a stem of 3 is one 3x3 convolution without stride or pooling."""
    from torchvision import models

    model = getattr(models, f"resnet{depth}")(num_classes=classes)
    if stem == 3:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


# -- reviews


def _reviews(
    train: list[str], train_labels: np.ndarray, val: list[str], val_labels: np.ndarray,
    *, length: int, most: int,
) -> tuple[TensorDataset, TensorDataset]:  # fmt: skip
    """Return token ids [n, length], 0 padding and 1 unknown; the words known are `train`'s."""
    texts, others = ([data.words(text) for text in part] for part in (train, val))
    counts = collections.Counter(word for text in texts for word in text)
    common = counts.most_common(most - 2)
    known = {word: number for number, (word, _) in enumerate(common, start=2)}

    def ids(reviews: list[list[str]]) -> Tensor:
        found = np.zeros((len(reviews), length), np.int64)
        for row, review in zip(found, reviews, strict=True):
            first = [known.get(word, 1) for word in review[:length]] or [1]
            row[: len(first)] = first
        return torch.from_numpy(found)

    return (
        TensorDataset(ids(texts), torch.from_numpy(train_labels)),
        TensorDataset(ids(others), torch.from_numpy(val_labels)),
    )


class Encoder(nn.Module):
    """A Transformer encoder that classifies token ids [n, length]; id 0 is padding."""

    def __init__(self, size: str, length: int, classes: int = 2) -> None:
        super().__init__()
        width, layers, heads, known, _ = ENCODERS[size]
        self.embed = nn.Embedding(known, width, padding_idx=0)
        self.position = nn.Parameter(torch.empty(length, width))
        for table in (self.embed.weight, self.position):
            nn.init.normal_(table, std=0.02)
        self.dropout = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0.1, F.gelu, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, [n, classes], of the mean over the tokens that are not padding."""
        padding = ids == 0
        hidden = self.dropout(self.embed(ids) + self.position)
        hidden = self.layers(hidden, src_key_padding_mask=padding)
        weight = (~padding).unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


# -- where samples come from


def _most(split: str, sizes: Sizes) -> int | None:
    return sizes.samples if split == "train" else sizes.val_samples


def _real_images(split: str, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    images, labels, _ = datasets.cifar100(split, small=sizes.small)
    return images[: _most(split, sizes)], labels[: _most(split, sizes)]


def _real_reviews(split: str, sizes: Sizes) -> tuple[list[str], np.ndarray]:
    texts, labels = datasets.imdb(split, small=sizes.small)
    kept = np.random.default_rng(0).permutation(len(texts))[: _most(split, sizes)]
    return [texts[index] for index in kept], labels[kept]


def _made_up_images(split: str, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(split == "train")
    labels = source.integers(0, 100, _most(split, sizes) or 64)
    images = source.integers(0, 100, (len(labels), 32, 32, 3)) + labels[:, None, None, None]
    return images.astype(np.uint8), labels


def _made_up_reviews(split: str, sizes: Sizes) -> tuple[list[str], np.ndarray]:
    source = np.random.default_rng(split == "train")
    labels = source.integers(0, 2, _most(split, sizes) or 64)
    kinds = (("dull", "flat", "the", "film"), ("bright", "warm", "the", "film"))
    return [" ".join(source.choice(kinds[label], 20)) for label in labels], labels


real = {"cifar": _real_images, "imdb": _real_reviews}
made_up = {"cifar": _made_up_images, "imdb": _made_up_reviews}
