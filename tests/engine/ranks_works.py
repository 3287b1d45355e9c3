"""Trainings for several processes, or one: `torchrun ... ranks_works.py DIR [WORK ...]`.

Every work returns what its process has seen; each process saves all of it to DIR.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import sys

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
)

import hybrid_magic as hm
from hybrid_magic.engine import progress
from hybrid_magic.engine.control import RunControl
from hybrid_magic.engine.gradients import NoiseProbe

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
SAMPLES = 107  # shared by no number of processes evenly
FIXED = {"precision": "fp32", "batch": "fixed", "epochs": 2}


def data(n=SAMPLES):
    torch.manual_seed(5)
    x = torch.randn(n, 12, dtype=torch.float64)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return TensorDataset(x, y, torch.arange(n))


def network(*extra):
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(12, 24), *extra, nn.ReLU(), nn.Linear(24, 4)).double()


class Seen:
    """A step that remembers the samples it was trained on."""

    def __init__(self):
        self.samples = []

    def __call__(self, model, batch):
        x, y, number = batch
        if model.training and torch.is_grad_enabled():
            self.samples += number.tolist()
        out = model(x)
        return F.cross_entropy(out, y), {"accuracy": (out.argmax(1) == y).double().mean()}


def told(run, model, step=None, **more):
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "samples": sorted(step.samples) if step else [],
        "sizes": [list(sizes) for sizes, _ in run.sizes],
        "summary": run.summary(),
        "notes": run.notes,
        "changes": [(made.step, made.what, made.before, made.after) for made in run.changes],
        "noise": [record.noise_scale for record in run.history],
        "lr": [record.lr for record in run.history],
        "run": run,
        **more,
    }


def trained(model, loader, step, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = hm.train(model, loader, step, optimizer=optimizer, **{**FIXED, **options})
    return told(run, model, step if isinstance(step, Seen) else None)


def shuffled(dataset=None, **options):
    torch.manual_seed(7)
    options = {"batch_size": 16, "shuffle": True, **options}
    return DataLoader(dataset or data(), **options)


def a_fixed_batch():
    scheduled = network()
    optimizer = torch.optim.SGD(scheduled.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.7)
    scheduler.interval = "batch"
    loader = shuffled()
    return trained(scheduled, loader, Seen(), optimizer, scheduler=scheduler, clip=0.5)


@contextlib.contextmanager
def steady_clock():
    """A device that takes a millisecond a micro-batch, and little more for more samples."""
    real = progress.facts_of

    def steady(*args):
        facts = real(*args)
        times = tuple(1e-3 + 1e-5 * size for size in facts.sizes)
        return dataclasses.replace(facts, micro_seconds=times, optimizer_seconds=1e-3)

    progress.facts_of = steady
    try:
        yield
    finally:
        progress.facts_of = real


def a_growing_batch(**again):
    """The noise scale decides; how long a step takes depends on the machine, and is left alone."""
    model = network()
    options = {"batch": "adaptive", "epochs": 9, "efficiency": 0.5}
    with steady_clock():
        optimizer = torch.optim.AdamW(model.parameters())
        return trained(model, shuffled(data(331)), Seen(), optimizer, **{**options, **again})


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(30, 8), nn.Linear(8, 30)

    def forward(self, x):
        return self.out(self.words(x))


def token_losses():
    torch.manual_seed(8)
    x = torch.randint(0, 30, (120, 9))
    y = x.roll(1, 1).clone()
    for row, length in enumerate(torch.randint(1, 9, (120,)).tolist()):
        y[row, length:] = -100  # most of a batch may be padding, and not evenly
    y[:24] = -100  # and whole shares of a step
    model = Tokens().double()
    loader = DataLoader(TensorDataset(x, y), batch_size=12)
    return trained(model, loader, lambda m, b: F.cross_entropy(m(b[0]).transpose(1, 2), b[1]))


def a_sum():
    def step(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    model = network()
    return trained(model, shuffled(), step, torch.optim.SGD(model.parameters(), lr=1e-3))


class Shuffled(IterableDataset):
    def __iter__(self):
        rows = list(data())
        random.shuffle(rows)
        yield from rows


def an_iterable():
    random.seed(9)
    return trained(network(), DataLoader(Shuffled(), batch_size=16), Seen())


def a_list_of_batches():
    rows = data()
    return trained(network(), [rows[n : n + 16] for n in range(0, 96, 16)], Seen())


class Rows(Dataset):
    """Not a TensorDataset, so that a DataLoader reads it, with workers too."""

    def __init__(self):
        self.rows = data()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def worker_processes():
    loader = shuffled(Rows(), num_workers=1, drop_last=True)
    return trained(network(), loader, Seen())


def batch_norm():
    torch.manual_seed(10)
    model = network(nn.BatchNorm1d(24))
    return trained(model, shuffled(), Seen())


def dropout():
    seen = []

    def step(model, batch):
        seen.append(torch.rand(1).item())
        return F.cross_entropy(model(batch[0]), batch[1])

    found = trained(network(nn.Dropout(0.5)), shuffled(), step, seed=3)
    return found | {"drawn": seen}


def memory_that_runs_out_in_one():
    seen = Seen()

    def step(model, batch):
        loss = seen(model, batch)
        if RANK == SIZE - 1 and len(batch[0]) > 3:
            seen.samples = seen.samples[: -len(batch[0])]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return loss

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = hm.train(model, shuffled(), step, optimizer=optimizer, **FIXED)
    return told(run, model)


def validation():
    rows = shuffled(data(90), batch_size=16)
    return trained(network(), shuffled(), Seen(), val=rows)


class Sometimes(nn.Module):
    """One weight is never used, and one only for some samples."""

    def __init__(self):
        super().__init__()
        self.main, self.rare, self.never = nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(3, 3)

    def forward(self, x):
        out, rare = self.main(x), x[:, :1] > 1.5
        return out + self.rare(x) * rare if rare.any() else out


def unused_weights():
    torch.manual_seed(11)
    model = Sometimes().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    return trained(model, DataLoader(data(), batch_size=16), Seen(), optimizer)


def a_loss_that_is_not_finite_in_one():
    def step(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss * float("inf") if 100 in batch[2].tolist() else loss

    return trained(network(), DataLoader(data(), batch_size=16), step)


def half_precision():
    torch.manual_seed(12)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))

    def step(model, batch):
        return F.cross_entropy(model(batch[0].float()), batch[1])

    loader = DataLoader(data(), batch_size=16)
    return trained(model, loader, step, precision="fp16")


def stopped_by_hand():
    control = RunControl()
    step = Seen()

    def asking(model, batch):
        if RANK == 0 and len(step.samples) > 20 and not control.mail:
            control.ask("pause")
            control.ask("resume")
            control.set("lr_multiplier", 0.5)
            if len(step.samples) > 40:
                control.ask("stop")
        return step(model, batch)

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own = control if RANK == 0 else None
    run = hm.train(model, shuffled(), asking, optimizer=optimizer, control=own, **FIXED)
    return told(run, model, step)


def minutes():
    return trained(network(), shuffled(), Seen(), epochs=None, minutes=0.0005)


class Noisy(Rows):
    def __getitem__(self, index):
        x, y, number = self.rows[index]
        return x + 0.1 * torch.randn(12, dtype=torch.float64), y, number


def gone_on_with():
    """Return an uninterrupted run, and one that goes on from a checkpoint in an epoch's middle."""
    folder = os.environ["WORKS_FOLDER"]
    found = []
    for stops in ((None,), (5, None)):
        model = network(nn.Dropout(0.3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        loader = shuffled(Noisy())
        for stop in stops:
            kept = {"checkpoint": os.path.join(folder, f"of {SIZE}"), "resume": True}
            options = {**FIXED, "steps": stop, **(kept if len(stops) > 1 else {})}
            if stop is None and len(stops) > 1:  # another process would begin so
                model, loader = network(nn.Dropout(0.3)), shuffled(Noisy())
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            run = hm.train(model, loader, Seen(), optimizer=optimizer, **options)
        found.append(told(run, model))
    return {"whole": found[0], "gone_on": found[1]}


def half_way(folder=None, steps=5):
    """Train the first steps, or from a checkpoint on."""
    folder = folder or os.path.join(os.environ["WORKS_FOLDER"], f"half of {SIZE}")
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {**FIXED, "steps": steps, "checkpoint": folder, "resume": True}
    return trained(model, shuffled(), Seen(), optimizer, **options)


def a_last_step_of_one_sample():
    return trained(network(), shuffled(data(17), batch_size=8), Seen())


def a_share_without_targets():
    rows = data(64)
    targets = rows.tensors[1].view(16, 4).clone()
    targets[::2, 2:] = -100  # the last process has nothing to learn from in every other step
    targets[5] = -100  # and here nobody has
    model = network()
    loader = DataLoader(TensorDataset(rows.tensors[0], targets.view(-1)), batch_size=4)
    return trained(model, loader, lambda m, b: F.cross_entropy(m(b[0]), b[1]))


def memory_for_one_sample_each():
    def step(model, batch):
        if SIZE > 1 and len(batch[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return F.cross_entropy(model(batch[0]), batch[1])

    return trained(network(), shuffled(data(64), batch_size=8), step)


def no_memory_to_keep_gradients():
    """They are kept where the noise is measured."""
    real, struck = NoiseProbe.keep, []

    def keep(self):
        if RANK == SIZE - 1 and not struck:
            struck.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self)

    NoiseProbe.keep = keep
    try:
        return trained(network(), shuffled(), Seen(), batch="adaptive") | {"struck": len(struck)}
    finally:
        NoiseProbe.keep = real


class Grown(nn.Module):
    """Keeps a row as long as the longest batch that it has met; no process meets the others'."""

    def __init__(self):
        super().__init__()
        self.main = network()
        self.register_buffer("row", torch.ones(1))

    def forward(self, x):
        if len(x) * (RANK + 1) > len(self.row):
            self.row = torch.ones(len(x) * (RANK + 1))
        return self.main(x)


def buffers_of_other_shapes():
    return trained(Grown(), shuffled(), Seen()) | {"weights": {}}


def validated_batch_norm():
    torch.manual_seed(10)
    model, rows = network(nn.BatchNorm1d(24)), DataLoader(data(60), batch_size=8)
    found = trained(model, shuffled(), Seen(), val=rows)
    model.eval()
    with torch.no_grad():
        losses = [float(F.cross_entropy(model(x), y)) * len(x) for x, y, _ in rows]
    return found | {"truly": sum(losses) / 60, "said": found["summary"]["metrics"][-1]["loss"]}


def shared_out_already():
    rows = data()
    sampler = DistributedSampler(rows, num_replicas=2, rank=RANK % 2)
    try:
        val = DataLoader(rows, batch_size=8, sampler=sampler)
        trained(network(), shuffled(), Seen(), val=val)
    except hm.HybridMagicError as error:
        return {"error": str(error)}
    return {"error": None}


def interrupted(*, late=False, times=1):
    """Interrupt the last process once it waits for data (`late`), or in its third step."""
    seen, sent = Seen(), []

    def strike():
        if RANK == SIZE - 1 and len(seen.samples) > 20 and len(sent) < times:
            sent.append(1)
            signal.raise_signal(signal.SIGINT)

    class Struck(Rows):
        def __getitem__(self, index):
            if late:
                strike()
            return super().__getitem__(index)

    def step(model, batch):
        if not late:
            strike()
        return seen(model, batch)

    model = network()
    folder = os.path.join(os.environ["WORKS_FOLDER"], f"interrupted {late} {SIZE}")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        hm.train(model, shuffled(Struck()), step, optimizer=optimizer, checkpoint=folder, **FIXED)
    except KeyboardInterrupt:
        pass
    run = hm.last_run
    names = [name for name in os.listdir(folder) if name.endswith(".pt")] if RANK == 0 else []
    return {"outcome": run.outcome, "steps": run.steps, "checkpoints": names}


def interrupted_in_a_step():
    return interrupted()


def interrupted_while_it_reads():
    return interrupted(late=True)


def too_small_a_batch():
    model = network()
    before = [param.clone() for param in model.parameters()]
    try:
        trained(model, DataLoader(data(), batch_size=1), Seen())
    except hm.ConfigError as error:
        same = all(map(torch.equal, before, model.parameters()))
        return {"error": str(error), "same": same}
    return {"error": None}


def other_models():
    """Return what is said where the processes made different models; leaves the others alone."""
    torch.manual_seed(RANK)
    model = nn.Linear(12, 4).double()  # another one in each process: the first one's is trained
    return trained(model, shuffled(), Seen())


WORKS = {
    made.__name__: made
    for made in (
        a_fixed_batch, a_growing_batch, token_losses, a_sum, an_iterable,
        a_list_of_batches, worker_processes, batch_norm, dropout, memory_that_runs_out_in_one,
        validation, unused_weights, a_loss_that_is_not_finite_in_one, half_precision,
        stopped_by_hand, minutes, gone_on_with, half_way, too_small_a_batch,
        a_last_step_of_one_sample, a_share_without_targets, memory_for_one_sample_each,
        no_memory_to_keep_gradients, buffers_of_other_shapes, validated_batch_norm,
        shared_out_already, interrupted_in_a_step, interrupted_while_it_reads, other_models,
    )
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    names = sys.argv[2:] or WORKS
    found = {name: WORKS[name]() for name in names}
    torch.save(found, pathlib.Path(sys.argv[1], f"{SIZE}-{RANK}.pt"))


if __name__ == "__main__":
    main()
