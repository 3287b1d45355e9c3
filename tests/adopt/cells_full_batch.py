"""No loader: the whole set at once, batches cut or drawn by hand, iterators."""

from cell import RUNS, VERBATIM, Cell
from setups import IMAGES, IMPORTS, MLP, NUMBERS

CELLS = [
    Cell(
        "full batch for t in range",
        """
loss_fn = torch.nn.MSELoss(reduction='sum')
learning_rate = 1e-3
optimizer = torch.optim.RMSprop(reg.parameters(), lr=learning_rate)
for t in range(20):
    y_pred = reg(x_train)
    loss = loss_fn(y_pred, y_train)
    if t % 5 == 4:
        print(t, loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
""",
        NUMBERS,
        VERBATIM,
    ),
    Cell(
        "full batch with evaluation and history",
        """
torch.manual_seed(42)
opt = optim.SGD(params=reg.parameters(), lr=0.05)
loss_fn = nn.L1Loss()
epoch_count, loss_values, test_loss_values = [], [], []
for epoch in range(12):
    reg.train()
    y_pred = reg(x_train)
    loss = loss_fn(y_pred, y_train)
    opt.zero_grad()
    loss.backward()
    opt.step()
    reg.eval()
    with torch.inference_mode():
        test_loss = loss_fn(reg(x_val), y_val)
    if epoch % 4 == 0:
        epoch_count.append(epoch)
        loss_values.append(loss.detach().numpy())
        test_loss_values.append(test_loss.numpy())
        print(f"Epoch: {epoch} | MAE Train Loss: {loss} | MAE Test Loss: {test_loss}")
""",
        NUMBERS,
        VERBATIM,
    ),
    Cell(
        "full batch in a function with trange",
        """
from tqdm import trange

def train(X, y, n_epochs=10):
    losses = []
    for epoch in trange(n_epochs, desc="training"):
        out = model(X)
        loss = criterion(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

losses = train(X, Y)
print(f"{losses[0]:.3f} -> {losses[-1]:.3f}")
""",
        MLP,
        VERBATIM,
    ),
    Cell(
        "loose parameters, full batch",
        """
w = torch.randn(5, 1, requires_grad=True)
b = torch.zeros(1, requires_grad=True)
opt = optim.SGD([w, b], lr=0.1)
for step in range(15):
    pred = x_train @ w + b
    loss = ((pred - y_train) ** 2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
print(w.detach().flatten().tolist(), b.item())
""",
        NUMBERS,
        VERBATIM,
    ),
    Cell(
        "minibatches sliced by hand from a permutation",
        """
batch_size = 12
for epoch in range(2):
    permutation = torch.randperm(X.size()[0])
    epoch_loss = 0.0
    for i in range(0, X.size()[0], batch_size):
        indices = permutation[i:i + batch_size]
        batch_x, batch_y = X[indices], Y[indices]
        optimizer.zero_grad()
        outputs = model(batch_x)
        loss = criterion(outputs, batch_y)
        loss.backward()
        optimizer.step()
        epoch_loss += loss.item() * len(indices)
    print(f"{epoch_loss / len(X):.4f}")
""",
        MLP,
        VERBATIM,
    ),
    Cell(
        "random windows by get_batch",
        """
text = torch.randint(0, 11, (200,))
block_size, batch_size = 8, 12

def get_batch():
    ix = torch.randint(len(text) - block_size, (batch_size,))
    x = torch.stack([text[i:i + block_size] for i in ix])
    y = torch.stack([text[i + 1:i + block_size + 1] for i in ix])
    return x, y

bigram = nn.Sequential(nn.Embedding(11, 11))
opt = torch.optim.AdamW(bigram.parameters(), lr=1e-2)
for steps in range(10):
    xb, yb = get_batch()
    logits = bigram(xb)
    B, T, C = logits.shape
    loss = F.cross_entropy(logits.view(B * T, C), yb.view(B * T))
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    if steps % 5 == 0:
        print(f"step {steps}: {loss.item():.4f}")
""",
        IMPORTS,
        VERBATIM,
    ),
    Cell(
        "iter and next for a few steps",
        """
it = iter(train_loader)
for step in range(8):
    try:
        x, y = next(it)
    except StopIteration:
        it = iter(train_loader)
        x, y = next(it)
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    print(step, len(x), f"{loss.item():.3f}")
""",
        MLP,
        RUNS,
    ),
    Cell(
        "iter and next of the first batch only",
        """
images, labels = next(iter(trainloader))
optimizer = optim.SGD(net.parameters(), lr=0.1)
for step in range(6):  # can it learn one batch by heart?
    optimizer.zero_grad()
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    optimizer.step()
print(loss.item() < 0.8, len(images))
""",
        IMAGES,
        VERBATIM,
    ),
    Cell(
        "while True over full batches",
        """
opt = optim.SGD(reg.parameters(), lr=0.05)
t = 0
while True:
    loss = F.mse_loss(reg(x_train), y_train)
    opt.zero_grad()
    loss.backward()
    opt.step()
    t += 1
    if t >= 10:
        break
print(t, loss.item())
""",
        NUMBERS,
        VERBATIM,
    ),
]
