"""What is seldom, but met: odd places for a loss, a model or an optimizer; odd statements."""

from cell import RUNS, Cell, refused
from setups import MLP, VECTORS

CELLS = [
    Cell(
        "a loss in a dict and an optimizer in a namespace",
        """
from types import SimpleNamespace
state = SimpleNamespace(net=model, opt=optimizer, step=0)
for epoch in range(2):
    for x, y in train_loader:
        losses = {"ce": criterion(state.net(x), y)}
        losses["l2"] = 1e-3 * sum(p.pow(2).sum() for p in state.net.parameters())
        losses["total"] = losses["ce"] + losses["l2"]
        state.opt.zero_grad()
        losses["total"].backward()
        state.opt.step()
        state.step += 1
    print(state.step, {k: f"{v.item():.4f}" for k, v in losses.items()})
""",
        MLP,
    ),
    Cell(
        "a backward of an expression",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        out = model(x)
        ce, reg = criterion(out, y), out.pow(2).mean()
        (ce + 0.01 * reg).backward()
        optimizer.step()
    print(f"{ce.item():.4f} {reg.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "two backwards before a step",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        noisy = criterion(model(x * 1.1), y)
        noisy.backward()
        optimizer.step()
    print(f"{loss.item():.4f} {noisy.item():.4f}")
""",
        MLP,
        RUNS,
        piecewise=True,
    ),
    Cell(
        "several models of one list, an optimizer each",
        """
nets = [MLP(4) for _ in range(3)]
opts = [optim.SGD(net.parameters(), lr=0.1) for net in nets]
for epoch in range(2):
    for x, y in train_loader:
        losses = []
        for net, opt in zip(nets, opts):
            opt.zero_grad()
            loss = criterion(net(x), y)
            loss.backward()
            opt.step()
            losses.append(loss.item())
    print(" ".join(f"{value:.4f}" for value in losses))
""",
        MLP,
        refused("opt.step()", "optimizer"),
    ),
    Cell(
        "a running sum of loss tensors",
        """
for epoch in range(2):
    running = 0
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        running += loss
    print(running / len(train_loader))
""",
        MLP,
    ),
    Cell(
        "an out-of-memory guard of the person's own",
        """
skipped = 0
for epoch in range(2):
    for x, y in train_loader:
        try:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            skipped += 1
            torch.cuda.empty_cache()
    print(skipped, f"{loss.item():.4f}")
""",
        MLP,
        RUNS,
        piecewise=True,
    ),
    Cell(
        "a generator that yields the losses",
        """
def training(epochs):
    for epoch in range(epochs):
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            yield epoch, loss.item()

for n, (epoch, value) in enumerate(training(2)):
    if n % 3 == 0:
        print(epoch, f"{value:.4f}")
""",
        MLP,
        RUNS,
    ),
    Cell(
        "one batch only, to see whether it runs",
        """
for x, y in train_loader:
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    break
print(x.shape, f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "train mode set in every step, with a snapshot of the model",
        """
snapshots = []
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        model.train()
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        if i == 2:
            snapshots.append(copy.deepcopy(model).eval())
        model.eval()
print(len(snapshots), criterion(snapshots[0](X), Y).item())
""",
        MLP,
    ),
    Cell(
        "gradients looked at by name, then scaled",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        grads = {name: p.grad.abs().mean().item() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad /= len(grads)
        optimizer.step()
    print({name: f"{value:.4f}" for name, value in grads.items()})
""",
        MLP,
    ),
    Cell(
        "a loss of the step before, and its change",
        """
before = None
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        if before is not None and loss.item() > before:
            print("up by", f"{loss.item() - before:.4f}")
        before = loss.item()
""",
        MLP,
    ),
    Cell(
        "epochs in a walrus of tqdm",
        """
for epoch in (bar := tqdm(range(3))):
    losses = []
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    bar.set_description(f"{torch.stack(losses).mean():.3f}")
print(bar.n, f"{torch.stack(losses).mean():.4f}")
""",
        MLP,
    ),
    Cell(
        "detached copies and numbers of the outputs of an epoch",
        """
net = nn.Linear(8, 3)
opt = optim.Adam(net.parameters(), lr=0.02)
for epoch in range(2):
    outs, ys = [], []
    for x, y in train_loader:
        opt.zero_grad()
        out = net(x)
        loss = F.cross_entropy(out, y)
        loss.backward()
        opt.step()
        outs.append(out.detach().cpu())
        ys += y.tolist()
        n, (first, *_) = out.shape[0], out.softmax(1)
    outs = torch.cat(outs)
    print(outs.shape, len(ys), n, f"{first.max().item():.3f} {outs.argmax(1).float().mean():.3f}")
""",
        VECTORS,
    ),
    Cell(
        "under a profiler's record and anomaly detection",
        """
with torch.autograd.set_detect_anomaly(True, check_nan=False):
    for x, y in train_loader:
        with torch.profiler.record_function("step"):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
print(f"{loss.item():.4f}")
""",
        MLP,
    ),
]
