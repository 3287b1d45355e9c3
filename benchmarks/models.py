"""The models that the benchmarks train, small enough for one CPU core.

Plain PyTorch, as a notebook would have them. Knows no data, no loop and no hybrid_magic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(inputs: int = 64, width: int = 64, depth: int = 3, classes: int = 10) -> nn.Module:
    """Return `depth` hidden layers of Linear and ReLU, and a Linear head."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(width, classes))


def batchnorm_cnn(classes: int = 20, width: int = 8) -> nn.Module:
    """Return three stages of convolution, BatchNorm and ReLU for images [n, 3, 32, 32]."""
    stages: list[nn.Module] = []
    inputs = 3
    for outputs in (width, 2 * width, 4 * width):
        stages += [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        inputs = outputs
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(inputs * 4 * 4, classes))


class TextTransformer(nn.Module):
    """A Transformer encoder that classifies token ids [n, length]; id 0 is padding."""

    def __init__(
        self,
        vocabulary: int,
        length: int,
        *,
        classes: int = 2,
        width: int = 32,
        layers: int = 1,
        heads: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        with torch.no_grad():
            self.embed.weight.mul_(0.1)  # at PyTorch's 1, SGD hardly moves it
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits, [n, classes], of the mean over the tokens that are not padding."""
        real = ids != 0
        hidden = self.embed(ids) + self.position
        for block in self.blocks:
            hidden = block(hidden, real[:, None, None, :])
        weight = real.unsqueeze(-1).to(hidden.dtype)
        return self.head((self.norm(hidden) * weight).sum(1) / weight.sum(1).clamp(min=1))


class _Block(nn.Module):
    """Attention and a feed-forward layer, each behind a LayerNorm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        n, length, width = hidden.shape
        parts = self.qkv(self.norm_attention(hidden)).view(n, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.dropout(self.mix(mixed.transpose(1, 2).reshape(n, length, width)))
        return hidden + self.dropout(self.feed(self.norm_feed(hidden)))
