"""Where a loop may stand, and what else a cell may hold: IPython's own lines, await."""

from cell import Cell
from setups import IMAGES, MLP

CELLS = [
    Cell(
        "under with",
        """
with torch.random.fork_rng(), torch.enable_grad():
    torch.manual_seed(3)
    for epoch in range(2):
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        print(epoch, f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "under if, with an else that loads",
        """
retrain = True
if retrain:
    for epoch in range(2):
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        print(epoch, f"{loss.item():.4f}")
else:
    model.load_state_dict(torch.load("model.pt"))
""",
        MLP,
    ),
    Cell(
        "under try for a keyboard interrupt",
        """
try:
    for epoch in range(2):
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
except KeyboardInterrupt:
    print("stopped early")
finally:
    print("trained", epoch + 1, f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "ipython lines in the cell",
        """
%matplotlib inline
!echo training >&2
here = !echo done
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
%time total = sum(p.numel() for p in model.parameters())
print(here[0], total, f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "a print that goes on with a percent sign",
        """
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        if i % 2 == 0:
            print('Epoch [%d/%d], Step [%d/%d], Loss: %.4f'
                  %(epoch + 1, 2, i + 1, len(train_loader), loss.item()))
""",
        MLP,
    ),
    Cell(
        "await in the epoch loop",
        """
import asyncio
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    await asyncio.sleep(0)
    print(epoch, f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "await in the batch loop",
        """
import asyncio
for x, y in train_loader:
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    await asyncio.sleep(0)
print(f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "semicolons, a last expression and a docstring",
        """
'''Train for two epochs.'''
optimizer = optim.SGD(net.parameters(), lr=0.1); n = 0
for epoch in range(2):
    for imgs, lbls in trainloader:
        optimizer.zero_grad(); loss = F.cross_entropy(net(imgs), lbls)
        loss.backward(); optimizer.step(); n += 1
n
""",
        IMAGES,
    ),
    Cell(
        "multi-line strings and decorators round the loop",
        '''
def timed(fn):
    def wrapper(*args, **kwargs):
        start = time.time()
        result = fn(*args, **kwargs)
        print(f"{fn.__name__} took {time.time() - start:.0f} s")
        return result
    return wrapper

@timed
def train():
    """Train
  for one epoch."""
    for imgs, lbls in trainloader:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(imgs), lbls)
        loss.backward()
        optimizer.step()
    return f"""loss:
  {loss.item():.4f}"""

optimizer = optim.SGD(net.parameters(), lr=0.1)
print(train())
''',
        IMAGES,
    ),
    Cell(
        "cross-validation by folds",
        """
folds = np.array_split(np.random.permutation(54), 3)
scores = []
for k, held in enumerate(folds):
    rest = np.concatenate([f for j, f in enumerate(folds) if j != k])
    fold = torch.utils.data.Subset(train_set, rest.tolist())
    loader = DataLoader(fold, batch_size=12, shuffle=True)
    net = MLP(6)
    opt = optim.Adam(net.parameters(), lr=0.02)
    for epoch in range(2):
        for x, y in loader:
            opt.zero_grad()
            loss = criterion(net(x), y)
            loss.backward()
            opt.step()
    with torch.no_grad():
        scores.append((net(X[held]).argmax(1) == Y[held]).float().mean().item())
    print(f"fold {k}: {scores[-1]:.3f}")
print(f"mean {np.mean(scores):.3f}")
""",
        MLP,
    ),
    Cell(
        "the state read between two batch loops of an epoch",
        """
for epoch in range(2):
    model.train()
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    correct = total = 0
    model.eval()
    for x, y in test_loader:
        with torch.no_grad():
            outputs = model(x)
        _, predicted = torch.max(outputs.data, 1)
        total += y.size(0)
        correct += (predicted == y).sum().item()
    print('Accuracy of the network: %d %%' % (100 * correct / total))
    torch.save(model.state_dict(), "/dev/null")
""",
        MLP,
    ),
]
