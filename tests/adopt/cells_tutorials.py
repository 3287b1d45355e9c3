"""Batch loops at top level, as tutorials and courses write them."""

from cell import Cell
from setups import HF, IMAGES, IMPORTS, MLP, NUMBERS, VECTORS

CELLS = [
    Cell(
        "running loss printed every few batches",
        """
criterion = nn.CrossEntropyLoss()
optimizer = optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

for epoch in range(2):  # loop over the dataset multiple times
    running_loss = 0.0
    for i, data in enumerate(trainloader, 0):
        # get the inputs; data is a list of [inputs, labels]
        inputs, labels = data

        # zero the parameter gradients
        optimizer.zero_grad()

        # forward + backward + optimize
        outputs = net(inputs)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()

        # print statistics
        running_loss += loss.item()
        if i % 2 == 1:
            print(f'[{epoch + 1}, {i + 1:5d}] loss: {running_loss / 2:.3f}')
            running_loss = 0.0

print('Finished Training')
""",
        IMAGES,
    ),
    Cell(
        "loss and accuracy per epoch with evaluation",
        """
for epoch in range(3):
    model.train()
    total_loss, correct, total = 0.0, 0, 0
    for x, y in train_loader:
        x, y = x.to(device), y.to(device)
        optimizer.zero_grad()
        logits = model(x)
        loss = criterion(logits, y)
        loss.backward()
        optimizer.step()
        total_loss += loss.item() * x.size(0)
        correct += (logits.argmax(dim=1) == y).sum().item()
        total += y.size(0)
    model.eval()
    with torch.no_grad():
        hits = sum((model(a).argmax(1) == b).sum().item() for a, b in test_loader)
    print(f"epoch {epoch}: loss {total_loss / total:.4f} acc {correct / total:.2%}", end=" ")
    print(f"test {hits / 18:.2%}")
""",
        MLP,
    ),
    Cell(
        "percent formatting with lengths of loader and dataset",
        """
log_interval = 2
for epoch in range(1, 3):
    model.train()
    for batch_idx, (data, target) in enumerate(train_loader):
        data, target = data.to(device), target.to(device)
        optimizer.zero_grad()
        output = F.log_softmax(model(data), dim=1)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        if batch_idx % log_interval == 0:
            print('Train Epoch: {} [{}/{} ({:.0f}%)]\\tLoss: {:.6f}'.format(
                epoch, batch_idx * len(data), len(train_loader.dataset),
                100. * batch_idx / len(train_loader), loss.item()))
""",
        MLP,
    ),
    Cell(
        "zero_grad after the step",
        """
size = len(train_loader.dataset)
for batch, (X, y) in enumerate(train_loader):
    # Compute prediction error
    pred = model(X)
    loss = criterion(pred, y)

    # Backpropagation
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

    if batch % 2 == 0:
        loss, current = loss.item(), (batch + 1) * len(X)
        print(f"loss: {loss:>7f}  [{current:>5d}/{size:>5d}]")
""",
        MLP,
    ),
    Cell(
        "the cell defines data, model and optimizer too",
        """
torch.manual_seed(42)

class Flowers(Dataset):
    def __init__(self, n):
        self.x = torch.rand(n, 4)
        self.y = (self.x.sum(1) > 2).long()
    def __len__(self):
        return len(self.y)
    def __getitem__(self, index):
        return self.x[index], self.y[index]

dl = DataLoader(Flowers(50), batch_size=12, shuffle=True, drop_last=True)
clf = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))
opt = torch.optim.Adam(clf.parameters(), lr=0.01)
losses = []
for epoch in range(2):
    for xb, yb in dl:
        preds = clf(xb)
        loss = F.cross_entropy(preds, yb)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
print("first %.3f last %.3f of %d" % (losses[0], losses[-1], len(losses)))
""",
        IMPORTS,
    ),
    Cell(
        "one name unpacked in the body by index",
        """
opt = optim.RMSprop(model.parameters(), lr=1e-3)
for e in range(2):
    train_loss = 0
    for batch in train_loader:
        features = batch[0].to(device)
        target = batch[1].to(device)
        opt.zero_grad()
        out = model(features)
        cost = criterion(out, target)
        cost.backward()
        opt.step()
        train_loss += cost.detach().item()
    print('Epoch: {}/{}  Training loss: {:.3f}'.format(e + 1, 2, train_loss / len(train_loader)))
""",
        MLP,
    ),
    Cell(
        "regression with r2 from collected predictions",
        """
optimizer = optim.Adam(reg.parameters(), lr=1e-2)
mse = nn.MSELoss()
for epoch in range(3):
    preds, truths = [], []
    for xb, yb in train_dl:
        y_hat = reg(xb)
        loss = mse(y_hat, yb)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        preds.append(y_hat.detach().numpy())
        truths.append(yb.numpy())
    p, t = np.concatenate(preds), np.concatenate(truths)
    r2 = 1 - ((t - p) ** 2).sum() / ((t - t.mean()) ** 2).sum()
    print(epoch, round(float(r2), 3), len(p))
""",
        NUMBERS,
    ),
    Cell(
        "history lists and validation loss",
        """
optimizer = optim.SGD(reg.parameters(), lr=0.05)
history = {"train": [], "val": []}
for epoch in range(3):
    reg.train()
    batch_losses = []
    for xb, yb in train_dl:
        optimizer.zero_grad()
        loss = F.mse_loss(reg(xb), yb)
        loss.backward()
        optimizer.step()
        batch_losses.append(loss.item())
    reg.eval()
    with torch.inference_mode():
        val = sum(F.mse_loss(reg(a), b).item() for a, b in val_dl) / len(val_dl)
    history["train"].append(np.mean(batch_losses))
    history["val"].append(val)
    print(f"{epoch:02d} {history['train'][-1]:.4f} {val:.4f}")
""",
        NUMBERS,
    ),
    Cell(
        "binary targets as floats with a threshold accuracy",
        """
head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1))
loss_fn = nn.BCEWithLogitsLoss()
opt = torch.optim.Adam(params=head.parameters(), lr=0.02)
for epoch in range(2):
    accs = []
    for xb, yb in train_loader:
        y_logits = head(xb).squeeze()
        y_pred = torch.round(torch.sigmoid(y_logits))
        loss = loss_fn(y_logits, (yb > 0).float())
        acc = (y_pred == (yb > 0).float()).float().mean()
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        accs.append(acc.item())
    print(f"Epoch: {epoch} | Loss: {loss:.5f}, Accuracy: {100 * np.mean(accs):.2f}%")
""",
        VECTORS,
    ),
    Cell(
        "flattened images and a tensor accumulator",
        """
mlp = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid(), nn.Linear(10, 2))
optimizer = optim.Adagrad(mlp.parameters(), lr=0.05)
for epoch in range(2):
    tr_loss = torch.tensor(0.0)
    n_correct = 0
    for images, labels in trainloader:
        images = images.view(images.shape[0], -1)
        output = mlp(images)
        loss = nn.functional.cross_entropy(output, labels)
        mlp.zero_grad()
        loss.backward()
        optimizer.step()
        tr_loss += loss.detach() * len(images)
        _, predicted = torch.max(output.data, 1)
        n_correct += (predicted == labels).sum()
    print("epoch", epoch, "loss", (tr_loss / len(trainset)).item(), "correct", int(n_correct))
""",
        IMAGES,
    ),
    Cell(
        "a dict batch to a model that gives its own loss",
        """
model.train()
for epoch in range(2):
    total = 0
    for step, batch in enumerate(train_dataloader):
        batch = {k: v.to(device) for k, v in batch.items()}
        outputs = model(**batch)
        loss = outputs.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 3 == 0:
            print(f"step {step}: {loss.item():.4f}")
    print("average", total / len(train_dataloader))
""",
        HF,
    ),
    Cell(
        "dict batch with predictions counted by a metric object",
        """
class Accuracy:
    def __init__(self):
        self.hits = self.seen = 0
    def add_batch(self, predictions, references):
        self.hits += (predictions == references).sum().item()
        self.seen += len(references)
    def compute(self):
        return {"accuracy": self.hits / self.seen}

num_epochs = 2
metric = Accuracy()
progress_bar = tqdm(range(num_epochs * len(train_dataloader)))
for epoch in range(num_epochs):
    for batch in train_dataloader:
        labels = batch["labels"]
        out = model(batch["input_ids"], batch["attention_mask"], labels=labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress_bar.update(1)
        metric.add_batch(predictions=out.logits.argmax(dim=-1), references=labels)
print(metric.compute(), progress_bar.n)
""",
        HF,
    ),
]
