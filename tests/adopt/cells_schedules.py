"""What changes from epoch to epoch: learning rates, the best model, early stopping."""

from cell import Cell
from setups import HF, MLP, NUMBERS

CELLS = [
    Cell(
        "a scheduler per epoch",
        """
scheduler = lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
for epoch in range(3):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    scheduler.step()
    print(epoch, scheduler.get_last_lr()[0], f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "one cycle, a step a batch",
        """
sched = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, epochs=2, steps_per_epoch=len(train_loader))
lrs = []
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        sched.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    print(f"{loss.item():.4f}", lrs[-1])
""",
        MLP,
    ),
    Cell(
        "warm-up by a lambda, a step a batch",
        """
total_steps = 2 * len(train_dataloader)
scheduler = lr_scheduler.LambdaLR(
    optimizer, lambda s: min(1.0, (s + 1) / 3) * max(0.0, (total_steps - s) / total_steps))
for epoch in range(2):
    for batch in tqdm(train_dataloader):
        out = model(**batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    print(epoch, scheduler.get_last_lr(), out.loss.item())
""",
        HF,
    ),
    Cell(
        "reduce on plateau by the validation loss",
        """
optimizer = optim.Adam(reg.parameters(), lr=0.05)
scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.3)
for epoch in range(4):
    for xb, yb in train_dl:
        optimizer.zero_grad()
        loss = nn.SmoothL1Loss()(reg(xb), yb)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        val_loss = F.smooth_l1_loss(reg(x_val), y_val)
    scheduler.step(val_loss)
    print(epoch, optimizer.param_groups[0]["lr"], f"{val_loss.item():.4f}")
""",
        NUMBERS,
    ),
    Cell(
        "cosine restarts by a fraction of the epoch",
        """
scheduler = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2)
iters = len(train_loader)
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step(epoch + i / iters)
    print(scheduler.get_last_lr()[0], loss.item())
""",
        MLP,
    ),
    Cell(
        "the learning rate set by hand",
        """
step = 0
for epoch in range(2):
    for x, y in train_loader:
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(step ** -0.5, step * 4 ** -1.5)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(step, optimizer.param_groups[0]["lr"])
""",
        MLP,
    ),
    Cell(
        "the best model kept by deepcopy",
        """
opt = optim.Adam(reg.parameters(), lr=0.02)
best_loss, best_wts = float("inf"), copy.deepcopy(reg.state_dict())
for epoch in range(3):
    reg.train()
    for xb, yb in train_dl:
        opt.zero_grad()
        F.l1_loss(reg(xb), yb).backward()
        opt.step()
    reg.eval()
    with torch.no_grad():
        vloss = np.mean([F.l1_loss(reg(a), b).item() for a, b in val_dl])
    if vloss < best_loss:
        best_loss = vloss
        best_wts = copy.deepcopy(reg.state_dict())
        print(f"saved at {epoch} with {vloss:.4f}")
reg.load_state_dict(best_wts)
""",
        NUMBERS,
    ),
    Cell(
        "early stopping leaves the epoch loop",
        """
opt = optim.SGD(reg.parameters(), lr=0.3)
patience, bad, best = 1, 0, float("inf")
for epoch in range(8):
    for xb, yb in train_dl:
        loss = F.mse_loss(reg(xb), yb)
        opt.zero_grad(); loss.backward(); opt.step()
    with torch.no_grad():
        val = F.mse_loss(reg(x_val), y_val).item()
    if val < best - 0.5:
        best, bad = val, 0
    else:
        bad += 1
        if bad > patience:
            print("Early stopping at", epoch)
            break
""",
        NUMBERS,
    ),
]
