"""Round the step itself: zero_grad, clipping, scalers, accumulation, averages."""

from cell import Cell
from setups import IMAGES, MLP

CELLS = [
    Cell(
        "zero_grad is missing",
        """
opt = optim.SGD(model.parameters(), lr=0.01)
for epoch in range(2):
    for x, y in train_loader:
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
    print(epoch, loss.item(), model.fc1.weight.grad.norm().item())
""",
        MLP,
    ),
    Cell(
        "zero_grad once an epoch",
        """
opt = optim.SGD(model.parameters(), lr=0.02)
for epoch in range(3):
    opt.zero_grad()
    for x, y in train_loader:
        loss = criterion(model(x), y)
        loss.backward()
        opt.step()
    print(epoch, loss.item())
""",
        MLP,
    ),
    Cell(
        "gradients set to None by hand",
        """
for epoch in range(2):
    for x, y in train_loader:
        loss = criterion(model(x), y)
        for param in model.parameters():
            param.grad = None
        loss.backward()
        optimizer.step()
    print(loss.item())
""",
        MLP,
    ),
    Cell(
        "gradients zeroed in place by hand",
        """
for epoch in range(2):
    for x, y in train_loader:
        criterion(model(x), y).backward()
        optimizer.step()
        for p in model.parameters():
            p.grad.data.zero_()
print(model(X).sum().item())
""",
        MLP,
    ),
    Cell(
        "clipping by norm",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.5)
        optimizer.step()
    print(f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "clipping whose norm is read",
        """
from torch.nn.utils import clip_grad_norm_
norms = []
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        norms.append(norm.item())
        optimizer.step()
    print("mean norm %.4f, clipped %d" % (np.mean(norms), sum(n > 1 for n in norms)))
""",
        MLP,
    ),
    Cell(
        "clipping by value",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), clip_value=0.01)
        optimizer.step()
print(loss.item())
""",
        MLP,
    ),
    Cell(
        "clamping gradients by hand",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        for param in model.parameters():
            param.grad.data.clamp_(-0.02, 0.02)
        optimizer.step()
print(loss.item())
""",
        MLP,
    ),
    Cell(
        "autocast and a scaler of the person's own",
        """
scaler = torch.amp.GradScaler("cpu", enabled=False)
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(x)
            loss = criterion(output, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    print(f"{loss.item():.1f}")
""",
        MLP,
        whole="bfloat16 rounds to three digits",
    ),
    Cell(
        "an enabled scaler with unscaling and clipping",
        """
scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        with torch.autocast(device_type="cpu", enabled=False):
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        print(i, f"{norm:.3f} {loss.item():.4f} {scaler.get_scale():.0f}")
""",
        MLP,
    ),
    Cell(
        "accumulation by hand",
        """
accumulation_steps = 2
optimizer.zero_grad()
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        loss = criterion(model(x), y) / accumulation_steps
        loss.backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    print(epoch, loss.item() * accumulation_steps)
""",
        MLP,
    ),
    Cell(
        "accumulation by hand with the remainder",
        """
k, running = 3, 0.0
for epoch in range(2):
    model.train()
    for i, (x, y) in enumerate(train_loader):
        loss = criterion(model(x), y)
        running += loss.item()
        loss = loss / k
        loss.backward()
        if ((i + 1) % k == 0) or (i + 1 == len(train_loader)):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"update at {i}: {running:.4f}")
            running = 0.0
""",
        MLP,
    ),
    Cell(
        "an average of the weights after the step",
        """
ema = copy.deepcopy(model).eval()
for p in ema.parameters():
    p.requires_grad_(False)
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for e, p in zip(ema.parameters(), model.parameters()):
                e.mul_(0.9).add_(p, alpha=0.1)
    print(epoch, criterion(ema(X), Y).item())
""",
        MLP,
    ),
    Cell(
        "stochastic weight averaging",
        """
from torch.optim.swa_utils import AveragedModel
averaged = AveragedModel(net)
opt = optim.SGD(net.parameters(), lr=0.1)
for epoch in range(3):
    for imgs, lbls in trainloader:
        opt.zero_grad()
        F.cross_entropy(net(imgs), lbls).backward()
        opt.step()
    if epoch >= 1:
        averaged.update_parameters(net)
print(int(averaged.n_averaged), F.cross_entropy(averaged(images), labels).item())
""",
        IMAGES,
    ),
    Cell(
        "parameter groups",
        """
opt = optim.AdamW([
    {"params": net.conv1.parameters(), "lr": 1e-3},
    {"params": net.fc.parameters()},
], lr=1e-2, weight_decay=0.01)
for epoch in range(2):
    for imgs, lbls in trainloader:
        opt.zero_grad()
        loss = F.cross_entropy(net(imgs), lbls)
        loss.backward()
        opt.step()
    print([g["lr"] for g in opt.param_groups], loss.item())
""",
        IMAGES,
    ),
    Cell(
        "weights constrained after the step",
        """
for x, y in train_loader:
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    with torch.no_grad():
        model.fc1.weight.clamp_(-0.3, 0.3)
        model.fc2.weight.div_(model.fc2.weight.norm().clamp(min=1.0))
print(model.fc1.weight.abs().max().item(), model.fc2.weight.norm().item())
""",
        MLP,
    ),
]
