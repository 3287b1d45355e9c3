"""How a loop goes and ends: while, break, continue, branches."""

from cell import RUNS, VERBATIM, Cell
from setups import MLP, NUMBERS

CELLS = [
    Cell(
        "while loop over epochs until good enough",
        """
epoch, acc = 0, 0.0
while acc < 0.9 and epoch < 3:
    hits = 0
    for x, y in train_loader:
        optimizer.zero_grad()
        out = model(x)
        loss = criterion(out, y)
        loss.backward()
        optimizer.step()
        hits += (out.argmax(1) == y).sum().item()
    acc = hits / len(train_set)
    epoch += 1
    print(epoch, f"{acc:.3f}")
""",
        MLP,
    ),
    Cell(
        "break when the loss is low enough",
        """
done = False
for epoch in range(5):
    for i, (x, y) in enumerate(train_loader):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        if loss.item() < 0.9:
            done = True
            print("good enough at", epoch, i)
            break
    if done:
        break
else:
    print("never")
""",
        MLP,
    ),
    Cell(
        "break after some batches",
        """
max_batches = 3
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        if i >= max_batches:
            break
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(i, f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "continue for batches that are too small",
        """
skipped = 0
for epoch in range(2):
    for x, y in train_loader:
        if len(x) < 12:
            skipped += 1
            continue
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(skipped, f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "continue when the loss is not finite",
        """
bad = 0
for epoch in range(2):
    for step, (x, y) in enumerate(train_loader):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        if not torch.isfinite(loss):
            bad += 1
            continue
        loss.backward()
        optimizer.step()
    print(bad, f"{loss.item():.4f}")
""",
        MLP,
        VERBATIM,
        piecewise=True,
    ),
    Cell(
        "if training inside the batch loop",
        """
training = True
for epoch in range(2):
    for x, y in train_loader:
        out = model(x)
        loss = criterion(out, y)
        if training:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "walrus, assert and del",
        """
for epoch in range(2):
    for x, y in train_loader:
        assert x.shape[1] == 8, "eight features"
        optimizer.zero_grad()
        (loss := criterion(out := model(x), y)).backward()
        optimizer.step()
        if (hit := (out.argmax(1) == y).float().mean()) > 0.8:
            print("good batch", f"{hit:.2f}")
        del out
    print(f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "match on a name",
        """
kind = "huber"
opt = optim.SGD(reg.parameters(), lr=0.05)
for epoch in range(2):
    for xb, yb in train_dl:
        pred = reg(xb)
        match kind:
            case "mse":
                loss = F.mse_loss(pred, yb)
            case "huber":
                loss = F.huber_loss(pred, yb)
            case _:
                raise ValueError(kind)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"{loss.item():.4f}")
""",
        NUMBERS,
    ),
    Cell(
        "a branch on the target inside the slice",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        out = model(x)
        if epoch == 0:
            loss = criterion(out, y)
        else:
            loss = F.multi_margin_loss(out, y)
        loss.backward()
        optimizer.step()
    print(f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "comprehensions whose names are the loop's own",
        """
for epoch in range(2):
    losses = []
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        spread = max(v for v in losses) - min(v for v in losses)
        grads = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        x = [x * 2 for x in range(3)]
    print(f"{spread:.4f}", sorted(grads)[:2], f"{sum(grads.values()):.3f}", x)
""",
        MLP,
    ),
    Cell(
        "batches seen until a number of steps",
        """
max_steps, step, losses = 7, 0, []
while step < max_steps:
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 3 == 0:
            model.eval()
            with torch.no_grad():
                print(step, f"{criterion(model(X), Y):.4f}")
            model.train()
        if step == max_steps:
            break
print(len(losses))
""",
        MLP,
    ),
    Cell(
        "several updates a batch",
        """
for epoch in range(2):
    for x, y in train_loader:
        for _ in range(2):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
    print(f"{loss.item():.4f}")
""",
        MLP,
        RUNS,
    ),
    Cell(
        "for with an else that evaluates",
        """
for epoch in range(2):
    total = 0.0
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        total += loss.item()
        loss.backward()
        optimizer.step()
    else:
        with torch.no_grad():
            for x, y in test_loader:
                loss = criterion(model(x), y)
        print(f"{total / len(train_loader):.4f} {loss.item():.4f} {len(x)}")
""",
        MLP,
    ),
    Cell(
        "an evaluation inside the batch loop that takes its names",
        """
steps = running = 0
for epoch in range(2):
    for inputs, labels in train_loader:
        steps += 1
        optimizer.zero_grad()
        out = model.forward(inputs)
        loss = criterion(out, labels)
        loss.backward()
        optimizer.step()
        running += loss.item()
        if steps % 3 == 0:
            model.eval()
            accuracy = 0
            with torch.no_grad():
                for inputs, labels in test_loader:
                    out = model.forward(inputs)
                    accuracy += (out.argmax(1) == labels).float().mean().item()
            print(f"{running / 3:.3f} {accuracy / len(test_loader):.3f} {len(inputs)}")
            running = 0
            model.train()
""",
        MLP,
    ),
    Cell(
        "an updater that is an optimizer or a function",
        """
def train_epoch(net, batches, loss, updater):
    total = n = 0
    for X, y in batches:
        each = loss(net(X), y)
        if isinstance(updater, torch.optim.Optimizer):
            updater.zero_grad()
            each.mean().backward()
            updater.step()
        else:
            each.sum().backward()
            updater(X.shape[0])
        total += float(each.sum())
        n += y.numel()
    return total / n

each_loss = nn.CrossEntropyLoss(reduction="none")
for epoch in range(2):
    print("%.4f" % train_epoch(model, train_loader, each_loss, optimizer))
""",
        MLP,
        RUNS,
    ),
]
