"""The tensors of a model over all processes: gradients summed, buffers and beginnings alike.

Gradients travel in buckets that are made once, so that summing them takes no memory that a step may
not have. All are sent before the first is waited for. Knows no step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import HybridMagicError
from .ranks import Ranks

_BUCKET_BYTES = 25 << 20  # as DistributedDataParallel's


class Sum:
    """Sums the gradients of one run."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._buckets: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}

    def gradients(
        self, params: Sequence[Tensor], factor: float, head: Tensor, *, lacking: bool
    ) -> Tensor:
        """Give every parameter the sum of all processes' gradients, each times its `factor`; return
        that of their `head`.

        Args:
            head: a few numbers, 1-D, that travel with the gradients as they are.
            lacking: some process has a parameter without a gradient. It counts as nothing there,
                and stays without one where no process has one.
        Raises:
            HybridMagicError: a gradient is sparse.
            PeerLost: a process is gone.
        """
        if lacking:
            held = self._ranks.most([float(param.grad is not None) for param in params])
            params = [param for param, one in zip(params, held, strict=True) if one]
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for param in params:
            if param.grad is not None and param.grad.is_sparse:
                raise HybridMagicError(
                    "a gradient is sparse, and those are not summed over processes; wanted dense "
                    "ones; make the embedding with sparse=False, or leave --processes out"
                )
            groups.setdefault((param.device, param.dtype), []).append(param)
        sent = []
        groups.setdefault((head.device, head.dtype), [])
        for place, group in groups.items():
            riding = head if place == (head.device, head.dtype) else head[:0]
            for number, part in enumerate(_parts(group)):
                bucket = self._filled((*place, number), part, factor, riding)
                sent.append((bucket, part, self._ranks.add_up(bucket)))
                riding = head[:0]
        found = head
        for bucket, part, work in sent:
            self._ranks.done(work)
            sizes = [param.numel() for param in part]
            *pieces, rest = bucket.split([*sizes, bucket.numel() - sum(sizes)])
            found = rest if rest.numel() else found
            for param, summed in zip(part, pieces, strict=True):
                param.grad = _laid_out(summed, param)  # in the bucket, until the step is taken
        return found.clone()

    def _filled(
        self,
        place: tuple[torch.device, torch.dtype, int],
        part: list[Tensor],
        factor: float,
        riding: Tensor,
    ) -> Tensor:
        """Return the bucket of some parameters, with their gradients, and what rides along."""
        sizes = [param.numel() for param in part]
        n, bucket = sum(sizes) + riding.numel(), self._buckets.get(place)
        if bucket is None or bucket.numel() != n:
            bucket = self._buckets[place] = torch.empty(n, device=place[0], dtype=place[1])
        *rooms, rest = bucket.split([*sizes, riding.numel()])
        views = [_laid_out(room, param) for param, room in zip(part, rooms, strict=True)]
        held = [(view, param.grad) for param, view in zip(part, views, strict=True)]
        for view in (view for view, grad in held if grad is None):
            view.zero_()
        present = [(view, grad) for view, grad in held if grad is not None]
        if present:
            torch._foreach_copy_([view for view, _ in present], [grad for _, grad in present])
        if factor != 1.0:
            bucket.mul_(factor)
        rest.copy_(riding)
        return bucket


def _laid_out(flat: Tensor, param: Tensor) -> Tensor:
    """Return `flat`, 1-D, as a tensor like `param`, its strides too (channels_last): optimizers
    that are one kernel want weight and gradient alike."""
    spanned = 1 + sum((n - 1) * step for n, step in zip(param.shape, param.stride(), strict=True))
    if spanned != param.numel():  # it has gaps or overlaps
        return flat.view_as(param)
    return flat.as_strided(param.shape, param.stride(), flat.storage_offset())


def _parts(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters in runs of about a bucket's size."""
    part: list[Tensor] = []
    held = 0
    for param in params:
        part.append(param)
        held += param.numel() * param.element_size()
        if held >= _BUCKET_BYTES:
            yield part
            part, held = [], 0
    if part or not params:
        yield part


def same_start(ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give every process the first one's weights, buffers and optimizer state.

    Raises:
        HybridMagicError: the models of the processes are not alike.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    held = {id(each): each for each in (*model.parameters(), *params, *model.buffers())}
    shape = [(tuple(each.shape), str(each.dtype)) for each in held.values()]
    if any(other != shape for other in ranks.of_all(shape)):
        raise HybridMagicError(
            f"the {ranks.size} processes have made different models; wanted the same one in each; "
            "make it without a look at the rank"
        )
    with torch.no_grad():
        for each in held.values():
            ranks.take_first(each)
    state = ranks.of_first(optimizer.state_dict())
    if state["state"] and not ranks.first:
        optimizer.load_state_dict(state)


def same_buffers(ranks: Ranks, model: nn.Module) -> None:
    """Give every process the same buffers: the mean of what batch norms have learned, the first
    one's of all others. One that has another shape elsewhere (it was made of the data) stays."""
    norms = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    learned = {id(each) for part in norms for each in (part.running_mean, part.running_var)}
    held = {(name, tuple(b.shape), str(b.dtype)): b for name, b in model.named_buffers()}
    alike = set.intersection(*map(set, ranks.of_all(list(held))))
    with torch.no_grad():
        for buffer in (buffer for what, buffer in held.items() if what in alike):
            if id(buffer) in learned:
                ranks.done(ranks.add_up(buffer))
                buffer.div_(ranks.size)
            else:
                ranks.take_first(buffer)
