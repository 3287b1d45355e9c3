"""What a variant of an ablation is made of, and the options that it trains with.

A name is `hybrid`, or words joined by +: the arithmetic (`fp32` strict, `tf32` as PyTorch ships,
`mp` mixed precision; strict FP32 when none is said), `ga` accumulation, `abs` an adaptive batch.
Knows no torch and no run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import AblateConfig

PIECES = 4  # micro-batches of a loader batch under `ga`, unless --accum or --micro say


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to train. `tf32` is whether it may be used, None: the run decides as it comes."""

    name: str
    tf32: bool | None
    recovers: bool  # cuts its steps smaller where memory runs out; else that ends it
    hybrid: bool
    options: dict[str, Any]  # fields of TrainConfig, in place of the ablation's own


def variant_of(name: str, config: AblateConfig) -> Variant:
    """Return the variant of a checked name."""
    if name == "hybrid":
        return Variant(name, None, True, True, {})
    words = set(name.split("+"))
    mixed, cut, grows = "mp" in words, "ga" in words, "abs" in words
    options: dict[str, Any] = {} if mixed else {"precision": "fp32"}
    if grows:
        options["batch"] = "adaptive"
    elif config.batch == "adaptive":
        options["batch"] = "fixed"
    if not cut:
        options |= {"accum": 1, "micro": "auto"}
    elif not grows and config.accum == config.micro == "auto":
        options["accum"] = PIECES
    tf32 = None if mixed else "tf32" in words
    return Variant(name, tf32, cut or grows, mixed and cut and grows, options)
