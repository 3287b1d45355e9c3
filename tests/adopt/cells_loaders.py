"""Where batches come from: loaders, zips, slices of them, and what a batch looks like."""

from cell import RUNS, Cell
from setups import HF, MLP, VECTORS

CELLS = [
    Cell(
        "islice of the loader",
        """
from itertools import islice
for epoch in range(2):
    for x, y in islice(train_loader, 3):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(loss.item())
""",
        MLP,
    ),
    Cell(
        "two loaders zipped",
        """
unlabelled = DataLoader(TensorDataset(torch.randn(48, 8)), batch_size=12, shuffle=True)
for epoch in range(2):
    for (x, y), (u,) in zip(train_loader, unlabelled):
        optimizer.zero_grad()
        sup = criterion(model(x), y)
        p = model(u).softmax(-1)
        ent = -(p * p.clamp_min(1e-8).log()).sum(-1).mean()
        loss = sup + 0.05 * ent
        loss.backward()
        optimizer.step()
    print(f"{sup.item():.4f} {ent.item():.4f}")
""",
        MLP,
        RUNS,
    ),
    Cell(
        "nested targets",
        """
class Pairs(Dataset):
    def __len__(self):
        return 54
    def __getitem__(self, i):
        return (X[i, :4], X[i, 4:]), (Y[i], X[i].sum())

left, right = nn.Linear(4, 6), nn.Linear(4, 6)
kind, size = nn.Linear(12, 3), nn.Linear(12, 1)
parts = nn.ModuleList([left, right, kind, size])
opt = optim.SGD(parts.parameters(), lr=0.05)
for epoch in range(2):
    for i, ((a, b), (label, total)) in enumerate(DataLoader(Pairs(), batch_size=12)):
        h = torch.cat([left(a), right(b)], 1).relu()
        loss = F.cross_entropy(kind(h), label) + F.mse_loss(size(h)[:, 0], total)
        opt.zero_grad()
        loss.backward()
        opt.step()
    print(i, f"{loss.item():.4f}")
""",
        VECTORS,
    ),
    Cell(
        "star targets",
        """
three = DataLoader(TensorDataset(X[:, :4], X[:, 4:], Y), batch_size=12, shuffle=True)
for epoch in range(2):
    for *inputs, target in three:
        optimizer.zero_grad()
        loss = criterion(model(torch.cat(inputs, dim=1)), target)
        loss.backward()
        optimizer.step()
    print(len(inputs), loss.item())
""",
        MLP,
    ),
    Cell(
        "dict batch read by key, with strings beside",
        """
class Rows(Dataset):
    def __len__(self):
        return 54
    def __getitem__(self, i):
        return {"id": f"row{i}", "x": X[i], "y": Y[i]}

seen = []
for epoch in range(2):
    for sample in DataLoader(Rows(), batch_size=12, shuffle=True):
        inputs, target = sample["x"], sample["y"]
        optimizer.zero_grad()
        loss = criterion(model(inputs), target)
        loss.backward()
        optimizer.step()
        seen += sample["id"]
    print(len(seen), len(set(seen)), seen[-1], f"{loss.item():.4f}")
""",
        MLP,
    ),
    Cell(
        "an iterable data set",
        """
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        for x, y in zip(X, Y):
            yield x, y

stream = DataLoader(Stream(), batch_size=12)
for epoch in range(2):
    for n, (x, y) in enumerate(stream):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(n, len(x), loss.item())
""",
        MLP,
    ),
    Cell(
        "a list of batches and a generator function",
        """
def batches(n):
    order = np.random.permutation(len(X))
    for chunk in np.array_split(order, n):
        yield X[chunk], Y[chunk]

fixed = [(X[i:i + 12], Y[i:i + 12]) for i in range(0, 54, 12)]
for source in (fixed, batches(5)):
    for x, y in source:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    print(len(x), loss.item())
""",
        MLP,
        RUNS,
    ),
    Cell(
        "phases train and val in one loop",
        """
dataloaders = {"train": train_loader, "val": test_loader}
dataset_sizes = {k: len(v.dataset) for k, v in dataloaders.items()}
scheduler = lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)

def train_model(model, criterion, optimizer, scheduler, num_epochs=2):
    best_model_wts = copy.deepcopy(model.state_dict())
    best_acc = 0.0
    for epoch in range(num_epochs):
        print('Epoch {}/{}'.format(epoch, num_epochs - 1))
        for phase in ['train', 'val']:
            if phase == 'train':
                model.train()
            else:
                model.eval()
            running_loss = 0.0
            running_corrects = 0
            for inputs, labels in dataloaders[phase]:
                inputs = inputs.to(device)
                labels = labels.to(device)
                optimizer.zero_grad()
                with torch.set_grad_enabled(phase == 'train'):
                    outputs = model(inputs)
                    _, preds = torch.max(outputs, 1)
                    loss = criterion(outputs, labels)
                    if phase == 'train':
                        loss.backward()
                        optimizer.step()
                running_loss += loss.item() * inputs.size(0)
                running_corrects += torch.sum(preds == labels.data)
            if phase == 'train':
                scheduler.step()
            epoch_loss = running_loss / dataset_sizes[phase]
            epoch_acc = running_corrects.double() / dataset_sizes[phase]
            print('{} Loss: {:.4f} Acc: {:.4f}'.format(phase, epoch_loss, epoch_acc))
            if phase == 'val' and epoch_acc > best_acc:
                best_acc = epoch_acc
                best_model_wts = copy.deepcopy(model.state_dict())
    model.load_state_dict(best_model_wts)
    return model

model = train_model(model, criterion, optimizer, scheduler)
""",
        MLP,
    ),
    Cell(
        "a batch moved piece by piece, with extras passed through",
        """
for epoch in range(2):
    for step, batch in enumerate(train_dataloader):
        b_input_ids = batch['input_ids'].to(device)
        b_input_mask = batch['attention_mask'].to(device)
        b_labels = batch['labels'].to(device)
        model.zero_grad()
        result = model(b_input_ids, attention_mask=b_input_mask, labels=b_labels)
        loss, logits = result.loss, result.logits
        loss.backward()
        optimizer.step()
        logits = logits.detach().cpu().numpy()
        label_ids = b_labels.to('cpu').numpy()
        flat = (np.argmax(logits, axis=1).flatten() == label_ids.flatten()).mean()
    print(step, f"{flat:.3f} {loss.item():.4f}")
""",
        HF,
    ),
]
