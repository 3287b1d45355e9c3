"""Losses of several terms: heads, teachers, penalties, weights."""

from cell import RUNS, Cell
from setups import IMPORTS, MLP, NUMBERS, VECTORS

CELLS = [
    Cell(
        "two losses, both logged",
        """
class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 12)
        self.kind, self.size = nn.Linear(12, 3), nn.Linear(12, 1)
    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.kind(h), self.size(h).squeeze(-1)

net = TwoHeads()
opt = optim.Adam(net.parameters(), lr=0.01)
for epoch in range(2):
    sums = np.zeros(3)
    for x, y in train_loader:
        kind, size = net(x)
        loss_kind = F.cross_entropy(kind, y)
        loss_size = F.mse_loss(size, x.sum(1))
        loss = loss_kind + 0.1 * loss_size
        opt.zero_grad()
        loss.backward()
        opt.step()
        sums += [loss.item(), loss_kind.item(), loss_size.item()]
    print("loss %.3f kind %.3f size %.3f" % tuple(sums / len(train_loader)))
""",
        VECTORS,
    ),
    Cell(
        "a summed loss without noise",
        """
opt = optim.SGD(model.parameters(), lr=0.002)
for epoch in range(2):
    total = 0.0
    for x, y in train_loader:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y, reduction="sum")
        loss.backward()
        opt.step()
        total += loss.item()
    print(f"{total / len(train_set):.4f}")
""",
        MLP,
    ),
    Cell(
        "a sum divided by the batch by hand",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        log_p = torch.log_softmax(model(x), -1)
        loss = -log_p[range(len(y)), y].sum() / x.shape[0]
        loss.backward()
        optimizer.step()
    print(f"{loss.item():.5f}")
""",
        MLP,
    ),
    Cell(
        "knowledge distillation with a frozen teacher",
        """
teacher, student = MLP(24), MLP(6)
teacher.eval()
T, alpha = 2.0, 0.7
opt = optim.SGD(student.parameters(), lr=0.1)
for epoch in range(2):
    agree = 0
    for x, y in train_loader:
        with torch.no_grad():
            t_logits = teacher(x)
        s_logits = student(x)
        soft = F.kl_div(F.log_softmax(s_logits / T, 1), F.softmax(t_logits / T, 1),
                        reduction="batchmean") * T * T
        hard = F.cross_entropy(s_logits, y)
        loss = alpha * soft + (1 - alpha) * hard
        opt.zero_grad()
        loss.backward()
        opt.step()
        agree += (t_logits.argmax(1) == s_logits.argmax(1)).sum().item()
    print(f"soft {soft:.4f} hard {hard:.4f} agree {agree}")
""",
        MLP,
    ),
    Cell(
        "l1 and l2 penalties by hand",
        """
l1_lambda, l2_lambda = 1e-3, 1e-4
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        l1 = sum(p.abs().sum() for p in model.parameters())
        l2 = torch.tensor(0.)
        for name, p in model.named_parameters():
            if "weight" in name:
                l2 = l2 + p.pow(2).sum()
        total = loss + l1_lambda * l1 + l2_lambda * l2
        total.backward()
        optimizer.step()
    print(f"{loss.item():.4f} {l1.item():.3f} {l2.item():.3f} {total.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "gradient penalty by autograd.grad",
        """
for epoch in range(2):
    for x, y in train_loader:
        x.requires_grad_(True)
        out = model(x)
        loss = criterion(out, y)
        grads, = torch.autograd.grad(out.sum(), x, create_graph=True)
        penalty = (grads.norm(2, dim=1) - 1).pow(2).mean()
        loss = loss + 0.1 * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"{loss.item():.4f} {penalty.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "class weights and a focal term",
        """
weights = torch.tensor([1.0, 2.0, 0.5])
gamma = 2
for epoch in range(2):
    for x, y in train_loader:
        out = model(x)
        ce = F.cross_entropy(out, y, reduction="none")
        pt = torch.exp(-ce)
        focal = (weights[y] * (1 - pt) ** gamma * ce).mean()
        optimizer.zero_grad()
        focal.backward()
        optimizer.step()
    print(f"{focal.item():.5f} {pt.mean().item():.4f}")
""",
        MLP,
    ),
    Cell(
        "weighted cross-entropy",
        """
criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(f"{loss.item():.5f}")
""",
        MLP,
    ),
    Cell(
        "triplets from the data set",
        """
class Triplets(Dataset):
    def __len__(self):
        return 36
    def __getitem__(self, i):
        return points[i], points[i] + 0.1, points[(i + 7) % 54]

points = torch.randn(54, 6)
embed = nn.Linear(6, 4)
opt = optim.SGD(embed.parameters(), lr=0.1)
triplet = nn.TripletMarginLoss(margin=1.0)
for epoch in range(2):
    for anchor, positive, negative in DataLoader(Triplets(), batch_size=12, shuffle=True):
        opt.zero_grad()
        loss = triplet(embed(anchor), embed(positive), embed(negative))
        loss.backward()
        opt.step()
    print(f"{loss.item():.4f}")
""",
        IMPORTS,
    ),
    Cell(
        "quantile regression with a lambda",
        """
q_loss = lambda pred, target, q: torch.max(q * (target - pred), (q - 1) * (target - pred)).mean()
opt = optim.Adam(reg.parameters(), lr=0.01)
for epoch in range(2):
    for xb, yb in train_dl:
        pred = reg(xb)
        parts = [q_loss(pred, yb, q) for q in (0.1, 0.5, 0.9)]
        loss = sum(parts) / len(parts)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(" ".join(f"{p.item():.3f}" for p in parts), f"{loss:.3f}")
""",
        NUMBERS,
    ),
    Cell(
        "root of the mean square",
        """
opt = optim.Adam(reg.parameters(), lr=0.01)
for epoch in range(2):
    for xb, yb in train_dl:
        loss = torch.sqrt(F.mse_loss(reg(xb), yb) + 1e-8)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(f"{loss.item():.4f}")
""",
        NUMBERS,
        RUNS,
        whole="a root of a mean is not a mean of roots",
    ),
    Cell(
        "a sum of squares written by hand",
        """
opt = optim.SGD(reg.parameters(), lr=1e-3)
for epoch in range(2):
    for xb, yb in train_dl:
        opt.zero_grad()
        loss = (reg(xb) - yb).pow(2).sum()
        loss.backward()
        opt.step()
    print(f"{loss.item() / len(xb):.4f}")
""",
        NUMBERS,
    ),
    Cell(
        "a mean times the batch's size",
        """
opt = optim.SGD(reg.parameters(), lr=1e-3)
for epoch in range(2):
    for xb, yb in train_dl:
        opt.zero_grad()
        loss = F.mse_loss(reg(xb), yb) * len(xb)
        loss.backward()
        opt.step()
    print(f"{loss.item() / len(xb):.4f}")
""",
        NUMBERS,
    ),
    Cell(
        "weights of samples normalised over the batch",
        """
for epoch in range(2):
    for x, y in train_loader:
        weight = 1.0 + x[:, 0].abs()
        each = F.cross_entropy(model(x), y, reduction="none")
        optimizer.zero_grad()
        loss = (weight * each).sum() / weight.sum()
        loss.backward()
        optimizer.step()
    print(f"{loss.item():.4f}")
""",
        MLP,
    ),
]
