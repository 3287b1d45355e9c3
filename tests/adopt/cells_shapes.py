"""Batches whose first dimension misleads: time before samples, lists, graphs, equal lengths."""

from cell import RUNS, Cell
from setups import IMAGES, IMPORTS, MLP, TOKENS, VECTORS

CELLS = [
    Cell(
        "time before samples, in a dict",
        """
opt = optim.Adam(tagger.parameters(), lr=0.02)
for epoch in range(2):
    epoch_loss = 0
    for batch in ragged_loader:
        src, trg = batch["src"], batch["trg"]  # (time, samples)
        opt.zero_grad()
        output = tagger(src)
        loss = F.cross_entropy(output.view(-1, 4), trg.view(-1), ignore_index=-1)
        loss.backward()
        nn.utils.clip_grad_norm_(tagger.parameters(), 1.0)
        opt.step()
        epoch_loss += loss.item()
    print(f"{epoch_loss / len(ragged_loader):.4f}", src.shape[1])
""",
        IMPORTS
        + """
sentences = [torch.randint(0, 9, (random.randint(3, 7),)) for _ in range(54)]

def time_first(batch):
    src = nn.utils.rnn.pad_sequence(batch, padding_value=0)
    return {"src": src, "trg": nn.utils.rnn.pad_sequence([s % 4 for s in batch], padding_value=-1)}

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.rnn, self.out = nn.Embedding(9, 6), nn.GRU(6, 8), nn.Linear(8, 4)
    def forward(self, x):
        return self.out(self.rnn(self.emb(x))[0])

ragged_loader = DataLoader(sentences, batch_size=12, shuffle=True, collate_fn=time_first)
tagger = Tagger()
""",
    ),
    Cell(
        "one window of a series a step",
        """
optimizer = optim.Adam(forecaster.parameters(), lr=0.01)
for epoch in range(2):
    for window, following in windows:
        optimizer.zero_grad()
        guess = forecaster(window)
        single_loss = F.mse_loss(guess, following)
        single_loss.backward()
        optimizer.step()
    print(f"epoch {epoch} loss {single_loss.item():.6f}")
""",
        IMPORTS
        + """
series = torch.sin(torch.arange(40) / 3)
windows = [(series[i:i + 12], series[i + 12:i + 13]) for i in range(0, 20, 2)]

class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 6), nn.Linear(6, 1)
    def forward(self, window):
        states, _ = self.lstm(window.view(len(window), 1, 1))
        return self.out(states[-1, 0])

forecaster = Forecaster()
""",
        RUNS,
    ),
    Cell(
        "positions as many as samples",
        """
optimizer = optim.SGD([*word.parameters(), *place.parameters(), *head.parameters()], lr=0.1)
for epoch in range(2):
    for seq, where, y in placed_loader:  # (samples, 12), (12,), (samples,)
        optimizer.zero_grad()
        h = (word(seq) + place(where)).mean(1)
        loss = F.cross_entropy(head(h), y)
        loss.backward()
        optimizer.step()
    print(f"{loss.item():.4f} {len(seq)} {len(where)}")
""",
        IMPORTS
        + """
word, place, head = nn.Embedding(9, 6), nn.Embedding(12, 6), nn.Linear(6, 2)
rows = [(torch.randint(0, 9, (12,)), i % 2) for i in range(48)]

def with_places(batch):
    return torch.stack([b[0] for b in batch]), torch.arange(12), torch.tensor([b[1] for b in batch])

placed_loader = DataLoader(rows, batch_size=12, shuffle=True, collate_fn=with_places)
""",
        RUNS,
    ),
    Cell(
        "a list of samples as a batch",
        """
optimizer = optim.Adam(net.parameters(), lr=0.01)
for epoch in range(2):
    for samples in list_loader:
        imgs = torch.stack([s["image"] for s in samples])
        wanted = torch.tensor([s["label"] for s in samples])
        optimizer.zero_grad()
        loss = F.cross_entropy(net(imgs), wanted)
        loss.backward()
        optimizer.step()
    print(f"{loss.item():.4f}", len(samples), samples[0]["label"])
""",
        IMAGES
        + """
dicts = [{"image": images[i], "label": labels[i].item()} for i in range(54)]
list_loader = DataLoader(dicts, batch_size=12, shuffle=True, collate_fn=list)
""",
    ),
    Cell(
        "pictures in a list and targets in a list of dicts",
        """
optimizer = optim.SGD(net.parameters(), lr=0.05)
for epoch in range(2):
    for pictures, targets in det_loader:
        pictures = [p.to(device) for p in pictures]
        targets = [{k: v.to(device) for k, v in t.items()} for t in targets]
        scores = net(torch.stack(pictures))
        losses = {
            "kind": F.cross_entropy(scores, torch.stack([t["kind"] for t in targets])),
            "size": scores.pow(2).mean(),
        }
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    print({k: f"{v.item():.4f}" for k, v in losses.items()}, f"{total:.4f}", len(targets))
""",
        IMAGES
        + """
boxed = [(images[i], {"kind": labels[i], "boxes": torch.rand(i % 3, 4)}) for i in range(54)]
det_loader = DataLoader(boxed, batch_size=12, collate_fn=lambda batch: tuple(zip(*batch)))
""",
    ),
    Cell(
        "graphs joined into one",
        """
optimizer = optim.Adam(gnn.parameters(), lr=0.02)
for epoch in range(2):
    right = 0
    for data in graph_loader:
        optimizer.zero_grad()
        out = gnn(data.x, data.edges, data.owner)
        loss = F.cross_entropy(out, data.y)
        loss.backward()
        optimizer.step()
        right += int((out.argmax(1) == data.y).sum())
    print(right, f"{loss.item():.4f}")
""",
        IMPORTS
        + """
class Joined:
    def __init__(self, graphs):
        sizes = [len(x) for x, _ in graphs]
        self.x, self.y = torch.cat([x for x, _ in graphs]), torch.tensor([y for _, y in graphs])
        self.owner = torch.arange(len(graphs)).repeat_interleave(torch.tensor(sizes))
        self.edges = torch.stack([torch.arange(len(self.x)), torch.arange(len(self.x)).roll(1)])

class Gnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 2)
    def forward(self, x, edges, owner):
        h = self.inner(x)
        h = (h + h[edges[1]]).relu()
        return self.outer(torch.zeros(int(owner.max()) + 1, 6).index_add(0, owner, h))

graphs = [(torch.randn(3 + i % 3, 4), i % 2) for i in range(54)]
graph_loader = DataLoader(graphs, batch_size=12, shuffle=True, collate_fn=Joined)
gnn = Gnn()
""",
    ),
    Cell(
        "a loss summed over time, with dels",
        """
optimizer = optim.Adam([*emb.parameters(), *cell.parameters(), *out.parameters()], lr=0.02)
for epoch in range(2):
    for seq, lens, y in loader:
        hidden = torch.zeros(len(seq), 8)
        loss = 0
        for t in range(seq.size(1) - 1):
            hidden = cell(emb(seq[:, t]), hidden)
            loss += F.cross_entropy(out(hidden), seq[:, t + 1])
        per_token = loss / (seq.size(1) - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        del hidden, seq
    print(f"{per_token.item():.4f}")
""",
        TOKENS + "emb, cell, out = nn.Embedding(12, 6), nn.GRUCell(6, 8), nn.Linear(8, 12)\n",
    ),
    Cell(
        "one bag a batch, classes weighted",
        """
criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))
optimizer = optim.Adam(mil.parameters(), lr=0.01)
for epoch in range(2):
    total = 0.0
    for instances, label in bag_loader:
        optimizer.zero_grad()
        attention = mil[0](instances).softmax(0)
        logits = mil[1]((attention * instances).sum(0, keepdim=True))
        loss = criterion(logits, label)
        loss.backward()
        optimizer.step()
        total += loss.item()
    print(f"{total / len(bag_loader):.4f}", attention.shape[1])
""",
        IMPORTS
        + """
bags = [(torch.randn(random.randint(3, 9), 4), torch.tensor(i % 2)) for i in range(12)]
bag_loader = DataLoader(bags, collate_fn=lambda b: (b[0][0], b[0][1][None]), shuffle=True)
mil = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 2)])
""",
        RUNS,
    ),
    Cell(
        "numpy batches made into tensors",
        """
def feed(n):
    for start in range(0, n, 12):
        yield X.numpy()[start:start + 12], Y.numpy()[start:start + 12]

for epoch in range(2):
    for features, wanted in feed(54):
        features = torch.from_numpy(features).float()
        wanted = torch.LongTensor(wanted)
        optimizer.zero_grad()
        loss = criterion(model(features), wanted)
        loss.backward()
        optimizer.step()
    print(f"{loss.item():.4f}", len(features))
""",
        MLP,
    ),
    Cell(
        "one-hot targets and a batch reshaped",
        """
net = nn.Linear(2, 3)
opt = optim.SGD(net.parameters(), lr=0.1)
for epoch in range(2):
    for x, y in train_loader:
        y = F.one_hot(y, 3).float().repeat_interleave(4, dim=0)
        x = x.view(-1, 2)
        opt.zero_grad()
        loss = F.binary_cross_entropy_with_logits(net(x), y)
        loss.backward()
        opt.step()
    print(f"{loss.item():.4f}", tuple(x.shape), tuple(y.shape))
""",
        VECTORS,
    ),
]
