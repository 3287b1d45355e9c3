"""What people record of a step, and how: every statement round the slice."""

from cell import Cell
from setups import IMAGES, MLP

CELLS = [
    Cell(
        "a tqdm bar with its postfix",
        """
for epoch in range(2):
    pbar = tqdm(train_loader, desc=f"Epoch {epoch}", leave=False)
    running = 0.0
    for x, y in pbar:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        running += loss.item()
        pbar.set_postfix(loss=f"{loss.item():.3f}", lr=optimizer.param_groups[0]["lr"])
    tqdm.write(f"epoch {epoch} {running / len(pbar):.4f}")
    print(pbar.n, pbar.total)
""",
        MLP,
    ),
    Cell(
        "enumerate of tqdm from one",
        """
for epoch in range(2):
    for step, (x, y) in enumerate(tqdm(train_loader, total=len(train_loader)), 1):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 2 == 0 or step == len(train_loader):
            print("step %d/%d loss=%.4f" % (step, len(train_loader), loss))
""",
        MLP,
    ),
    Cell(
        "tqdm of enumerate as a context",
        """
for epoch in range(2):
    with tqdm(enumerate(train_loader), total=len(train_loader), unit="batch") as bar:
        for it, (inputs, targets) in bar:
            bar.set_description(f"Epoch {epoch}")
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, targets)
            predictions = outputs.argmax(dim=1, keepdim=True).squeeze()
            correct = (predictions == targets).sum().item()
            accuracy = correct / len(targets)
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=loss.item(), accuracy=100. * accuracy)
            print(it, f"{accuracy:.3f}")
""",
        MLP,
    ),
    Cell(
        "an average meter class",
        """
class AverageMeter:
    def __init__(self):
        self.reset()
    def reset(self):
        self.val = self.avg = self.sum = self.count = 0
    def update(self, val, n=1):
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count

losses, top1 = AverageMeter(), AverageMeter()
for epoch in range(2):
    losses.reset(); top1.reset()
    for i, (x, y) in enumerate(train_loader):
        output = model(x)
        loss = criterion(output, y)
        prec = (output.argmax(1) == y).float().mean() * 100
        losses.update(loss.item(), x.size(0))
        top1.update(prec.item(), x.size(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 2 == 0:
            print('Epoch: [{0}][{1}/{2}]\\tLoss {loss.val:.4f} ({loss.avg:.4f})\\t'
                  'Prec@1 {top1.val:.3f} ({top1.avg:.3f})'.format(
                      epoch, i, len(train_loader), loss=losses, top1=top1))
""",
        MLP,
    ),
    Cell(
        "rows of a table",
        """
rows = []
step = 0
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        logits = model(x)
        loss = criterion(logits, y)
        loss.backward()
        optimizer.step()
        rows.append({"step": step, "loss": loss.item(), "n": len(x),
                     "conf": logits.softmax(-1).max(-1).values.mean().item()})
        step += 1
print(len(rows), sum(r["n"] for r in rows), f'{rows[-1]["conf"]:.3f}')
""",
        MLP,
    ),
    Cell(
        "a dict of logs and the losses of single samples",
        """
from collections import defaultdict
logs = defaultdict(list)
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        each = F.cross_entropy(model(x), y, reduction="none")
        loss = each.mean()
        loss.backward()
        optimizer.step()
        logs["loss"].append(loss.item())
        logs["hardest"].append(each.max().item())
        logs["above"].append((each > 1).sum().item())
    print({k: round(sum(v) / len(v), 3) for k, v in logs.items()})
""",
        MLP,
    ),
    Cell(
        "confusion matrix filled in the loop",
        """
confusion = torch.zeros(3, 3, dtype=torch.long)
for epoch in range(2):
    for x, y in train_loader:
        out = model(x)
        loss = criterion(out, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for t, p in zip(y.view(-1), out.argmax(1).view(-1)):
            confusion[t.long(), p.long()] += 1
print(confusion, confusion.diag().sum().item() / confusion.sum().item())
""",
        MLP,
    ),
    Cell(
        "the norm of the gradient and the weights, read by hand",
        """
grad_norms = []
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        total_norm = sum(p.grad.data.norm(2).item() ** 2 for p in model.parameters()) ** 0.5
        optimizer.step()
        grad_norms.append(total_norm)
    size = sum(p.detach().pow(2).sum() for p in model.parameters()).sqrt()
    print(f"{np.mean(grad_norms):.4f} {size:.4f}")
""",
        MLP,
    ),
    Cell(
        "exponential moving average of the loss",
        """
avg_loss, beta, batch_num, best = 0.0, 0.9, 0, math.inf
for x, y in train_loader:
    batch_num += 1
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    avg_loss = beta * avg_loss + (1 - beta) * loss.item()
    smoothed = avg_loss / (1 - beta ** batch_num)
    best = min(best, smoothed)
    loss.backward()
    optimizer.step()
    print(f"{smoothed:.4f}", end=" ")
print("best", best)
""",
        MLP,
    ),
    Cell(
        "printing tensors themselves",
        """
for epoch in range(2):
    for x, y in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(epoch, loss)
    print("last", loss.data, "mean weight", model.fc1.weight.mean())
""",
        MLP,
    ),
    Cell(
        "embeddings gathered for a later plot",
        """
features = []
def grab(module, inputs, output):
    features.append(output.detach().mean().item())

handle = net.pool.register_forward_hook(grab)
optimizer = optim.SGD(net.parameters(), lr=0.05)
for imgs, lbls in trainloader:
    optimizer.zero_grad()
    loss = F.cross_entropy(net(imgs), lbls)
    loss.backward()
    optimizer.step()
handle.remove()
print(loss.item())
""",
        IMAGES,
        whole="the hook is called once a piece",
    ),
    Cell(
        "counters that the slice itself updates",
        """
seen = 0
optimizer = optim.SGD(net.parameters(), lr=0.05)
for epoch in range(2):
    for imgs, lbls in trainloader:
        optimizer.zero_grad()
        seen += len(imgs)
        weight = 1.0 / (1 + seen / 54)
        loss = weight * F.cross_entropy(net(imgs), lbls)
        loss.backward()
        optimizer.step()
    print(seen, f"{weight:.3f} {loss.item():.4f}")
""",
        IMAGES,
    ),
    Cell(
        "mistakes collected as index lists",
        """
wrong = []
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        optimizer.zero_grad()
        scores = model(x)
        loss = criterion(scores, y)
        loss.backward()
        optimizer.step()
        mask = scores.argmax(1) != y
        wrong.extend((epoch, i, k) for k in mask.nonzero().flatten().tolist())
        hardest = x[scores.gather(1, y[:, None]).argmin()]
        wrong_x = x[mask]
    print(epoch, len(wrong), wrong_x.shape[1], hardest.sum().item())
""",
        MLP,
    ),
    Cell(
        "writing text files and a writer object",
        """
class SummaryWriter:
    def __init__(self):
        self.scalars = []
    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, round(float(value), 4), step))

writer = SummaryWriter()
for epoch in range(2):
    for i, (x, y) in enumerate(train_loader):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        step = epoch * len(train_loader) + i
        writer.add_scalar("grad/fc2", model.fc2.weight.grad.abs().max(), step)
        optimizer.step()
        writer.add_scalar("Loss/train", loss, step)
print(writer.scalars[-1], len(writer.scalars))
""",
        MLP,
    ),
]
