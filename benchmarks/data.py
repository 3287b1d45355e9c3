"""The small CIFAR-100 and IMDB sets as tensors, ready for a DataLoader.

Knows no model and no training. Everything that is fitted (mean, spread, vocabulary) is fitted on
the training split.
"""

from __future__ import annotations

import collections
import html
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrid_magic import datasets

VOCABULARY = 4_000
LENGTH = 128  # tokens of a review; the rest is cut off

# The superclass, a to t, of each of CIFAR-100's 100 classes in alphabetical order.
_GROUPS = (
    "eboiaghhsddojshldjhlglfkhgnpdpalbkmoqjlfftiipnorsk"
    "qerecaresrkdcmmqmbjtckabqmjnpnqtcegtffitsbcpgarion"
)
SUPERCLASS = np.array([ord(letter) - ord("a") for letter in _GROUPS])


class Split(NamedTuple):
    """Inputs and integer class targets, int64 [n], of training and of test."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def images() -> Split:
    """Return the small CIFAR-100 set: float32 [n, 3, 32, 32], standardised; 20 superclasses."""
    train, train_labels, _ = datasets.cifar100("train", small=True)
    test, test_labels, _ = datasets.cifar100("test", small=True)
    mean, spread = train.mean((0, 1, 2)) / 255, train.std((0, 1, 2)) / 255

    def tensor(raw: np.ndarray) -> Tensor:
        scaled = ((raw / 255 - mean) / spread).astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)))

    return Split(
        tensor(train),
        torch.from_numpy(SUPERCLASS[train_labels]),
        tensor(test),
        torch.from_numpy(SUPERCLASS[test_labels]),
    )


def reviews() -> Split:
    """Return the small IMDB set: token ids, int64 [n, LENGTH], 0 padding and 1 unknown words."""
    train, train_labels = datasets.imdb("train", small=True)
    test, test_labels = datasets.imdb("test", small=True)
    counts = collections.Counter(word for text in train for word in words(text))
    common = [word for word, _ in counts.most_common(VOCABULARY - 2)]
    known = {word: number for number, word in enumerate(common, start=2)}

    def tensor(texts: list[str]) -> Tensor:
        ids = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            found = [known.get(word, 1) for word in words(text)[:LENGTH]]
            row[: len(found)] = torch.tensor(found)
        return ids

    return Split(
        tensor(train),
        torch.from_numpy(np.asarray(train_labels)),
        tensor(test),
        torch.from_numpy(np.asarray(test_labels)),
    )


def words(text: str) -> list[str]:
    """Return a review's words, lower case, without its markup."""
    return re.findall(r"[a-z']+|[!?]", html.unescape(text).replace("<br />", " ").lower())
