"""Cells that can be run neither way: refused before anything runs, at the line that is why."""

from cell import Cell, refused
from setups import IMAGES, MLP, NUMBERS, TOKENS, VECTORS

CELLS = [
    Cell(
        "two optimizers of a gan",
        """
G, D = nn.Linear(4, 8), nn.Linear(8, 1)
optG = optim.Adam(G.parameters(), lr=1e-3)
optD = optim.Adam(D.parameters(), lr=1e-3)
bce = nn.BCEWithLogitsLoss()
for epoch in range(2):
    for real, _ in train_loader:
        n = real.size(0)
        optD.zero_grad()
        d_real = bce(D(real), torch.ones(n, 1))
        d_real.backward()
        fake = G(torch.randn(n, 4))
        d_fake = bce(D(fake.detach()), torch.zeros(n, 1))
        d_fake.backward()
        optD.step()
        optG.zero_grad()
        g_loss = bce(D(fake), torch.ones(n, 1))
        g_loss.backward()
        optG.step()
    print(d_real.item() + d_fake.item(), g_loss.item())
""",
        VECTORS,
        refused(("optG.step()", "optD.step()"), "optimizer"),
    ),
    Cell(
        "encoder and decoder with an optimizer each",
        """
enc_opt = optim.SGD(encoder.parameters(), lr=0.1)
dec_opt = optim.SGD(decoder.parameters(), lr=0.1)
for epoch in range(2):
    for x, y in train_loader:
        enc_opt.zero_grad()
        dec_opt.zero_grad()
        loss = F.cross_entropy(decoder(encoder(x)), y)
        loss.backward()
        enc_opt.step()
        dec_opt.step()
""",
        VECTORS + "encoder, decoder = nn.Linear(8, 6), nn.Linear(6, 3)\n",
        refused(("dec_opt.step()", "enc_opt.step()"), "optimizer"),
    ),
    Cell(
        "lbfgs with a closure",
        """
opt = optim.LBFGS(reg.parameters(), lr=0.1)
for epoch in range(3):
    for xb, yb in train_dl:
        def closure():
            opt.zero_grad()
            loss = F.mse_loss(reg(xb), yb)
            loss.backward()
            return loss
        opt.step(closure)
""",
        NUMBERS,
        refused(("opt.step(closure)", "loss.backward()", "def closure()"), "closure"),
    ),
    Cell(
        "a hidden state carried across batches",
        """
rnn, head = nn.GRU(8, 12, batch_first=True), nn.Linear(12, vocab_size)
emb = nn.Embedding(vocab_size, 8)
net = nn.ModuleList([rnn, head, emb])
opt = optim.Adam(net.parameters(), lr=0.01)
steady = DataLoader(TensorDataset(tokens), batch_size=9)
for epoch in range(2):
    h = torch.zeros(1, 9, 12)
    for (seq,) in steady:
        opt.zero_grad()
        out, h = rnn(emb(seq[:, :-1]), h)
        h = h.detach()
        loss = F.cross_entropy(head(out).flatten(0, 1), seq[:, 1:].flatten())
        loss.backward()
        opt.step()
""",
        TOKENS,
        refused(("out, h = ", "h = h.detach()"), "h"),
    ),
    Cell(
        "hidden states repackaged by a function",
        """
def repackage_hidden(h):
    if isinstance(h, torch.Tensor):
        return h.detach()
    return tuple(repackage_hidden(v) for v in h)

lstm, emb, out = nn.LSTM(8, 10), nn.Embedding(vocab_size, 8), nn.Linear(10, vocab_size)
opt = optim.SGD([*lstm.parameters(), *emb.parameters(), *out.parameters()], lr=0.5)
hidden = (torch.zeros(1, 9, 10), torch.zeros(1, 9, 10))
for i, (batch,) in enumerate(DataLoader(TensorDataset(tokens), batch_size=9)):
    opt.zero_grad()
    hidden = repackage_hidden(hidden)
    output, hidden = lstm(emb(batch.t()[:-1]), hidden)
    loss = F.cross_entropy(out(output).flatten(0, 1), batch.t()[1:].flatten())
    loss.backward()
    opt.step()
""",
        TOKENS,
        refused(("hidden = repackage_hidden", "output, hidden = "), "hidden"),
    ),
    Cell(
        "retain_graph",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        h = F.relu(model.fc1(x))
        loss = criterion(model.fc2(h), y)
        loss.backward(retain_graph=True)
        h.pow(2).mean().backward()
        optimizer.step()
""",
        MLP,
        refused("loss.backward(retain_graph=True)", "retain_graph"),
    ),
    Cell(
        "an accelerator's backward",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
""",
        MLP
        + """
class Accelerator:
    def backward(self, loss):
        loss.backward()

accelerator = Accelerator()
""",
        refused("accelerator.backward(loss)", "accelerator"),
    ),
    Cell(
        "distributed data parallel",
        """
from torch.nn.parallel import DistributedDataParallel as DDP
ddp = DDP(net)
optimizer = optim.SGD(ddp.parameters(), lr=0.1)
for imgs, lbls in trainloader:
    optimizer.zero_grad()
    loss = F.cross_entropy(ddp(imgs), lbls)
    loss.backward()
    optimizer.step()
""",
        IMAGES,
        refused(("ddp = DDP(net)", "loss.backward()"), "DistributedDataParallel"),
    ),
    Cell(
        "gradient descent by hand",
        """
w = torch.zeros(5, 1, requires_grad=True)
for epoch in range(2):
    for xb, yb in train_dl:
        loss = ((xb @ w - yb) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            w -= 0.1 * w.grad
            w.grad = None
print(loss.item())
""",
        NUMBERS,
        refused(("loss.backward()", "w -= 0.1 * w.grad", "for xb, yb in"), "optimizer"),
    ),
    Cell(
        "gradient descent by hand over a model's parameters",
        """
lr = 0.5
for epoch in range(2):
    for i in range((54 - 1) // 12 + 1):
        xb, yb = X[i * 12:i * 12 + 12], Y[i * 12:i * 12 + 12]
        loss = criterion(model(xb), yb)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad * lr
            model.zero_grad()
""",
        MLP,
        refused(("loss.backward()", "p -= p.grad * lr", "for i in range("), "optimizer"),
    ),
    Cell(
        "backward with a gradient of the person's own",
        """
for x, y in train_loader:
    optimizer.zero_grad()
    each = F.cross_entropy(model(x), y, reduction="none")
    each.backward(gradient=torch.full_like(each, 1 / len(each)))
    optimizer.step()
""",
        MLP,
        refused("each.backward(gradient=", "gradient"),
    ),
    Cell(
        "a function of an earlier cell with two optimizers",
        """
print("before")
for epoch in range(2):
    alternate(train_loader)
""",
        MLP
        + """
first, second = optim.SGD(model.fc1.parameters(), lr=0.1), optim.Adam(model.fc2.parameters())

def alternate(loader):
    for x, y in loader:
        first.zero_grad()
        second.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        first.step()
        second.step()
""",
        refused("alternate(train_loader)", "optimizer"),
    ),
    Cell(
        "something harmless before the refusal",
        """
counter = 5
model = nn.Linear(8, 3)
opt = optim.LBFGS(model.parameters())
print("about to train")
torch.rand(3)

def closure():
    opt.zero_grad()
    loss = criterion(model(X), Y)
    loss.backward()
    return loss

for step in range(3):
    opt.step(closure)
""",
        MLP,
        refused(("opt.step(closure)", "loss.backward()", "def closure()"), "closure"),
    ),
]
