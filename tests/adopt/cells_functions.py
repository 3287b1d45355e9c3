"""Loops inside functions: of this cell, of an earlier one, called later."""

from cell import RUNS, Cell
from setups import MLP, NUMBERS, VECTORS

TRAIN_STEP = """
def train_step(x, y):
    model.train()
    optimizer.zero_grad()
    yhat = model(x)
    loss = criterion(yhat, y)
    loss.backward()
    optimizer.step()
    return loss.item()
"""

TRAIN_ONE_EPOCH = """
def train_one_epoch(model, loader, optimizer, criterion, device):
    model.train()
    running_loss = 0.0
    running_hits = 0
    for inputs, targets in loader:
        inputs = inputs.to(device)
        targets = targets.to(device)
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()
        running_loss += loss.item() * inputs.size(0)
        running_hits += torch.sum(outputs.argmax(1) == targets).item()
    n = len(loader.dataset)
    return running_loss / n, running_hits / n
"""

CELLS = [
    Cell(
        "fit defined and called",
        """
def fit(model, train_dl, epochs, lr):
    opt = torch.optim.SGD(model.parameters(), lr=lr)
    hist = []
    for epoch in range(epochs):
        total = 0.
        for xb, yb in train_dl:
            loss = F.cross_entropy(model(xb), yb)
            loss.backward()
            opt.step()
            opt.zero_grad()
            total += loss.item()
        hist.append(total / len(train_dl))
        print(f"Epoch {epoch}: {hist[-1]:.4f}")
    return hist

hist = fit(model, train_loader, 3, 0.1)
""",
        VECTORS + "model = nn.Linear(8, 3)\n",
    ),
    Cell(
        "train and test functions with globals",
        """
def train(epoch):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = model(data)
        loss = criterion(output, target)
        loss.backward()
        optimizer.step()
        if batch_idx % 2 == 0:
            print(f'Train Epoch: {epoch} [{batch_idx * len(data)}/{len(train_loader.dataset)}] '
                  f'Loss: {loss.item():.6f}')

def test():
    model.eval()
    test_loss = correct = 0
    with torch.no_grad():
        for data, target in test_loader:
            output = model(data)
            test_loss += F.cross_entropy(output, target, reduction='sum').item()
            pred = output.argmax(dim=1, keepdim=True)
            correct += pred.eq(target.view_as(pred)).sum().item()
    print(f'Test: {test_loss / 18:.4f}, {correct}/18')

for epoch in range(1, 3):
    train(epoch)
    test()
""",
        MLP,
    ),
    Cell(
        "train_one_epoch of an earlier cell",
        """
for epoch in range(3):
    loss, acc = train_one_epoch(model, train_loader, optimizer, criterion, device)
    print(f"{epoch}: {loss:.4f} {acc:.3f}")
""",
        MLP + TRAIN_ONE_EPOCH,
    ),
    Cell(
        "defined under the magic and called in a later cell",
        TRAIN_ONE_EPOCH,
        MLP,
        after="""
for epoch in range(2):
    print("%.4f %.3f" % train_one_epoch(model, train_loader, optimizer, criterion, device))
""",
    ),
    Cell(
        "called in its cell and again in a later one with another loader",
        TRAIN_ONE_EPOCH
        + """
print(train_one_epoch(model, train_loader, optimizer, criterion, device))
""",
        MLP,
        after="""
half = DataLoader(train_set, batch_size=8)
print(train_one_epoch(model, half, optimizer, criterion, device))
""",
    ),
    Cell(
        "a train_step called from the loop of the same cell",
        TRAIN_STEP
        + """
losses = []
for epoch in range(2):
    for x_batch, y_batch in train_loader:
        losses.append(train_step(x_batch, y_batch))
    print(f"{np.mean(losses[-len(train_loader):]):.4f}")
""",
        MLP,
        RUNS,
    ),
    Cell(
        "a train_step of an earlier cell",
        """
for epoch in range(2):
    total = 0
    for x_batch, y_batch in train_loader:
        x_batch = x_batch.to(device)
        y_batch = y_batch.to(device)
        total += train_step(x_batch, y_batch)
    print(epoch, total / len(train_loader))
""",
        MLP + TRAIN_STEP,
        RUNS,
    ),
    Cell(
        "a closure that builds the step",
        """
def make_train_step(model, loss_fn, optimizer):
    def train_step(x, y):
        model.train()
        yhat = model(x)
        loss = loss_fn(yhat, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return train_step

step = make_train_step(reg, nn.MSELoss(reduction="mean"), optim.SGD(reg.parameters(), lr=0.05))
losses = []
for epoch in range(2):
    for xb, yb in train_dl:
        losses.append(step(xb, yb))
print(losses[0] > losses[-1], round(losses[-1], 4))
""",
        NUMBERS,
        RUNS,
    ),
    Cell(
        "loss_batch with an optional optimizer",
        """
def loss_batch(model, loss_func, xb, yb, opt=None):
    loss = loss_func(model(xb), yb)
    if opt is not None:
        loss.backward()
        opt.step()
        opt.zero_grad()
    return loss.item(), len(xb)

def fit(epochs, model, loss_func, opt, train_dl, valid_dl):
    for epoch in range(epochs):
        model.train()
        for xb, yb in train_dl:
            loss_batch(model, loss_func, xb, yb, opt)
        model.eval()
        with torch.no_grad():
            losses, nums = zip(*[loss_batch(model, loss_func, xb, yb) for xb, yb in valid_dl])
        val_loss = np.sum(np.multiply(losses, nums)) / np.sum(nums)
        print(epoch, f"{val_loss:.5f}")

fit(2, model, F.cross_entropy, optimizer, train_loader, test_loader)
""",
        MLP,
        RUNS,
    ),
    Cell(
        "a closure in a function with a nonlocal counter",
        """
def run(epochs):
    steps = 0
    best = None
    def epoch_of(loader):
        nonlocal steps, best
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            steps += 1
            best = loss.item() if best is None else min(best, loss.item())
    for _ in range(epochs):
        epoch_of(train_loader)
        print(steps, f"{best:.4f}")
    return steps

assert run(2) == 10
""",
        MLP,
    ),
    Cell(
        "a global counter and annotations",
        """
global_step: int = 0

def train(model: nn.Module, loader: DataLoader, opt: optim.Optimizer) -> float:
    global global_step
    total: float = 0.0
    for x, y in loader:
        opt.zero_grad()
        loss: torch.Tensor = criterion(model(x), y)
        loss.backward()
        opt.step()
        global_step += 1
        total += float(loss)
    return total / len(loader)

for epoch in range(2):
    print(global_step, "%.4f" % train(model, train_loader, optimizer))
print(global_step)
""",
        MLP,
    ),
    Cell(
        "main guard",
        """
def main(args):
    for epoch in range(args["epochs"]):
        for i, (x, y) in enumerate(train_loader):
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print("epoch", epoch, "loss", loss.item())

if __name__ == "__main__":
    main({"epochs": 2})
""",
        MLP,
    ),
]
