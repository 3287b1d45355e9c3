"""What the model computes in: autocast, and a GradScaler for fp16 only.

The weights stay FP32; mixed precision is a way of computing, not of storing. Decides `auto` from
what the device does natively (emulation does not count). Knows no loop.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("fp32", *DTYPES)
_REFUSALS = (
    "unsafe to autocast",
    "expected scalar type Float but found",
    "not implemented for 'BFloat16'",
    "not implemented for 'Half'",
)


class Precision:
    """How one run computes. `scaler` is None unless the precision is fp16, or "own": the person's
    code enters autocast where it wants to, and may have brought a scaler."""

    def __init__(self, name: str, device: torch.device, scaler: Any = None) -> None:
        self.name, self.ours = name, name != "own"
        self.dtype = DTYPES.get(name)
        self.mixed = self.dtype is not None
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else scaler
        self._autocast: Any = (
            nullcontext()
            if self.dtype is None
            else torch.autocast(device.type, dtype=self.dtype, cache_enabled=_may_cache_casts())
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for a forward pass; made once, entered again and again."""
        return self._autocast


@functools.cache
def _may_cache_casts() -> bool:
    """Return whether autocast keeps apart the casts of a weight with and without gradients: else
    (torch 2.4) a pass under no_grad lets the weight learn nothing in the next one."""
    weight, one = torch.ones(1, 1, requires_grad=True), torch.ones(1, 1)
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            torch.nn.functional.linear(one, weight)
        return torch.nn.functional.linear(one, weight).requires_grad


def refuses_autocast(error: BaseException) -> bool:
    """Return whether a loss (BCELoss) said that it must not be computed under autocast, or an
    operation (of sparse matrices) that it cannot be in a reduced precision."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _REFUSALS)


def native(device: torch.device) -> tuple[str | None, str]:
    """Return the reduced precision that `device` computes natively, and the reason in words.

    bf16 for compute capability 8.0 and up, fp16 for older tensor cores (7.0 and up), None where
    neither is certain to help; whether it does is then a matter of measuring (`worth_measuring`).
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if torch.version.hip or major >= 8:
            return "bf16", f"compute capability {major}.{minor} computes bf16 natively"
        if major == 7:
            return (
                "fp16",
                f"compute capability {major}.{minor} has fp16 tensor cores and no native bf16",
            )
        return None, f"compute capability {major}.{minor} has no tensor cores"
    if device.type == "cpu":
        if _cpu_computes_bf16():
            return None, "this CPU has bf16 units"
        return None, "this CPU has no bf16 units"
    return None, f"{device.type} does not say what it computes natively"


def worth_measuring(device: torch.device) -> str | None:
    """Return the reduced precision whose speed a short measurement should compare with fp32."""
    if device.type == "cuda":
        return "fp16" if native(device)[0] is None else None
    if device.type == "cpu":
        return "bf16" if _cpu_computes_bf16() else None
    return "fp16" if device.type == "mps" else None


def may_scale_losses(asked: str, device: torch.device) -> bool:
    """Return whether a run may compute in fp16, whose first steps overflow as a rule."""
    if asked != "auto":
        return asked == "fp16"
    return "fp16" in (native(device)[0], worth_measuring(device))


def _cpu_computes_bf16() -> bool:
    try:
        from torch.backends import mkldnn

        asked = torch.ops.mkldnn._is_mkldnn_bf16_supported
        return bool(mkldnn.is_available() and asked() and _has_bf16_instructions())
    except (AttributeError, RuntimeError):
        return False


def _has_bf16_instructions() -> bool:
    """Return whether the processor lists bf16 arithmetic (avx512_bf16, amx_bf16, or Arm's bf16)."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(
                (line for line in file if line.lower().startswith(("flags", "features"))), ""
            )
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
